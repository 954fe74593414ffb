"""The state of a run, read off its folder alone."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import psutil

from loretta.errors import InputError
from loretta.files import read_object
from loretta.locks import is_held
from loretta.record import is_started
from loretta.studies import halving
from loretta.studies.study import Planned
from loretta.training.folder import CONFIG, ERROR

State = Literal["waiting", "running", "killed", "failed", "stopped", "finished"]

# beside the files of `loretta train`
COST, COUNT, EVALUATIONS = "cost.json", "count.json", "evaluations.json"
RESULT_OF = {"train": "run.json", "cost": COST, "count": COUNT}

# endings of files beside a run's folder
HOLDER = ".holder"  # names the process that works on it
LOG = ".log"  # holds what it printed


def beside(folder: Path, ending: str) -> Path:
    """A file next to a run's folder, because the folder itself must be empty when the run starts."""
    return folder.with_name(folder.name + ending)


def state_of(root: Path, run: Planned) -> tuple[State, str]:
    """The state of a planned run, and a few words on why it is not finished."""
    if run.config is None:
        return "waiting", "its learning rate is not chosen yet"
    folder = root / run.folder
    if run.stopped:
        return "stopped", run.stopped
    state, reason = folder_state(folder, RESULT_OF[run.kind])
    if run.until is not None and state != "running" and halving.reached(folder, run.until) is not None:
        return "finished", ""
    if state == "stopped":  # by an earlier search, or one with other candidates
        return "waiting", reason
    if state == "finished" and not set(run.evaluate) <= evaluations(folder).keys():
        return "waiting", "trained, but not scored on every task of the sequence yet"
    return state, reason


def is_done(root: Path, run: Planned) -> bool:
    """Whether nothing is left to do for a run that this process holds, for which :func:`state_of` says "running"."""
    paused = run.until is not None and halving.reached(root / run.folder, run.until) is not None
    return paused or state_of(root, run)[0] == "finished"


def folder_state(folder: Path, result: str = "run.json") -> tuple[State, str]:
    """The state of the run in ``folder`` whose last file is ``result``."""
    file = folder / result
    damaged = file.is_file() and not _is_json(file, file.stat().st_mtime_ns)
    if file.is_file() and not damaged:
        return "finished", ""
    holder = held_by(folder)
    if holder is not None:
        return "running", f"in process {holder.pid} on {holder.host}"
    if is_held(folder):
        return "running", "in another process"
    if damaged:
        return "failed", f"'{result}' is damaged; the next start does the run again"
    if (folder / ERROR).is_file():
        return "failed", str(
            (read_object(folder / ERROR) or {}).get("error", f"unknown: '{folder / ERROR}' is damaged")
        )
    stopped, words = halving.words(folder)
    if words:
        return ("stopped" if stopped else "waiting"), words
    if is_started(folder):
        return "killed", "it stopped before its end; the next start goes on from its last checkpoint"
    return "waiting", "not started"


@lru_cache(maxsize=10_000)
def _is_json(file: Path, changed: int) -> bool:
    """Whether a file holds an object of JSON. ``changed``, its time in ns, lets a changed file be read again."""
    return read_object(file) is not None


def evaluations(folder: Path) -> dict[str, dict[str, float]]:
    """The scores of a finished adapter: task -> metric -> value. A damaged file counts as none."""
    return read_object(folder / EVALUATIONS) or {}


def measured(file: Path) -> dict[str, Any]:
    """The content of cost.json or count.json. Raises InputError for a damaged file."""
    content = read_object(file) or {}
    if not {"notes", "parameters", "bytes"} <= content.keys():
        raise InputError(f"'{file}' is damaged: remove it to do the run again")
    return content


def result_of(folder: Path) -> str:
    """The name of the file that a run of any kind writes last."""
    return next((name for name in RESULT_OF.values() if (folder / name).is_file()), "run.json")


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that works on a run."""

    pid: int
    host: str


def held_by(folder: Path) -> Holder | None:
    """The process that works on a run; None where there is none, or it died. One on another host counts as alive."""
    try:
        content = read_object(beside(folder, HOLDER)) or {}
        holder = Holder(pid=int(content["pid"]), host=str(content["host"]))
        lives = holder.host != socket.gethostname() or psutil.pid_exists(holder.pid)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return holder if holder.pid > 0 and lives else None


def find_runs(root: Path) -> Iterator[tuple[Path, State, str]]:
    """Every run of any kind that was started below ``root``, with its state and why, in the order of paths."""
    marks = {*RESULT_OF.values(), CONFIG, ERROR}
    folders = {file.parent for mark in marks for file in root.rglob(mark) if mark != CONFIG or is_started(file.parent)}
    folders |= {file.with_suffix("") for file in root.rglob(f"*{HOLDER}") if held_by(file.with_suffix(""))}
    # checkpoints and adapters inside a run have config files too
    for folder in sorted(folders):
        if "checkpoints" in folder.parts or folder.name == "adapter":
            continue
        yield folder, *folder_state(folder, result_of(folder))
