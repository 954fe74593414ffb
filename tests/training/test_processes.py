"""Two processes of a launcher train one model: as one process does, written once, and ended together.

The processes are forked, so that none has to import torch, and do all their runs one after the other.
"""

import csv
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_models import save_bert, save_llama
from tolerances import assert_near
from training.launched import ADAPTIVE, CASES, FILLED, REFUSED, Ended, N, config_of, ended, name_of, on_one_rank
from training_data import sentences

from loretta import InputError, processes
from loretta.cli.main import main
from loretta.errors import Stopped
from loretta.owned import PARTS, find_foreign, is_whole
from loretta.record import RunRecord
from loretta.training.arguments import check_options
from loretta.training.config import RunConfig
from loretta.training.run import train, train_until

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and dist.is_gloo_available()), reason="needs fork and a torch that was built with gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prompted) -> Path:
    """Where two processes have trained; with the models, whose steps draw no random numbers, and the data."""
    path = tmp_path_factory.mktemp("processes")
    save_llama(path / "decoder")
    config = json.loads((Path(save_bert(path / "encoder", layers=2)) / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (path / "encoder" / "config.json").write_text(json.dumps(config))
    rows = list(sentences(67))
    for split, part in {"train": rows[:48], "validation": rows[48:]}.items():  # 19 rows, which two do not divide
        with (path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    shutil.copytree(prompted, path / "prompted")
    for fsdp in (False, True):
        train_until(config_of(path, "decoder", "rep", f"begun-by-one{fsdp}"), 0.5)
    mp.start_processes(on_one_rank, (str(path),), nprocs=N, start_method="fork")
    return path


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Ended]]:
    """How the runs ended in each of the processes."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(N)]


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[str, str], Ended]:
    """The same run by one process."""
    return cache(
        lambda kind, method: ended(partial(train, config_of(folder, kind, method, f"one-{name_of(kind, method)}")))
    )


def losses(record: RunRecord) -> torch.Tensor:
    return torch.tensor([point.values["loss"] for point in record.history], dtype=torch.float64).float()


@pytest.mark.parametrize(("kind", "method", "fsdp"), CASES)
def test_two_processes_train_as_one_does(kind, method, fsdp, folder, ranks, alone):
    name = name_of(kind, method, fsdp)
    one, two = alone(kind, method).record, ranks[0][name].record
    assert one is not None, alone(kind, method).error
    assert two is not None, ranks[0][name].error
    assert [(point.split, point.step) for point in one.history] == [(point.split, point.step) for point in two.history]
    assert_near("losses of training and validation", losses(two), losses(one))
    assert two.validation.keys() == one.validation.keys()
    for metric, value in one.validation.items():
        assert two.validation[metric] == pytest.approx(value, rel=1e-5), metric
    before, after = (
        load_file(folder / f"{who}-{name_}" / "adapter" / "adapter_model.safetensors")
        for who, name_ in (("one", name_of(kind, method)), ("two", name))
    )
    assert {key: tensor.shape for key, tensor in after.items()} == {key: tensor.shape for key, tensor in before.items()}
    whole = [torch.cat([tensors[key].flatten() for key in sorted(before)]) for tensors in (after, before)]
    assert_near("adapter", *whole)


@pytest.mark.parametrize(("kind", "method", "fsdp"), CASES)
def test_the_first_process_alone_speaks_and_writes(kind, method, fsdp, folder, ranks, alone):
    name = name_of(kind, method, fsdp)
    said, silent = ranks[0][name], ranks[1][name]
    assert silent.lines == []
    assert silent.record == said.record
    first_lines = [line for line in alone(kind, method).lines if not line.startswith("step ")]
    assert [line for line in said.lines if not line.startswith("step ")] == first_lines
    files = {path.relative_to(folder / f"two-{name}").as_posix() for path in (folder / f"two-{name}").rglob("*")}
    expected = folder / f"one-{name_of(kind, method)}"
    assert {file for file in files if "rng_state" not in file} == {
        path.relative_to(expected).as_posix() for path in expected.rglob("*") if "rng_state" not in path.name
    }
    assert find_foreign(folder / f"two-{name}", inside=PARTS) == []


@pytest.mark.parametrize(("kind", "batch_size"), FILLED)
def test_rows_that_fill_up_the_last_batch_do_not_count(kind, batch_size, folder, ranks):
    two = ranks[0][f"filled {kind} {batch_size}"].record
    assert two is not None, ranks[0][f"filled {kind} {batch_size}"].error
    assert two.sizes["train"] % batch_size
    assert max(point.epoch for point in two.history) > 1
    one = train(RunConfig(**{**two.config, "output": str(folder / f"one-filled-{kind}-{batch_size}")}))
    assert_near("losses", losses(two), losses(one))


def test_ranks_adapt_alike_in_both(folder, ranks):
    two = ranks[0]["adaptive"].record
    assert two is not None, ranks[0]["adaptive"].error
    one = train(config_of(folder, "encoder", "rep", "one-adaptive", **ADAPTIVE))
    assert [note for note in two.notes if "ranks adapted" in note] == [n for n in one.notes if "ranks adapted" in n]
    assert two.parameters == one.parameters
    assert_near("losses", losses(two), losses(one))


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(fsdp, folder, ranks, alone):
    expected = alone("decoder", "rep").record
    assert expected is not None
    assert ranks[0][f"begun by two {fsdp}"].error is None
    ended_by_one = train(config_of(folder, "decoder", "rep", f"begun-by-two{fsdp}"), resume=True)
    ended_by_two = ranks[0][f"begun by one {fsdp}"].record
    for record in (ended_by_one, ended_by_two):
        assert record is not None
        assert_near("losses", losses(record), losses(expected))


def test_two_processes_score_the_options_of_a_prompted_task(folder, ranks):
    two = ranks[0]["prompted"].record
    assert two is not None, ranks[0]["prompted"].error
    assert ranks[1]["prompted"].record == two
    one = train(RunConfig(**{**two.config, "output": str(folder / "one-prompted")}))
    assert_near("losses", losses(two), losses(one))
    assert two.validation == pytest.approx(one.validation, rel=1e-5)
    answers = [(folder / f"{who}-prompted" / "predictions.jsonl").read_text().splitlines() for who in ("two", "one")]
    for ours, theirs in zip(*answers, strict=True):
        assert json.loads(ours)["option"] == json.loads(theirs)["option"]


def test_a_signal_to_one_process_ends_both_behind_a_checkpoint(folder, ranks):
    first, second = (results["signal to the second"] for results in ranks)
    assert first.status == second.status == 128 + signal.SIGTERM
    assert first.error == second.error
    assert "--resume" in first.error
    (checkpoint,) = (folder / "signal" / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 3 <= step < 50
    assert is_whole(checkpoint)


def test_a_loss_of_one_process_that_is_not_finite_ends_both(folder, ranks):
    first, second = (results["not finite"] for results in ranks)
    assert first.status == second.status == 3
    assert first.error == second.error
    assert "at step 3" in first.error
    steps = {path.name for path in (folder / "broken" / "checkpoints").glob("checkpoint-*")}
    assert "checkpoint-2" in steps
    assert "checkpoint-3" not in steps


def test_both_skip_the_step_that_is_not_finite_in_one(ranks):
    first, second = (results["not finite, skipped"] for results in ranks)
    assert first.record is not None, first.error
    assert first.record == second.record
    assert [note for note in first.record.notes if "1 updates were skipped (the first at step 3)" in note]


def test_both_lose_their_patience_at_the_same_step(ranks):
    first, second = (results["patience"] for results in ranks)
    assert first.record is not None, first.error
    assert max(point.step for point in first.record.history) < 12
    assert first.record == second.record


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_processes_cannot_do_is_refused_in_all(name, folder, ranks):
    first, second = (results[name] for results in ranks)
    assert first.status == second.status == 2
    assert first.error == second.error
    assert name in first.error
    assert not (folder / f"refused {name}").exists()


@pytest.mark.parametrize(("name", "words"), [("held", "another process works in"), ("other options", "learning_rate")])
def test_what_the_first_process_finds_in_the_folder_ends_both(name, words, ranks):
    first, second = (results[name] for results in ranks)
    assert first.status == second.status == 2
    assert first.error == second.error
    assert words in first.error


def test_other_verbs_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["loretta", "compare", "--model", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "'compare' is the work of one process" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_alone_fails_speaks_later_than_the_first_would(rank, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("sys.argv", ["loretta", "compare", "--model", "x"])
    with pytest.raises(SystemExit):
        main()
    assert waits == [(10, "")] * rank, "a launcher ends it while it waits"
    assert "'compare' is the work of one process" in capsys.readouterr().err


def test_fsdp_is_for_several_processes(folder):
    with pytest.raises(InputError, match="torchrun"):
        train(config_of(folder, "encoder", "rep", "fsdp-alone", fsdp=True))


@pytest.mark.parametrize(
    ("variable", "package"), [("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_MEGATRON_LM", "megatron")]
)
def test_an_engine_that_a_launcher_asks_for_and_is_not_installed_is_named(variable, package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # also where it is installed
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"{variable} asks for the package {package}, which is not installed"):
        train(config_of(folder, "encoder", "rep", package))
    assert not (folder / package).exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch started one process"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2 of mpirun"),
    ],
)
def test_processes_that_a_launcher_has_not_counted_do_not_train(variables, words, folder, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` trained as one process, and mpirun as two runs."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{words}.*: start them with torchrun"):
        train(config_of(folder, "encoder", "rep", "uncounted"))
    assert not (folder / "uncounted").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_a_precision_of_the_launcher_is_refused(precision, folder, monkeypatch):
    """The Trainer trained in it, and the record said float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(InputError, match=f"ACCELERATE_MIXED_PRECISION={precision} of the launcher"):
        train(config_of(folder, "encoder", "rep", precision))
    assert not (folder / precision).exists()


def test_a_precision_that_the_run_has_too_is_welcome(folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_options(config_of(folder, "encoder", "rep", "both", bf16=True))


def gather_until_killed(rank: int, lost: int) -> None:
    with processes.joined(cpu=True):
        processes.gather(rank)
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            processes.gather(rank)


def lose_the_other(rank: int, port: int, lost: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(N), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    waits: list[float] = []
    processes.time.sleep = waits.append
    with pytest.raises(Stopped, match=r"another process of the run is gone.* --resume") as stopped:
        gather_until_killed(rank, lost)
    assert (stopped.value.exit_status, waits) == (70, [10] * rank)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_whose_other_one_was_killed_ends_in_one_sentence(lost):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = mp.start_processes(lose_the_other, (store.port, lost), nprocs=N, join=False, start_method="fork")
    for process in found.processes:
        process.join(20)
        process.kill()
    assert [process.exitcode for process in found.processes] == [-signal.SIGKILL if k == lost else 0 for k in range(N)]


def test_other_errors_of_several_processes_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="sizes differ"), processes.missing_others():
        raise RuntimeError("sizes differ")


def join_again_and_again(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(N), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for run in range(9):
        with processes.joined(cpu=True):
            assert processes.gather((run, rank)) == [(run, 0), (run, 1)]


def test_processes_meet_anew_for_each_of_several_runs():
    """What torchrun's store has of the first meeting led the second one or the third to addresses that are gone."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = mp.start_processes(join_again_and_again, (store.port,), nprocs=N, join=False, start_method="fork")
    for process in found.processes:
        process.join(20)
        process.kill()
    assert [process.exitcode for process in found.processes] == [0, 0], "they wait for each other"
