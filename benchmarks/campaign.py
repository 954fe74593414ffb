"""A list of measurements in the order of their value, for as long as a machine is there.

    python benchmarks/campaign.py --models FOLDER --data-dir FOLDER --gpus 0:8 1:4:900 --seconds 1200 --grace 200

``--gpus 0:8 0:2::light 1:4:900`` are 10 processes on the first GPU, and 4 on the second one, which stop 900 seconds
earlier. Each takes the first cell of campaign.toml that nobody has taken and whose model is there: a folder of its name
in ``--models``, which may come later. Two of them take those of the lane "light" first. A row is written into its file
in benchmarks/results/ as soon as it is made, and what is there already is not run again.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import adaptive
import answers
import forgetting
import forms
import instruct
from cells import cells_beyond, cells_of, joined, left
from claims import Worker, given_back, oversee, taken
from encoders import graphable, plain_functions
from protocol import cell_of, read_rows
from tables import RESULTS

PLAN = Path(__file__).with_suffix(".toml")
Job = tuple[str, Callable[[], dict[str, Any]], float]  # its name, what makes its row, and the seconds that it needs


def planned(plan: Path = PLAN) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(plan.read_text())["jobs"]
    return found


def jobs_of(entry: dict[str, Any], args: argparse.Namespace, made: "Made") -> Iterator[Job]:
    """What an entry of the plan wants and no file has: names FILE@NAME, what makes the row, and how long that takes."""
    out, model = entry["out"], Path(args.models) / entry["model"]
    known = [row for row in made.rows(out) if row["model"] == entry["model"]]
    options = argparse.Namespace(
        model=model, data_dir=args.data_dir, max_steps=args.max_steps, limit=args.limit, cpu=args.cpu,
        seeds=entry.get("seeds", 5), rates=entry.get("rates", 3),
        epochs=entry.get("epochs"), tasks=entry.get("tasks", []), methods=entry.get("methods", []),
        cycles=entry.get("cycles", False),
    )  # fmt: skip
    data = args.queue / "data" / entry["model"]
    kind = entry.get("kind", "forms")
    needs, of_tasks = entry.get("needs", 0), entry.get("needs_of", {})
    found: list[Any]
    if kind == "adaptive":
        found = adaptive.jobs(options, known, partial(_split, data, options))
    elif kind == "instruct":
        found = instruct.jobs(options, known, data)
    elif kind == "answers":
        found = answers.jobs(options, known)
    elif kind == "forgetting":
        found = forgetting.jobs(options, known, partial(_split, data, options))
    else:
        wanted = cells_of(entry["order"], options, known)
        names = {(cell.part, cell.task, cell.method) for cell in wanted}
        if kind == "beyond":
            some = [row for row in known if (row["part"], row["task"], row["method"]) in names]
            cells = cells_beyond(some, options.seeds)
        else:
            cells = left(wanted, entry["model"], known)
        found = [
            (cell.file, partial(_measure, cell, options, data, known), of_tasks.get(cell.task, needs)) for cell in cells
        ]
    for name, make, *seconds in found:
        yield f"{out}@{entry['model'][:10]}-{name}", make, *(seconds or [needs])


def _measure(cell: Any, options: argparse.Namespace, data: Path, known: list[dict[str, Any]]) -> dict[str, Any]:
    _split(data, options, cell.task)
    return joined(known, partial(forms.measure, cell, options, data))


def _split(data: Path, options: argparse.Namespace, task: str) -> Path:
    """The folder of a task's own split, written by the first process that needs it."""
    if not (data / task).exists():
        data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data) as folder:
            forms.write_split(task, options.model, options.data_dir, Path(folder))
            try:
                (Path(folder) / task).rename(data / task)
            except OSError:  # another process was first
                assert (data / task).exists()
    return data


class Made:
    """The rows of the result files in ``before``, and those that were made in a queue since."""

    def __init__(self, queue: Path, before: Path | None = None) -> None:
        self.queue, self.before = queue, before or queue / "before"

    def rows(self, out: str) -> list[dict[str, Any]]:
        made = sorted(self.queue.glob(f"{out}@*.json"), key=lambda file: file.stat().st_mtime)
        since = {cell_of(row): row for row in (json.loads(file.read_text()) for file in made)}
        before = {cell_of(row): row for row in read_rows([self.before / out])}
        return list((before | since).values())


def work(entries: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Take one cell after the other, always the most valuable one that is left, and can be done in the time."""
    made = Made(args.queue)
    entries = sorted(entries, key=lambda entry: entry.get("lane", "") != args.lane)
    while time.time() < args.until:
        ready = [entry for entry in entries if (args.models / entry["model"] / "config.json").exists()]
        end = args.until + args.grace
        for name, make, needs in (job for entry in ready for job in jobs_of(entry, args, made)):
            if time.time() <= end - needs and taken(name, make, args.queue):
                break
        else:
            if len(ready) == len(entries) and not given_back(args.queue):
                return
            time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--gpus", nargs="+", default=["0:4"], help="GPU:PROCESSES[:SECONDS-EARLIER[:LANE]]")
    parser.add_argument("--cpu", action="store_true", help="with as many processes as all GPUs would have")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cell after that time")
    parser.add_argument("--grace", type=float, default=1e9, help="seconds that begun cells then have")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--plain", action="store_true", help="populations use torch's functions and no kernels of ours")
    parser.add_argument("--only", help="what belongs into the result file of that name")
    parser.add_argument("--list", action="store_true", help="what would be run, and nothing more")
    parser.add_argument("--queue", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--lane", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    entries = [entry for entry in planned(args.plan) if args.only in (None, entry["out"])]
    if args.queue is not None:
        with graphable(), plain_functions() if args.plain else contextlib.nullcontext():
            work(entries, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.queue = Path(folder)
        outs = list(dict.fromkeys(args.results / entry["out"] for entry in entries))
        (args.queue / "before").mkdir()
        for out in outs:
            if out.exists():
                (args.queue / "before" / out.name).write_text(out.read_text())
        if args.list:
            for entry in entries:
                names = [name for name, *_ in jobs_of(entry, args, Made(args.queue))]
                print(f"{len(names):3} {', '.join(name.partition('@')[2] for name in names)}")
            return
        workers = []
        for word in args.gpus:
            gpu, processes, earlier, lane = [*word.split(":"), "", ""][:4]
            worker = Worker(gpu=None if args.cpu else int(gpu), earlier=float(earlier or 0), words=("--lane", lane))
            workers += [worker] * int(processes)
        until = time.time() + args.seconds
        words = [*sys.argv, "--queue", folder]
        oversee(words, args.queue, outs, workers=workers, count=float("inf"), until=until, end=until + args.grace)


if __name__ == "__main__":
    main()
