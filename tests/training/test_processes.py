"""Two processes of a launcher train one model: as one process does, written once, and ended together.

The processes are forked, so that none has to import torch, and do all their runs one after the other.
"""

import csv
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_models import save_bert, save_llama
from tolerances import assert_near
from training_data import sentences
from transformers import TrainerCallback

from loretta import InputError, processes
from loretta.cli.main import main
from loretta.errors import Stopped
from loretta.locks import hold
from loretta.owned import PARTS, find_foreign, is_whole
from loretta.record import RunRecord
from loretta.training import run
from loretta.training.config import RunConfig
from loretta.training.run import train, train_until

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and dist.is_gloo_available()), reason="needs fork and a torch that was built with gloo"
)

N = 2
# kind of model, method, whether FSDP2 shares the weights out
CASES = [
    *(("encoder", method, False) for method in ("rep", "adp", "shared", "lora")),
    *(("decoder", method, False) for method in ("rep", "shared")),
    ("encoder", "adp", True),
    *(("decoder", method, True) for method in ("rep", "lora")),
]


def config_of(folder: Path, kind: str, method: str, output: str, **options: Any) -> RunConfig:
    data = {
        "model": str(folder / kind),
        "data": str(folder / "train.csv"),
        "validation": str(folder / "validation.csv"),
    }
    if kind == "encoder":
        data |= {"text": "text", "label": "label"}
    else:
        data |= {"text": "text", "kind": "language_modeling", "max_length": 8}
    return RunConfig(
        **{
            **data,
            "method": method,
            "output": str(folder / output),
            "cpu": True,
            "max_steps": 4,
            "eval_steps": 2,
            "batch_size": 4,
            "eval_batch_size": 8,
            "logging_steps": 1,
            "learning_rate": 0.01,
            **options,
        }
    )


def name_of(kind: str, method: str, fsdp: bool = False) -> str:
    return f"{kind}-{method}{'-fsdp' if fsdp else ''}"


class Ended(NamedTuple):
    """How a run came to its end in one process: its record, or the error in words, and what it printed."""

    record: RunRecord | None
    error: str | None
    status: int | None
    lines: list[str]


def ended(run: Callable[..., RunRecord]) -> Ended:
    lines: list[str] = []
    try:
        return Ended(run(say=lines.append), None, None, lines)
    except InputError as error:
        return Ended(None, str(error), 2, lines)
    except Stopped as error:
        return Ended(None, str(error), error.exit_status, lines)


def sharding_on_cpus(patch: pytest.MonkeyPatch) -> None:
    """Accelerate shards on accelerators alone: let it take these processes for some."""
    prepare = PartialState._prepare_backend

    def backend(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        name, kind = prepare(*args, **kwargs)
        return name, DistributedType.MULTI_GPU if processes.is_sharded() else kind

    patch.setattr(PartialState, "_prepare_backend", backend)
    patch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))


def jobs(folder: Path) -> dict[str, Callable[..., RunRecord]]:
    """What two processes do, in this order, by name."""
    found: dict[str, Any] = {}
    for kind, method, fsdp in CASES:
        config = config_of(folder, kind, method, f"two-{name_of(kind, method, fsdp)}", fsdp=fsdp)
        found[name_of(kind, method, fsdp)] = partial(train, config)
    for kind, batch_size in FILLED:
        config = config_of(folder, kind, "rep", f"two-filled-{kind}-{batch_size}", batch_size=batch_size)
        found[f"filled {kind} {batch_size}"] = partial(train, config)
    found["adaptive"] = partial(train, config_of(folder, "encoder", "rep", "two-adaptive", **ADAPTIVE))
    for fsdp in (False, True):
        # begun by two and ended by one, and the other way round
        config = config_of(folder, "decoder", "rep", f"begun-by-two{fsdp}", fsdp=fsdp)
        found[f"begun by two {fsdp}"] = partial(paused, config)
        found[f"begun by one {fsdp}"] = partial(
            train, config_of(folder, "decoder", "rep", f"begun-by-one{fsdp}", fsdp=fsdp), resume=True
        )
    prompted = RunConfig(
        model=str(folder / "decoder"),
        data="copa",
        data_dir=str(folder / "prompted"),
        method="rep",
        output=str(folder / "two-prompted"),
        cpu=True,
        max_steps=2,
        batch_size=4,
        eval_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
    )
    found["prompted"] = partial(train, prompted)
    stop = {"max_steps": 50, "eval_steps": 50}
    found["signal to the second"] = partial(
        signalled, config_of(folder, "encoder", "rep", "signal", **stop), on_rank=1, step=3
    )
    found["not finite"] = partial(
        broken, config_of(folder, "encoder", "rep", "broken", max_steps=8, eval_steps=1), on_rank=1
    )
    found["not finite, skipped"] = partial(
        broken, config_of(folder, "encoder", "rep", "skipped", on_nan="skip", logging_steps=4), on_rank=1
    )
    found["patience"] = partial(
        train,
        config_of(folder, "encoder", "rep", "patience", learning_rate=1e-9, eval_steps=1, max_steps=12, patience=2),
    )
    for name, options in REFUSED.items():
        found[name] = partial(
            train, config_of(folder, "encoder", **{"method": "rep", "output": f"refused {name}", **options})
        )
    found["held"] = partial(held, config_of(folder, "encoder", "rep", "held"))
    found["other options"] = partial(
        train, config_of(folder, "encoder", "rep", "two-encoder-rep", learning_rate=0.5), resume=True
    )
    return found


# batches that do not divide the rows: of the last one both have some, or the first one alone
FILLED = [("encoder", 18), ("encoder", 20), ("decoder", 20)]
ADAPTIVE: dict[str, Any] = {
    "method_args": {"budget": "1800", "adaptive_ranks": True},
    "max_steps": 20,
    "eval_steps": 10,
}
# what several processes cannot do, and a word of the sentence that says so
REFUSED: dict[str, dict[str, Any]] = {
    "auto_batch": {"auto_batch": True},
    "batch_size": {"batch_size": 3, "accumulate": 5},
    "shared": {"method": "shared", "fsdp": True},
    "rollback": {"on_nan": "rollback", "fsdp": True},
    "ft": {"method": "ft", "fsdp": True},
    "adaptive_ranks": {"method_args": {"budget": "1k", "adaptive_ranks": True}, "fsdp": True},
}


def paused(config: RunConfig, say: Callable[[str], None]) -> Any:
    return train_until(config, 0.5)


def held(config: RunConfig, say: Callable[[str], None]) -> RunRecord:
    """A run in a folder where a third process is."""
    if processes.is_first():
        config.folder.mkdir()
        holder = os.fork()
        if holder == 0:
            with hold(config.folder):
                (config.folder / "ready").touch()
                time.sleep(120)
            os._exit(0)
        while not (config.folder / "ready").exists():
            time.sleep(0.01)
    processes.gather(None)
    try:
        return train(config, say=say)
    finally:
        if processes.is_first():
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)


class OnStep(TrainerCallback):
    def __init__(self, call: Callable[[Any, int], None]) -> None:
        self.call = call

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call(kwargs["model"], state.global_step + 1)


def watched(config: RunConfig, say: Callable[[str], None], call: Callable[[Any, int], None]) -> RunRecord:
    """A run in which ``call`` is made before each step, with the model and the step's number."""
    make = run.make_trainer

    def with_callback(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(OnStep(call))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_trainer", with_callback)
        return train(config, say=say)


def signalled(config: RunConfig, say: Callable[[str], None], on_rank: int, step: int) -> RunRecord:
    def kill(model: Any, now: int) -> None:
        if processes.rank() == on_rank and now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return watched(config, say, kill)


def broken(config: RunConfig, say: Callable[[str], None], on_rank: int) -> RunRecord:
    """The rows that one process sees in its third step give no loss."""

    def infect(model: Any, now: int) -> None:
        if now == 3 and processes.rank() == on_rank:
            layer = model.get_base_model().bert.encoder.layer[0].output.dense
            handle = layer.register_forward_hook(lambda module, args, output: (handle.remove(), output * math.nan)[1])

    return watched(config, say, infect)


def on_one_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N), "LOCAL_WORLD_SIZE": str(N)}
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=N)
    with pytest.MonkeyPatch.context() as patch:
        sharding_on_cpus(patch)
        results = {name: ended(job) for name, job in jobs(Path(folder)).items()}
    torch.save(results, f"{folder}/rank{rank}.pt")


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


def test_fsdp_is_for_several_processes(folder):
    with pytest.raises(InputError, match="torchrun"):
        train(config_of(folder, "encoder", "rep", "fsdp-alone", fsdp=True))
