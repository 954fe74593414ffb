"""What is measured: a cell is one method on one task, a population of all its rates and seeds."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from groups import GROUPS
from methods import FAST_CORES, METHODS, Method, grid
from protocol import PER_RATE, TASKS, best_rate, cell_of, edge, epochs_of, interval

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Cells that are no part of the front: of their own number of rates, seeds and epochs (those of a task if None)."""

    name: str
    rates: int
    seeds: int
    epochs: int | None = None


# the groups of methods (groups.py, peers.py) and the methods that are parts
PARTS = {
    # what is no option of the package
    **{method.name: Part(name="cores", rates=3, seeds=5) for method in FAST_CORES},
    "rates": Part(name="rates", rates=6, seeds=2),
    "scales": Part(name="rates", rates=6, seeds=2),
    "steady": Part(name="rates", rates=6, seeds=2),
    "steeper": Part(name="rates", rates=6, seeds=2),
    "bonds": Part(name="rates", rates=6, seeds=3),
    "wide_bonds": Part(name="rates", rates=6, seeds=3),
    "even_rates": Part(name="rates", rates=6, seeds=3),
    "few_rates": Part(name="rates", rates=6, seeds=2),
    "larger_rates": Part(name="rates", rates=6, seeds=2),
    "smaller_rates": Part(name="rates", rates=6, seeds=3),
    "ruled_ends": Part(name="rates", rates=6, seeds=3),
    "paper_rates": Part(name="rates", rates=6, seeds=2),
    "paper_steady": Part(name="rates", rates=6, seeds=3),
    "paper_steady_decoder": Part(name="rates", rates=6, seeds=3),
    "paper_bonds": Part(name="rates", rates=6, seeds=3),
    "ruled": Part(name="rates", rates=6, seeds=3),
    "peer_rates": Part(name="rates", rates=6, seeds=2),
    "peer_rates_576": Part(name="rates", rates=6, seeds=2),
    "heads": Part(name="heads", rates=3, seeds=5),
    "adp_heads": Part(name="heads", rates=3, seeds=5),
    # the paper's Figure 4: at the rate that is the best on the front
    "long": Part(name="long", rates=1, seeds=5, epochs=30),
    "claimed_long": Part(name="long", rates=1, seeds=5, epochs=30),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One population. ``part`` is "front" or the name of one of ``PARTS``."""

    task: str
    method: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    part: str = "front"
    epochs: float

    @property
    def file(self) -> str:
        beyond = [f"{self.rates[0]:g}"] if len(self.rates) == 1 and self.part in ("front", "rates") else []
        beyond += [f"from-{self.seeds[0]}"] if self.seeds[0] else []
        return "-".join([self.part, self.task, *self.method.replace("+", "and").replace("/", " of ").split(), *beyond])


def cells_of(orders: Sequence[str], args: argparse.Namespace, known: Sequence[Row] = ()) -> list[Cell]:
    """``core:cola,mrpc``: all tasks of a method before the next one; ``METHOD:cola`` for one method.

    ``known`` are the rows of the same model, which say where the best rate of a method lies.
    """
    cells: dict[tuple[str, str, str], Cell] = {}
    for order in orders:
        group, _, tasks = order.rpartition(":")
        part = PARTS.get(group, Part(name="front", rates=args.rates, seeds=args.seeds))
        for name in GROUPS.get(group, [group]):
            for task in tasks.split(","):
                cells[part.name, task, name] = Cell(
                    part=part.name,
                    task=task,
                    method=name,
                    rates=grid(centred(METHODS[name], part.name, task, known), part.rates),
                    seeds=tuple(range(min(part.seeds, args.seeds))),
                    epochs=args.epochs or part.epochs or epochs_of(task, args.model),
                )
    return list(cells.values())


def centred(method: Method, part: str, task: str, known: Sequence[Row]) -> Method:
    """The method with the middle of its grid where it belongs.

    Of other methods of PEFT that is the best rate of six, where these were run, for what is published of them is of
    other models. A long training has the best rate of the front. Some tasks move the rates of all other methods.
    """
    of_part = {"front": "rates", "long": "front"}.get(part)
    names = {method.name} if part == "long" else {method.name, method.like}
    found = [row for row in known if row.get("part", "front") == of_part and row["method"] in names]
    found = [row for row in found if row["task"] == task] or ([] if part == "long" else found)
    if not found or (part == "front" and method.family != "PEFT"):
        return replace(method, middle=method.middle * TASKS[task].faster)
    return replace(method, middle=float(best_rate(found[0])))


def left(cells: Sequence[Cell], model: str, known: Sequence[Row]) -> list[Cell]:
    """The cells that have no row of these epochs and as many seeds; of a row with fewer seeds, those that it lacks."""
    rows = {cell_of(row): row for row in known}
    found = []
    for cell in cells:
        row = rows.get((cell.part, model, cell.task, cell.method))
        if row is None or row["epochs"] != cell.epochs or (TASKS[cell.task].kind == "words" and "wiki" not in row):
            found.append(cell)
        elif lacking := sorted({*cell.seeds} - {*row["seeds"]}):
            more = replace(cell, seeds=tuple(lacking), rates=tuple(row["rates"]), epochs=row["epochs"])
            found.append(more)
    return found


def cells_beyond(rows: Sequence[Row], seeds: int = 0) -> list[Cell]:
    """For every row of ``seeds`` or more whose best rate is at the edge of its grid, the same with the next rate.

    A row with fewer waits for its seeds, which are measured at the rates that it has.
    """
    found = []
    for row in rows:
        if len(row["seeds"]) < seeds:
            continue
        if row["part"] in ("front", "rates") and row["method"] in METHODS and (where := edge(row)):
            rate = float(f"{float(best_rate(row)) * (2 if where == '≥' else 0.5):.3g}")
            found.append(
                Cell(
                    task=row["task"],
                    method=row["method"],
                    part=row["part"],
                    rates=(rate,),
                    seeds=tuple(row["seeds"]),
                    epochs=row["epochs"],
                )
            )
    return found


def joined(known: Sequence[Row], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of a cell with the rates that its seeds, or the seeds that its rates, were measured at before."""
    row = make()
    for other in known:
        if cell_of(other) != cell_of(row) or other["epochs"] != row["epochs"]:
            continue
        keys = set(PER_RATE) & row.keys() & other.keys()
        if other["seeds"] == row["seeds"] and not {*other["rates"]} <= {*row["rates"]}:
            made = {key: {**other[key], **row[key]} for key in keys}
            made |= {"rates": sorted({*other["rates"], *row["rates"]}), "command": f"{other['command']}; then --extend"}
        elif not {*other["seeds"]} & {*row["seeds"]} and {*other["rates"]} == {*row["rates"]}:
            made = {key: {rate: other[key][rate] + row[key][rate] for rate in row[key]} for key in keys}
            made |= {"seeds": other["seeds"] + row["seeds"], "command": f"{other['command']}; then {row['command']}"}
        else:
            continue
        row |= {**made, "seconds": other["seconds"] + row["seconds"], "versions": joined_versions(other, row)}
    return row


def joined_versions(other: Row, row: Row) -> dict[str, str]:
    """The versions of both measurements, those that differ one behind the other."""
    mine, before = row["versions"], other["versions"]
    return {name: ", ".join(dict.fromkeys([*before[name].split(", "), number])) for name, number in mine.items()}


def command_of(cell: Cell, args: argparse.Namespace) -> str:
    """What makes this row alone."""
    groups = [
        group for group, part in PARTS.items() if part.name == cell.part and cell.method in GROUPS.get(group, [group])
    ]
    group = groups[0] if groups else cell.method
    words = [f"--model {Path(args.model).name} --data-dir DATA --order '{group}:{cell.task}'"]
    words += [f"--seeds {cell.seeds[-1] + 1} --rates {len(cell.rates)} --epochs {cell.epochs:g} --out FILE"]
    words += [f"--{key} {value}" for key in ("max_steps", "limit") if (value := getattr(args, key)) is not None]
    return " ".join(["python benchmarks/forms.py", *words]).replace("max_steps", "max-steps")


def table(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["task"], row["trained"])):
        rate = best_rate(row)
        scores = [score for score in row["held_out"][rate] if score is not None]
        official = [score for score in row["official"][rate] if score is not None]
        (held, half), (final, _) = (interval(s) if s else (0.0, 0.0) for s in (scores, official))
        lines.append(
            f"{row['model'][:10]:10} {row['part']:5} {row['task']:5} {row['method']:28} {row['trained']:8,} "
            f"{held:.4f} +- {half:.4f}  official {final:.4f}  at {rate} ({row['seconds']:.0f} s)"
        )
    return "\n".join(lines)
