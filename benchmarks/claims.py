"""Several processes on a list of cells: each takes the next one that nobody has taken, until the time is over.

One process prepares the models of a cell while another one trains, so that the GPU does not wait.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from protocol import cell_of, read_rows

RESTARTS = 8  # of processes that could not use the device any more


def take(cells: Iterable[tuple[str, Callable[[], dict[str, Any]]]], queue: Path, until: float) -> None:
    """Make the rows of the cells that no other process has taken; ``until`` is the time behind which none is begun."""
    for name, make in cells:
        if time.time() > until:
            return
        try:
            (queue / f"{name}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            row = make()
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
            if "CUDA error" in str(error):
                raise  # another process takes the place of this one
            continue
        part = queue / f"{name}.part"
        part.write_text(json.dumps(row))
        part.rename(queue / f"{name}.json")


def oversee(
    words: list[str], queue: Path, out: Path, *, count: int, gpus: list[int], each: int, until: float, end: float
) -> None:
    """Run ``words`` in ``each`` processes for each GPU (none: on the CPU) and write the rows that are there.

    All processes are stopped at the time ``end``, or when this one is.
    """

    def start(number: int) -> subprocess.Popen[bytes]:
        device = {"CUDA_VISIBLE_DEVICES": str(gpus[number % len(gpus)])} if gpus else {}
        return subprocess.Popen([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1", **device})

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    known, restarts = read_rows([out]), RESTARTS
    running = [start(number) for number in range(max(1, len(gpus)) * each)]
    try:
        while time.time() < end and any(process.poll() is None for process in running):
            if time.time() < until and len(list(queue.glob("*.taken"))) < count:
                for k, process in enumerate(running):
                    if process.poll() not in (None, 0) and restarts > 0:
                        running[k], restarts = start(k), restarts - 1
            collect(known, queue, out)
            time.sleep(1)
    finally:
        for process in running:
            process.kill()
        collect(known, queue, out)


def collect(known: list[dict[str, Any]], queue: Path, out: Path) -> None:
    rows = {cell_of(row): row for row in (*known, *(json.loads(file.read_text()) for file in queue.glob("*.json")))}
    part = out.with_suffix(".part")
    part.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    part.rename(out)
