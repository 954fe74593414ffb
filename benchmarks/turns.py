"""Training steps of many cells, each method in a process of its own: they build together, then take turns.

A compiled step takes half a minute to build and some milliseconds to run, and an eager one waits for a CPU whose speed
moves. So the processes of a cell, or of a few cells, build and warm up together; when all are ready one works at a time
while the others sleep, and the methods follow each other in several rounds, whose times are put together. Then these
processes end, and those of the next cells begin. The rows are those of speed.py.

Processes differ, and stay different: so a run has processes of its own, and --runs of them take turns. With --again the
medians of a cell's earlier runs stay beside the new ones in its file. From these targets.py tells how far to trust a
ratio.

With --before a folder of earlier code, "rep q,v before" is a method of that code, in turns with those of today's.
"bound" adds a trained vector to each output that adp adapts, and nothing else.

A cell is MODE:SHAPE:BATCHxTOKENS, with :LAYERS behind it where the model is to be cut.

    python benchmarks/turns.py --cells eager:minilm:16x64 compile:roberta-base:16x128:4 --out-dir benchmarks/results
    python benchmarks/turns.py --cells eager:tiny:1x16 --device cpu --dtype float32 --out-dir /tmp/turns
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import SHAPES, build_base, inputs, wrap
from speed import COMPILED, FLOOR, step_of
from timing import about, captured, kernels, timed
from torch._dynamo.utils import counters

METHODS = ("lora q,v", "rep q,v", "adp")
BEFORE = " before"  # behind the name of a method: with the code of --before
SECONDS = 20  # to answer for a turn

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    mode: str
    shape: str
    batch: int
    tokens: int
    layers: int | None

    @classmethod
    def named(cls, name: str) -> "Cell":
        mode, shape, size, *layers = name.split(":")
        batch, tokens = map(int, size.split("x"))
        return cls(mode, shape, batch, tokens, int(layers[0]) if layers else None)

    @property
    def file(self) -> str:
        """One file for a model of one depth in one mode."""
        depth = f"_{self.layers}" if self.layers else ""
        return f"speed_{self.shape}_{self.mode.replace('reduce-', '')}{depth}.json"


def work(cell: Cell, method: str, args: argparse.Namespace) -> None:
    """In a process of its own: build the step, say that it is ready, and time it for each line that comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    begin = time.perf_counter()
    base = build_base(cell.shape, device=args.device, dtype=getattr(torch, args.dtype), layers=cell.layers)
    weights = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    model = base if method == FLOOR else wrap(base, method.removesuffix(BEFORE), cell.shape)
    call = torch.compile(model, dynamic=False, mode=COMPILED[cell.mode]) if cell.mode in COMPILED else model
    step, trained = step_of(model, inputs(base, cell.batch, cell.tokens), call)
    run = captured(step) if cell.mode == "graph" else step
    timed(run, 2, args.device)

    def answer(content: Row) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({
        "layers": base.config.num_hidden_layers,
        "trained": sum(parameter.numel() for parameter in trained),
        "setup_s": time.perf_counter() - begin,
        "peak_gib": (torch.cuda.max_memory_allocated() - weights) / 2**30 if args.device == "cuda" else None,
        "graphs": counters["stats"]["unique_graphs"],
    })  # fmt: skip
    for line in sys.stdin:
        if line.strip() == "kernels":
            answer(kernels(run) if args.device == "cuda" else {})
        else:
            answer({"times": timed(run, int(line), args.device)})


class Worker:
    """A process that works at one method of one cell."""

    def __init__(self, cell: Cell, name: str, method: str, run: int, args: argparse.Namespace) -> None:
        self.cell, self.name, self.method, self.run, self.times = cell, name, method, run, list[float]()
        self.row: Row | None = None
        words = ["--cells", name, "--methods", method.replace("q,v", "q+v"), "--device", args.device]
        words += ["--dtype", args.dtype, "--out-dir", str(args.out_dir), "--works"]
        environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(args.compile_threads)}
        if method.endswith(BEFORE):
            environment["PYTHONPATH"] = f"{args.before / 'src'}:{os.environ.get('PYTHONPATH', '')}"
        self.log = (args.out_dir / f"{name.replace(':', '-')}-{method.replace(' ', '-')}-{run}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **environment},
        )

    def read(self, seconds: float) -> Row | None:
        """What the process says next; None after these seconds, and once it has ended."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, seconds))
        line = self.process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def ask(self, what: str) -> Row | None:
        assert self.process.stdin is not None
        try:
            print(what, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.read(SECONDS)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def wait_for(workers: list[Worker], until: float) -> None:
    """Until all are ready, have failed, or the time is over; the others are ended, for they would disturb."""
    while any(worker.row is None for worker in workers) and time.monotonic() < until:
        waiting = {worker.process.stdout: worker for worker in workers if worker.row is None}
        for stream in select.select(list(waiting), [], [], 1.0)[0]:
            worker = waiting[stream]
            worker.row = worker.read(0)
            if worker.row is None:
                print(f"{worker.name} {worker.method}: failed, see {worker.log.name}", flush=True)
                workers.remove(worker)
                worker.end()
            else:
                print(f"{worker.name} {worker.method}: ready after {worker.row['setup_s']:.0f} s", flush=True)
    for worker in [worker for worker in workers if worker.row is None]:
        print(f"{worker.name} {worker.method}: not measured, it was not ready in time", flush=True)
        workers.remove(worker)
        worker.end()


def take_turns(workers: list[Worker], args: argparse.Namespace) -> None:
    """Time the methods of a cell after each other, ``args.rounds`` times."""
    for number in range(args.rounds):
        for worker in workers[:: -1 if number % 2 else 1]:
            found = worker.ask(str(args.steps))
            if found is not None:
                worker.times += found["times"]


def rows_of(workers: list[Worker]) -> list[Row]:
    """Of each method what its last run measured, with the medians of all runs."""
    medians = {(w.method, w.run): statistics.median(w.times) for w in workers if w.times}
    last = {worker.method: worker for worker in workers if worker.times}
    runs = max((worker.run for worker in workers), default=0) + 1
    rows: list[Row] = []
    for method, worker in last.items():
        cell, ms = worker.cell, medians[method, worker.run]
        row = {"method": method, "mode": cell.mode, "batch": cell.batch, "tokens": cell.tokens, "ms": ms}
        row |= {"min": min(worker.times), "max": max(worker.times), **(worker.row or {})}
        row |= {"runs": [medians.get((method, run)) for run in range(runs)]}
        rows.append({**row, "ratio": ms / medians[FLOOR, last[FLOOR].run] if FLOOR in last else None})
    return rows


def write(cell: Cell, rows: list[Row], args: argparse.Namespace) -> None:
    """Into the file of the cell, in which rows of the same size are replaced."""
    path = args.out_dir / cell.file
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    size = cell.batch, cell.tokens
    head = {"shape": cell.shape, "layers": rows[0]["layers"], "steps": args.steps, "rounds": args.rounds}
    kept = [row for row in known if (row["batch"], row["tokens"]) != size]
    earlier = {row["method"]: row.get("runs", [row["ms"]]) for row in known if row not in kept} if args.again else {}
    none = [None] * max(map(len, earlier.values()), default=0)
    for row in rows:
        row["runs"] = [*earlier.get(row["method"], none), *row["runs"]]
    content = {**head, **about(args.device, args.dtype), "rows": kept + rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(
            f"{cell.mode:8} {cell.shape} {row['layers']} layers {row['batch']}x{row['tokens']} {row['method']:9} "
            f"{row['ms']:8.2f} ms [{row['min']:.2f}, {row['max']:.2f}] x{row['ratio'] or 0:.3f} "
            f"{row.get('kernels')} kernels {row.get('gpu_ms') or 0:.2f} ms, {row['graphs']} graphs",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", required=True, help="MODE:SHAPE:BATCHxTOKENS[:LAYERS]")
    parser.add_argument("--methods", default=",".join(METHODS).replace("q,v", "q+v"), help="besides the floor")
    parser.add_argument("--steps", type=int, default=15, help="of each turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1, help="processes of each method")
    parser.add_argument("--wait", type=float, default=240, help="seconds in which those have to be ready")
    parser.add_argument("--again", action="store_true", help="Keep the medians of earlier runs of the same code.")
    parser.add_argument("--before", type=Path, help="a folder with src/ of earlier code")
    parser.add_argument("--after", type=Path, help="a file: nothing is timed before it is there")
    parser.add_argument("--at-once", type=int, default=1, help="cells whose processes live at the same time")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further cells are begun")
    parser.add_argument("--compile-threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out-dir", type=Path, required=True)
    parser.add_argument("--works", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cells = {name: Cell.named(name) for name in args.cells}
    assert all(cell.shape in SHAPES for cell in cells.values())
    methods = [name.replace("q+v", "q,v") for name in args.methods.split(",")]
    if args.works:
        work(cells[args.cells[0]], methods[0], args)
        return
    args.out_dir.mkdir(parents=True, exist_ok=True)
    end, names = time.monotonic() + args.budget, list(cells)
    for first in range(0, len(names), args.at_once):
        together = names[first : first + args.at_once]
        if time.monotonic() > end:
            print(f"not measured, the budget is spent: {', '.join(names[first:])}", flush=True)
            break
        until = time.monotonic() + args.wait
        of_run = [(name, method) for name in together for method in [FLOOR, *methods]]
        workers = [Worker(cells[name], name, method, run, args) for run in range(args.runs) for name, method in of_run]
        try:
            wait_for(workers, until)
            while args.after is not None and not args.after.exists():
                time.sleep(0.2)
            for name in together:
                of_cell = [worker for worker in workers if worker.name == name]
                take_turns(of_cell, args)
                for worker in of_cell:
                    worker.row = {**(worker.row or {}), **(worker.ask("kernels") or {})}
                if rows := rows_of(of_cell):
                    write(cells[name], rows, args)
        finally:
            for worker in workers:
                worker.end()


if __name__ == "__main__":
    main()
