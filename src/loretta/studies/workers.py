"""Where the units of a study are carried out: in this process, or in processes of this machine."""

import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import sleep
from typing import Protocol

import torch

from loretta.studies.execution import Outcome, carry_out_together, open_log, record_failure
from loretta.studies.state import state_of
from loretta.studies.unit import Unit, UnitProcess

# libraries read these when they are loaded; Rayon runs the threads of the tokenizers
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
GPUS = "CUDA_VISIBLE_DEVICES"
POLL = 0.1  # seconds between looks at the processes


class Workers(Protocol):
    """Carry out units, and tell how they ended."""

    @property
    def size(self) -> int:
        """How many units run at once."""

    @property
    def busy(self) -> Sequence[Unit]:
        """The units that were started and have not been returned by :meth:`wait`."""

    @property
    def full(self) -> bool:
        """Whether another unit would have to wait for one that runs."""

    def start(self, unit: Unit) -> None: ...

    def wait(self) -> list[Outcome]:
        """Wait for the next units to end. Returns how each of their runs ended."""

    def close(self) -> None:
        """End the units that still run after their next checkpoint, and wait until they have ended."""


class Here:
    """One unit after the other in this process."""

    size = 1

    def __init__(self, root: Path) -> None:
        self.root = root
        self.busy: list[Unit] = []

    @property
    def full(self) -> bool:
        return bool(self.busy)

    def start(self, unit: Unit) -> None:
        self.busy.append(unit)

    def wait(self) -> list[Outcome]:
        unit = self.busy.pop()
        with open_log(self.root, unit.runs[0]) as log, redirect_stdout(log), redirect_stderr(log):
            return carry_out_together(self.root, unit.runs)

    def close(self) -> None:
        self.busy.clear()


class Processes:
    """Processes that carry out one unit after the other, on the GPUs in turn, with equal shares of the CPU's threads.

    A process in which a run failed or was reported to a service, or which died, is followed by a new one.
    """

    def __init__(self, root: Path, jobs: int) -> None:
        gpus = visible_gpus()
        self.root, self.threads = root, threads_each(jobs)
        self.free: list[tuple[str | None, UnitProcess | None]] = [
            (gpus[k % len(gpus)] if gpus else None, None) for k in range(jobs)
        ]
        self.size = jobs
        self.started: list[tuple[str | None, UnitProcess]] = []

    @property
    def busy(self) -> list[Unit]:
        return [process.unit for _, process in self.started]

    @property
    def full(self) -> bool:
        return not self.free

    def start(self, unit: Unit) -> None:
        gpu, process = self.free.pop(0)
        if process is not None and process.alive:
            process.start(unit)
        else:
            if process is not None:  # it died while it waited
                process.close()
            environment = dict.fromkeys(THREADS, str(self.threads)) | ({} if gpu is None else {GPUS: gpu})
            process = UnitProcess(self.root, unit, environment=environment)
        self.started.append((gpu, process))

    def wait(self) -> list[Outcome]:
        while not (ended := [entry for entry in self.started if entry[1].ended]):
            sleep(POLL)
        outcomes = []
        for gpu, process in ended:
            self.started.remove((gpu, process))
            outcomes += outcomes_of(self.root, process.unit, process.why_dead(), process.seconds)
            if not process.fit:
                process.close()
            # first in line: the next unit need not wait for imports
            self.free.insert(0, (gpu, process if process.fit else None))
        return outcomes

    def close(self) -> None:
        processes = [process for _, process in (*self.started, *self.free) if process is not None]
        for process in processes:
            process.end()
        for process in processes:
            process.close()
        self.started.clear()
        self.free.clear()


def outcomes_of(root: Path, unit: Unit, why_dead: str, seconds: float) -> list[Outcome]:
    """How the runs of a unit ended, by their folders, after its process ended in ``seconds``.

    A run without a result has failed: its folder gets ``why_dead``, the reason why the process died.
    """
    outcomes = []
    for run in unit.runs:
        state, reason = state_of(root, run)
        if state not in ("finished", "failed", "running"):
            state, reason = "failed", why_dead or "its process ended without a result"
            record_failure(root / run.folder, reason)
        outcomes.append(Outcome(folder=run.folder, state=state, reason=reason, seconds=seconds / len(unit.runs)))
    return outcomes


def threads_each(jobs: int) -> int:
    """Equal shares of the cores that this process may use, or of the threads that the user allows it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get(THREADS[0], "")
    return max(1, min(cores, int(allowed) if allowed.isdecimal() else cores) // jobs)


def visible_gpus() -> list[str]:
    """The GPUs that processes may take, as its variable names them."""
    given = os.environ.get(GPUS)
    if given is not None:
        return [name for name in given.split(",") if name and name != "-1"]
    return [str(k) for k in range(torch.cuda.device_count())]
