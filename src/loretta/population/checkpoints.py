"""Checkpoints of a population: one file in the folder of each member.

A file holds one member alone, so after a kill the unfinished runs may go on in a population of other size.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loretta.errors import InputError
from loretta.folders import set_aside, stopping_if_not_written, temporary_folder
from loretta.owned import find_foreign, forget, publish
from loretta.population.loop import Loop
from loretta.training.checkpoints import GO_ON
from loretta.training.folder import CHECKPOINTS

logger = logging.getLogger(__name__)
T = TypeVar("T")

EVERY = 30.0  # least seconds of training between two checkpoints, of which each takes part of a second
KEPT = 2
WRITERS = 16  # threads, which mostly wait for the disk
RANDOM, RANDOM_CUDA = "random", "random_cuda"
# of each member's Trainer
OF_STATE = ("global_step", "epoch", "best_metric", "best_global_step", "log_history", "stateful_callbacks")


class Checkpoints:
    """Called after each evaluation; saves where the last checkpoint is ``every`` seconds old."""

    def __init__(self, every: float = EVERY) -> None:
        self.every, self.last = every, time.monotonic()

    def __call__(self, loop: Loop) -> None:
        if time.monotonic() - self.last >= self.every and loop.step < loop.rules.steps:
            save(loop)
            self.last = time.monotonic()


def has_checkpoint(folder: Path) -> bool:
    """Whether the run in a folder goes on as a member of a population."""
    return bool(_files(folder))


def _files(folder: Path) -> dict[int, Path]:
    """The checkpoints in the folder of a run by their steps, the last one last."""
    found = (folder / CHECKPOINTS).glob("population-*.safetensors")
    return dict(sorted((int(file.stem.rpartition("-")[2]), file) for file in found))


def save(loop: Loop) -> None:
    """Write the state of each member; older files go when all have the new one. Raises Stopped for a full disk."""
    random = {RANDOM: torch.get_rng_state()}  # what dropout draws from, for all members at once
    if loop.device.type == "cuda":
        random[RANDOM_CUDA] = torch.cuda.get_rng_state(loop.device)
        torch.cuda.synchronize(loop.device)  # a thread copies on another stream, which would not wait for this one

    def write(k: int) -> None:
        member = loop.members[k]
        words = {
            "logged": loop.logged,
            "seconds": loop.seconds,
            "stopped": loop.stopped[k],
            "not_finite": loop.not_finite.get(k),
            "together": len(loop.members),
            **{name: getattr(member.trainer.state, name) for name in OF_STATE},
        }
        tensors = {name: tensor[k].detach().cpu().contiguous() for name, tensor in loop.tensors().items()}
        _write(member.config.folder / CHECKPOINTS / f"population-{loop.step}.safetensors", tensors | random, words)

    for_all(write, range(len(loop.members)))
    for member in loop.members:
        for file in list(_files(member.config.folder).values())[:-KEPT]:
            forget(file)


def for_all(work: Callable[[T], Any], each: Iterable[T]) -> None:
    """Write to the folders of several members at once: a disk takes many files as fast as one."""
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(work, each))


def _write(file: Path, tensors: dict[str, Tensor], words: dict[str, Any]) -> None:
    with stopping_if_not_written(f"the checkpoint '{file}'", GO_ON):
        file.parent.mkdir(exist_ok=True)
        with temporary_folder(file.parent) as new:
            save_file(tensors, new / file.name, metadata={"state": json.dumps(words)})
            publish(new, file.parent, last=file.name, keep=True)


def restore(loop: Loop) -> None:
    """Bring a new loop to the last step of which all members have a file; without one nothing happens.

    Files that somebody has changed are set aside under another name.
    """
    found = [_files(member.config.folder) for member in loop.members]
    for step in sorted(set.intersection(*map(set, found)), reverse=True):
        files = [of_member[step] for of_member in found]
        damaged = [file for file in files if find_foreign(file)]
        if not damaged:
            _load(loop, files)
            loop.step = step
            loop.optimizer.steps.fill_(step)
            return
        for file in damaged:
            logger.warning("'%s' is damaged: set aside as '%s'", file, set_aside(file).name)


def _load(loop: Loop, files: Sequence[Path]) -> None:
    read = []
    for file in files:
        with safe_open(file, framework="pt") as content:
            words = json.loads(content.metadata()["state"])
            read.append((words, {name: content.get_tensor(name) for name in content.keys()}))  # noqa: SIM118
    for name, tensor in loop.tensors().items():
        for k, (_, tensors) in enumerate(read):
            if tensors[name].shape != tensor[k].shape:
                raise InputError(f"'{files[k]}' is of another adapter: remove it")
            tensor[k].copy_(tensors[name])
    # in a population of another size each member draws other numbers anyway
    if {words["together"] for words, _ in read} == {len(loop.members)}:
        torch.set_rng_state(read[0][1][RANDOM])
        if loop.device.type == "cuda" and RANDOM_CUDA in read[0][1]:
            torch.cuda.set_rng_state(read[0][1][RANDOM_CUDA], loop.device)
    for k, (member, (words, _)) in enumerate(zip(loop.members, read, strict=True)):
        loop.logged, loop.seconds, loop.stopped[k] = words["logged"], words["seconds"], words["stopped"]
        if words["not_finite"] is not None:
            loop.not_finite[k] = words["not_finite"]
        for name in OF_STATE:
            setattr(member.trainer.state, name, words[name])


def remove_files(folder: Path) -> None:
    """Forget the checkpoints in the folder of a run."""
    for file in _files(folder).values():
        forget(file)
    with suppress(OSError):  # it has other files in it, or was never made
        (folder / CHECKPOINTS).rmdir()
