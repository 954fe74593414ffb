"""The tables of docs/performance.md on populations."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from measured import NOT_MEASURED, Row, results, source, sources, table, verdict

POPULATION_TARGETS = {("training", 16): 5.0, ("training", 64): 12.0, ("step", 8): 4.0}


def population_table(name: str = "population") -> str:
    """Runs that are trained at once against the same ones one after the other."""
    rows = results(name)
    lines = []
    for row in rows:
        if row["how"] in ("alone", "floor"):
            continue
        one = next(o for o in rows if o["how"] == "alone" and _compared(o) == _compared(row))
        if row["part"] == "training":
            case, rates = f"MiniLM, {row['task']}, batch 32", [o["examples_per_s"] for o in (one, row)]
        else:
            sizes = ((one, 1), (row, row["members"]))
            depth = f" of {row['layers']} layers" if row.get("layers") else ""
            case, rates = f"{row['model']}{depth}, 1x{row['tokens']}", [1000 * size / o["ms"] for o, size in sizes]
        ratio, target = rates[1] / rates[0], POPULATION_TARGETS.get((row["part"], row["members"]))
        memory = [f"{o['peak_bytes'] / 2**30:.2f}" for o in (one, row)]
        judged = f"{target:g}: {verdict(ratio >= target)}" if target and row["graph"] else ""
        if target and ratio < target and (most := _base_rate(row) / rates[0]) < target:
            judged += f", at most {most:.1f}"
        graph = "yes" if row["graph"] else "no"
        lines.append(
            [
                case,
                _with_kernels(row, rows),
                graph,
                row["members"],
                *(f"{r:,.0f}" for r in rates),
                f"{ratio:.1f}",
                *memory,
                judged,
            ]
        )
    head = (
        "case | method | graphs | members | examples/s, one by one | together | times as fast | "
        "GiB, one | GiB, together | target"
    )
    return sources(rows) + table(head, lines, numbers_from=3) if rows else NOT_MEASURED


def _with_kernels(row: Row, rows: list[Row]) -> str:
    """The method, and where kernels of our own compute, if the file compares that."""
    kinds = {other["kernels"] for other in rows if other.get("kernels")}
    return f"{row['method']}, {row['kernels']}" if len(kinds) > 1 and "kernels" in row else row["method"]


def population_split_table(name: str) -> str:
    """Where the seconds of a population go, beside the run alone, and the rate from options to folders."""
    rows = [row for row in results(name) if "split_s" in row]
    lines = []
    for row in rows:
        one = next(o for o in rows if o["how"] == "alone" and _compared(o) == _compared(row))
        parts = [f"{row['split_s'][part]:.1f}" for part in ("start", "recording", "steps", "evaluation", "saving")]
        rate, ratio = row["whole_examples_per_s"], row["whole_examples_per_s"] / one["whole_examples_per_s"]
        members = "alone" if row is one else row["members"]
        lines.append([row["task"], _with_kernels(row, rows), members, *parts, f"{rate:,.0f}", f"{ratio:.1f}"])
    head = (
        "task | method | members | start, s | recording | steps | evaluation | saving | examples/s of it all | "
        "times as fast"
    )
    return table(head, lines, numbers_from=2) if rows else NOT_MEASURED


def population_step_table() -> str:
    """What a step of a population has the device do, and the floor."""
    rows = results("population_step*")
    lines = []
    for row in rows:
        first = next(other for other in rows if other["tokens"] == row["tokens"])
        kinds = [f"{ms:.1f}" for ms in row["kinds_ms"].values()]
        lines.append(
            [row["case"], row["tokens"], f"{row['ms']:.2f}", f"{first['ms'] / row['ms']:.2f}", *kinds, row["kernels"]]
        )
    head = "case | tokens | step, ms | times as fast | attention | products | norms | dropout | casts | other | kernels"
    return sources(rows) + table(head, lines, numbers_from=1) if rows else NOT_MEASURED


def population_bound_table() -> str:
    """How fast a population could be at most: the frozen base by itself on the rows of all members."""
    lines = _bounds()
    head = (
        "case | method | members | one by one, examples/s | together | target | the base alone, times as fast | "
        "the members | the members / the base"
    )
    return table(head, lines, numbers_from=2) if lines else NOT_MEASURED


def _bounds() -> list[list[Any]]:
    lines = []
    for row in (*results("population_floor"), *results("population_rte_again")):
        one = next(
            (o for o in results(row["file"][:-5]) if o["how"] == "alone" and _compared(o) == _compared(row)), row
        )
        if row is one or (row["part"], row["members"]) not in POPULATION_TARGETS or row["members"] == 16:
            continue
        if row["part"] == "step":
            rates = [1000 * o["members"] / o["ms"] for o in (one, row)]
            lines.append(_bound(f"{row['model']}, 1x{row['tokens']}", row, *rates, _base_rate(row)))
            continue
        for words, of in (("", "tokens_an_example"), (", padded as its steps are", "padded_tokens_an_example")):
            rates = [o["examples_per_s"] for o in (one, row)]
            lines.append(_bound(f"MiniLM, {row['task']}{words}", row, *rates, _base_rate(row, of)))
    return lines


def _base_rate(row: Row, of: str = "padded_tokens_an_example") -> float:
    """Examples a second of the frozen base by itself on the rows of all members; infinite where it was not measured."""
    if row["part"] == "step":
        alike = [o for o in results("population_floor") if o["how"] == "floor"]
        keys = ("device", "model", "tokens", "layers", "members", "graph")
        rates = {tuple(map(o.get, keys)): 1000 * o["members"] / o["ms"] for o in alike}
        return rates.get(tuple(map(row.get, keys)), math.inf)
    alike = [o for o in results("population_step*") if o["case"] == "floor, packed" and of in o]
    keys = ("device", "task", "members")
    same = [o for o in alike if all(o[key] == row[key] for key in keys)]
    return max((1000 * o["rows"] * o["tokens"] / o["ms"] / o[of] for o in same), default=math.inf)


def _bound(case: str, row: Row, one: float, together: float, floor: float) -> list[Any]:
    target = POPULATION_TARGETS[row["part"], row["members"]]
    rates, times = (f"{one:,.0f}", f"{together:,.0f}"), (f"{floor / one:.1f}", f"{together / one:.1f}")
    return [case, row["method"], row["members"], *rates, f"{target:g}", *times, f"{together / floor:.2f}"]


def population_cpu_table() -> str:
    """Processor time of a run in a population against that of the run alone."""
    rows = results("population_cpu")
    lines = []
    for row in rows:
        one = next(o for o in rows if o["how"] == "alone" and _compared(o) == _compared(row))
        seconds, ratio = row["processor_s"] / row["members"], one["processor_s"] / one["members"]
        judged = "" if row is one else f"1: {verdict(ratio / seconds >= 1)}"
        how = "alone" if row is one else "together"
        lines.append(
            [row["task"], row["method"], row["members"], how, f"{seconds:.1f}", f"{ratio / seconds:.2f}", judged]
        )
    head = "task | method | members | how | processor, s a run | times as fast | target"
    return source(rows[0]) + table(head, lines, numbers_from=2) if rows else NOT_MEASURED


def compare_table() -> str:
    """A whole `loretta compare`, with the code of two commits."""
    rows = results("compare*")
    lines = []
    for row in rows:
        units = ", ".join(f"{seconds:.0f}" for seconds in row.get("units_s", ()))
        training = f"{row['training_s']:.0f}" if "training_s" in row else ""
        lines.append([row["name"], row["commit"], row["runs"], f"{row['seconds']:.0f}", row["ended"], units, training])
    head = "a process for | commit | runs finished | seconds | ended by | of its units | of training"
    return sources(rows) + table(head, lines, numbers_from=2) if rows else NOT_MEASURED


def halving_table() -> str:
    """A search by successive halving beside the full grid, together and one by one."""
    rows = results("halving*")
    lines = []
    for row in rows:
        case = f"{row['model']}, {row['task']}, {row['epochs']:g} epochs"
        compared = "losses" if any(", loss " in words for words in row.get("stopped", {}).values()) else "scores"
        together = {"grid": "grid, in populations", "halving": f"halving by {compared}, in populations"}
        how = together.get(row["how"], row["how"])
        of_file = {other["how"]: other for other in rows if other["file"] == row["file"]}
        others = (of_file.get(other) for other in ("one by one, estimated", "grid"))
        parts = [f"{row['processor_s'] / other['processor_s']:.2f}" if other else "" for other in others]
        score = f"{row['score']:.3f}" if "score" in row else ""
        lines.append([case, how, f"{row['seconds']:.0f}", f"{row['processor_s']:.0f}", *parts, score])
    head = "case | 64 candidates | seconds | processor, s | / one by one | / grid | best validation score"
    return sources(rows) + table(head, lines, numbers_from=2) if rows else NOT_MEASURED


def stopped_table() -> str:
    """When a search by halving stopped its candidates, and the first and the last of those it stopped there."""
    lines = []
    for row in results("halving*"):
        steps: dict[tuple[int, str], list[tuple[int, str]]] = {}
        for folder, words in row.get("stopped", {}).items():
            place, _, at = words.partition(" at ")
            step, _, score = at.partition(", ")
            number, _, count = place.partition(" of ")
            steps.setdefault((int(count), step), []).append((int(number), f"{score} ({folder})"))
        for (count, step), found in sorted(steps.items(), reverse=True):
            lines.append([row["model"], row["task"], step, count, len(found), min(found)[1]])
    head = "model | task | at | candidates | stopped | the best of the stopped"
    return table(head, lines, numbers_from=3) if lines else NOT_MEASURED


def _compared(row: Row) -> tuple:
    return tuple(row.get(name) for name in ("part", "task", "model", "layers", "method", "graph"))


POPULATION_SECTIONS: dict[str, Callable[[], str]] = {
    "population": population_table,
    "population on an h200": partial(population_table, "population_h200*"),
    "population on rte again": partial(population_table, "population_rte_again"),
    "population split": partial(population_split_table, "population_h200*"),
    "population split again": partial(population_split_table, "population_rte_again"),
    "population steps": population_step_table,
    "population bound": population_bound_table,
    "population on a cpu": population_cpu_table,
    "compare": compare_table,
    "halving": halving_table,
    "stopped": stopped_table,
}
