"""The methods on one model side by side: means over tasks, intervals over seeds, and who is better than whom."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import pandas as pd
from protocol import TASKS, chosen, interval

Row = Mapping[str, Any]


class Board:
    """The methods on one model: their scores on the tasks that the most of them were run on.

    ``which`` are the rows that are scored, "held_out" or "official".
    """

    def __init__(self, found: Sequence[Row], model: str, which: str) -> None:
        self.rows = [row for row in found if row["model"] == model and row.get("part", "front") == "front"]
        self.which = which
        self.cells = {(row["method"], row["task"]): row for row in self.rows}
        self.methods = sorted({row["method"] for row in self.rows}, key=lambda name: (self.trained(name), name))
        counts = {task: sum((m, task) in self.cells for m in self.methods) for task in TASKS}
        # a mean is of tasks that at least two thirds of the methods have
        self.tasks = [task for task in TASKS if counts[task]]
        scored = [task for task in self.tasks if TASKS[task].metric != "loss"]
        most = max((counts[task] for task in scored), default=0)
        self.common = [task for task in scored if counts[task] >= 2 / 3 * most]

    def trained(self, method: str) -> int:
        return next(row["trained"] for row in self.rows if row["method"] == method)

    def family(self, method: str) -> str:
        return str(next(row["family"] for row in self.rows if row["method"] == method))

    def norms(self, method: str) -> bool:
        return bool(next(row["norms"] for row in self.rows if row["method"] == method))

    def scores(self, method: str, task: str) -> list[float]:
        return chosen(self.cells[method, task], self.which)

    def mean_of(self, method: str) -> list[float] | None:
        """The mean over the common tasks, for each seed; None where one of them was not run."""
        if not all((method, task) in self.cells for task in self.common):
            return None
        of_tasks = [self.scores(method, task) for task in self.common]
        return [mean(seeds) for seeds in zip(*of_tasks, strict=False)]

    def complete(self) -> dict[str, list[float]]:
        found = {method: self.mean_of(method) for method in self.methods}
        return {method: scores for method, scores in found.items() if scores is not None}

    def by_count(self, count: int, names: Sequence[str]) -> list[float] | None:
        """The scores of each seed at a count between two of ``names``, straight in the logarithm of the count."""
        have = self.complete()
        known = sorted((self.trained(name), have[name]) for name in names if name in have)
        for (low, before), (high, behind) in pairwise(known):
            if low <= count <= high and low < high:
                share = math.log(count / low) / math.log(high / low)
                return [a + share * (b - a) for a, b in zip(before, behind, strict=False)]
        return None


def words(values: Sequence[float], digits: int = 3) -> str:
    if any(math.isnan(value) for value in values):
        return "diverged"
    middle, half = interval(values)
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def signed(values: Sequence[float]) -> str:
    middle, half = interval(values)
    return f"{middle:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def paired(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=False)]


def verdict(differences: Sequence[float]) -> str:
    """ "better", "worse", or "level" where the 95 % interval holds zero."""
    middle, half = interval(differences)
    if math.isnan(half) or abs(middle) <= half:
        return "level"
    return "better" if middle > 0 else "worse"


def markdown(lines: Sequence[Sequence[str]], columns: Sequence[str], left: int = 1) -> str:
    frame = pd.DataFrame(lines, columns=list(columns))
    align = [*["left"] * left, *["right"] * (len(columns) - left)]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"
