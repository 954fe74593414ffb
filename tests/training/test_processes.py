"""Two processes of a launcher train one model: as one process does, written once, and ended together.

The processes are forked, so that none has to import torch, and do all their runs one after the other.
"""

import csv
import json
import os
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

from loretta import InputError, processes
from loretta.errors import Stopped
from loretta.owned import PARTS, find_foreign
from loretta.record import RunRecord
from loretta.training.config import RunConfig
from loretta.training.run import train

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
    return found


def on_one_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N), "LOCAL_WORLD_SIZE": str(N)}
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=N)
    with pytest.MonkeyPatch.context() as patch:
        sharding_on_cpus(patch)
        results = {name: ended(job) for name, job in jobs(Path(folder)).items()}
    torch.save(results, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
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
