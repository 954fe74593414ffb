"""Several processes on a list of cells: each takes the next one that nobody has taken, until the time is over.

One process prepares the models of a cell while another one trains, so that the GPU does not wait.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import cell_of, read_rows

from loretta.memory import free_memory, is_out_of_memory

RESTARTS = 8  # of processes that could not use the device any more
TRIES, REST = 4, 60.0  # of a cell that found too little memory, and the seconds before it is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One process.

    ``gpu`` is its GPU (None: the CPU), ``earlier`` how many seconds before all others it begins nothing more, and
    ``words`` are what it alone is told.
    """

    gpu: int | None = None
    earlier: float = 0.0
    words: tuple[str, ...] = ()


def take(cells: Iterable[tuple[str, Callable[[], dict[str, Any]]]], queue: Path, until: float) -> None:
    """Make the rows of the cells that no other process has taken; ``until`` is the time behind which none is begun.

    A cell is called FILE@NAME after the result file of its row.
    """
    some = list(cells)
    while True:
        for name, make in some:
            if time.time() > until:
                return
            taken(name, make, queue)
        if not given_back(queue):
            return
        time.sleep(1)


def taken(name: str, make: Callable[[], dict[str, Any]], queue: Path) -> bool:
    """Make the row of a cell, if no process has taken it; returns whether none had.

    A cell for which others leave too little memory is given back, to be taken again later.
    """
    short = queue / f"{name}.short"
    if short.exists() and time.time() - short.stat().st_mtime < REST:
        return False
    try:
        (queue / f"{name}.taken").touch(exist_ok=False)
    except FileExistsError:
        return False
    begin = time.time()
    try:
        row = make()
    except Exception as error:
        print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        if "CUDA error" in str(error):
            raise  # another process takes the place of this one
        if is_out_of_memory(error):
            with short.open("a") as tries:
                tries.write(".")
            if short.stat().st_size < TRIES:
                (queue / f"{name}.taken").unlink()
        return True
    finally:
        free_memory()  # for the others, while this process prepares its next cell
    part = queue / f"{name}.part"
    part.write_text(json.dumps(row))
    part.rename(queue / f"{name}.json")
    print(f"{time.strftime('%H:%M:%S')} {name} made in {time.time() - begin:.0f} s", flush=True)
    return True


def given_back(queue: Path) -> bool:
    """Whether a cell waits to be taken again."""
    return any(not short.with_suffix(".taken").exists() for short in queue.glob("*.short"))


def oversee(
    words: list[str], queue: Path, outs: Sequence[Path], *, workers: Sequence[Worker], count: float, until: float,
    end: float,
) -> None:  # fmt: skip
    """Run ``words`` in a process for each worker and write the rows that are there, each into the file of its name.

    All processes are stopped at the time ``end``, or when this one is. A process that died is started again while
    there are fewer than ``count`` cells taken.
    """

    def start(worker: Worker) -> subprocess.Popen[bytes]:
        device = {} if worker.gpu is None else {"CUDA_VISIBLE_DEVICES": str(worker.gpu)}
        line = [sys.executable, *words, *worker.words, "--until", str(until - worker.earlier)]
        return subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1", **device})

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    known, restarts = {out: read_rows([out]) for out in outs}, RESTARTS
    running = [start(worker) for worker in workers]
    try:
        while time.time() < end and any(process.poll() is None for process in running):
            if time.time() < until and len(list(queue.glob("*.taken"))) < count:
                for k, process in enumerate(running):
                    if process.poll() not in (None, 0) and restarts > 0:
                        running[k], restarts = start(workers[k]), restarts - 1
            collect(known, queue)
            time.sleep(1)
    finally:
        for process in running:
            process.kill()
        collect(known, queue)


def collect(known: dict[Path, list[dict[str, Any]]], queue: Path) -> None:
    """Write each result file with what was known and what has been made; of two rows of one cell the later one."""
    made = sorted(queue.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for out, before in known.items():
        mine = [json.loads(file.read_text()) for file in made if file.name.startswith(f"{out.name}@")]
        if mine or not out.exists():
            rows = {cell_of(row): row for row in (*before, *mine)}
            part = out.with_suffix(".part")
            part.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
            part.rename(out)
