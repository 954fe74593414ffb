"""Two processes of a launcher on the CPU, and the jobs that they carry out."""

import math
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from loretta import InputError, processes
from loretta.errors import Stopped
from loretta.locks import hold
from loretta.record import RunRecord
from loretta.training import run
from loretta.training.config import RunConfig
from loretta.training.run import train, train_until

N = 2


# kind of model, method, whether FSDP2 shares the weights out
CASES = [
    *(("encoder", method, False) for method in ("rep", "adp", "shared")),
    ("decoder", "rep", False),
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
                time.sleep(600)
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
