"""The units of a study on a Ray cluster: the same processes, on the machines that Ray finds for them.

All machines must see the same working folder, folder of runs and installation of the package. When a machine is lost,
Ray starts its units on another one, where they go on from their last checkpoints.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Any

from loretta.errors import InputError
from loretta.studies.execution import Outcome, hold
from loretta.studies.unit import GRACE, Unit, UnitProcess
from loretta.studies.workers import POLL, outcomes_of
from loretta.wording import one_line

RETRIES = 3  # of a unit whose machine is lost
CPUS = 1  # of each unit


def carry_out_here(root: str, working: str, unit: str) -> tuple[str, float]:
    """Carry out a unit on the machine on which Ray calls this. Returns why its process died ("") and its seconds.

    Raises InputError where the machine does not see the folders.
    """
    folder = Path(working, root)
    if not folder.is_dir():
        raise InputError(
            f"the machine '{socket.gethostname()}' does not see '{folder}': give an --output in a folder that all "
            "machines of the cluster share, and start from a shared folder too"
        )
    os.chdir(working)
    process = UnitProcess(Path(root), Unit.model_validate_json(unit), environment={}, working=working)
    try:
        while not process.ended:  # not wait(): Ray interrupts a cancelled task only between two lines of Python
            sleep(POLL)
        return process.why_dead(), process.seconds
    finally:
        process.end()
        process.close()


class RayWorkers:
    """A task of Ray for each unit, which takes so many GPUs, also a fraction; None: one where the cluster has any.

    Raises InputError without Ray, without a cluster, and for GPUs that it does not have.
    """

    full = False  # Ray queues the units that have to wait

    def __init__(self, root: Path, address: str, *, gpus: float | None) -> None:
        try:
            import ray
        except ImportError:
            raise InputError(f"--ray {address} needs the package ray: pip install 'loretta-peft[ray]'") from None
        self.ray: Any = ray
        self.connected = not ray.is_initialized()
        if self.connected:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="warning")
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = one_line(error, 160)
                raise InputError(
                    f"--ray {address} finds no cluster ({reason}): start one with `ray start --head`, or give its "
                    "address"
                ) from None
        there = ray.cluster_resources()
        self.gpus = gpus if gpus is not None else float("GPU" in there)
        if self.gpus > there.get("GPU", 0.0):
            self.close()
            raise InputError(f"--ray-gpus {self.gpus:g}: the cluster has {there.get('GPU', 0):g} GPUs: give fewer")
        self.root, self.tasks = root, dict[Any, Unit]()
        self.task = ray.remote(num_cpus=CPUS, num_gpus=self.gpus, max_retries=RETRIES)(carry_out_here)

    @property
    def size(self) -> int:
        there = self.ray.cluster_resources()
        room = there.get("CPU", 0.0) / CPUS
        return max(1, int(min(room, there.get("GPU", 0.0) / self.gpus) if self.gpus else room))

    @property
    def busy(self) -> Sequence[Unit]:
        return list(self.tasks.values())

    def start(self, unit: Unit) -> None:
        # the locks of a lost machine become free only after a while
        waiting = unit.model_copy(update={"wait": 2 * GRACE})
        self.tasks[self.task.remote(str(self.root), os.getcwd(), waiting.model_dump_json())] = unit

    def wait(self) -> list[Outcome]:
        ended, _ = self.ray.wait(list(self.tasks), num_returns=1)
        unit = self.tasks.pop(ended[0])
        try:
            why_dead, seconds = self.ray.get(ended[0])
        except self.ray.exceptions.RayTaskError as error:
            why_dead, seconds = one_line(error.cause), 0.0
        except self.ray.exceptions.RayError as error:
            why_dead, seconds = f"its machine was lost {RETRIES + 1} times: {one_line(error, 160)}", 0.0
            for run in unit.runs:
                with hold(self.root / run.folder):  # removes the note of the holder that is gone
                    pass
        return outcomes_of(self.root, unit, why_dead, seconds)

    def close(self) -> None:
        tasks = list(getattr(self, "tasks", {}))
        for task in tasks:
            self.ray.cancel(task)  # interrupts the task, which then ends its process
        if tasks:
            _, left = self.ray.wait(tasks, num_returns=len(tasks), timeout=2 * GRACE)
            for task in left:
                self.ray.cancel(task, force=True)
            self.tasks.clear()
        if self.connected:
            self.ray.shutdown()
