"""The methods on one model side by side: means over tasks, intervals over seeds, and who is better than whom."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from protocol import SEEN, TASKS, chosen, interval, joined_by_seed, mean_by_seed, same_seeds

Row = Mapping[str, Any]
Scores = pd.Series  # by seed
ROOM = 1.1  # of a size that a method may use
NEAR = 1.02  # counts so much apart are one


def with_cores(found: Sequence[Row]) -> list[Row]:
    """The rows, of which the shared trains with fast small cores count among the forms: they are no option."""
    return [row | {"part": "front"} if row.get("part") == "cores" else row for row in found]


class Board:
    """The methods on one model: their scores on the tasks that the most of them were run on, or on ``common``.

    ``which`` are the rows that are scored, "held_out" or "official". Each method has its own seeds and its rate by
    these; where methods are compared, both are of the seeds that all of them have. A loss per token L counts exp(-L) in
    a mean, which is the probability of a token in the geometric mean: the more the better, as of every other score.
    """

    def __init__(self, found: Sequence[Row], model: str, which: str, common: Sequence[str] | None = None) -> None:
        self.rows = [row for row in found if row["model"] == model and row.get("part", "front") == "front"]
        self.model, self.which = model, which
        self.cells = {(row["method"], row["task"]): row for row in self.rows}
        self.methods = sorted({row["method"] for row in self.rows}, key=lambda name: (self.trained(name), name))
        counts = {task: sum((m, task) in self.cells for m in self.methods) for task in TASKS}
        # one method alone is compared with nothing; a mean is of tasks that at least two thirds of the methods have
        self.tasks = [task for task in TASKS if counts[task] > 1]
        scored = [task for task in self.tasks if TASKS[task].metric != "loss" and task not in SEEN]
        most = max((counts[task] for task in scored), default=0)
        self.common = common or [task for task in scored if counts[task] >= 2 / 3 * most]

    def trained(self, method: str) -> int:
        return next(row["trained"] for row in self.rows if row["method"] == method)

    def family(self, method: str) -> str:
        return str(next(row["family"] for row in self.rows if row["method"] == method))

    def norms(self, method: str) -> bool:
        return bool(next(row["norms"] for row in self.rows if row["method"] == method))

    def scores(self, method: str, task: str) -> Scores:
        return chosen(self.cells[method, task], self.which)

    def mean_of(self, method: str) -> Scores | None:
        """The mean over the common tasks, for each seed that all have; None where one of them was not run."""
        return mean_by_seed([self._worth(method, task) for task in self.common]) if self.has_all(method) else None

    def _worth(self, method: str, task: str) -> Scores:
        scores = self.scores(method, task)
        return np.exp(-scores) if TASKS[task].metric == "loss" else scores

    def has_all(self, method: str) -> bool:
        return all((method, task) in self.cells for task in self.common)

    def complete(self) -> dict[str, Scores]:
        found = {method: self.mean_of(method) for method in self.methods}
        return {method: scores for method, scores in found.items() if scores is not None}

    def among(self, methods: Collection[str]) -> "Board":
        """These methods alone, on the seeds that all of them have."""
        rows = same_seeds([row for row in self.rows if row["method"] in methods])
        return Board(rows, self.model, self.which, self.common)

    def gap(self, one: str, other: str) -> Scores | None:
        """By how much the mean of one method is above that of another; None where a task of one was not run."""
        both = self.among([one, other]).complete()
        return paired(both[one], both[other]) if one in both and other in both else None

    def gap_on(self, task: str, one: str, other: str) -> Scores:
        both = self.among([one, other])
        return paired(both.scores(one, task), both.scores(other, task))

    def seeds(self, methods: Collection[str] | None = None) -> str:
        """How many seeds the rows of methods have on the common tasks, "3 to 5"."""
        some = [row for row in self.rows if methods is None or row["method"] in methods]
        counts = sorted({len(row["seeds"]) for row in [row for row in some if row["task"] in self.common] or some})
        return " to ".join(map(str, [counts[0], counts[-1]] if counts[1:] else counts))

    def best_within(self, size: int) -> tuple[str | None, str | None]:
        """The best form of LoRETTA and the best other method with about as many parameters at most, by their means."""
        fit = [method for method in self.methods if self.has_all(method) and self.trained(method) <= ROOM * size]
        found = self.among(fit).complete() if fit else {}
        means = {method: scores.mean() for method, scores in found.items() if not scores.isna().any()}  # none diverged
        ours = [method for method in means if self.family(method) == "LoRETTA"]
        others = [method for method in means if self.family(method) != "LoRETTA"]
        return max(ours, key=means.__getitem__, default=None), max(others, key=means.__getitem__, default=None)

    def by_count(self, count: int, names: Sequence[str]) -> Scores | None:
        """The scores by seed at a count between two of ``names``, straight in its logarithm, or beside one of them."""
        have = self.complete()
        beside = [name for name in names if name in have and abs(math.log(count / self.trained(name))) < math.log(NEAR)]
        if beside:
            return have[min(beside, key=lambda name: abs(count - self.trained(name)))]
        for before, behind in pairwise(sorted((name for name in names if name in have), key=self.trained)):
            low, high = self.trained(before), self.trained(behind)
            if low <= count <= high and low < high:
                share = math.log(count / low) / math.log(high / low)
                return joined_by_seed([have[before], have[behind]]) @ [1 - share, share]
        return None


def words(values: Collection[float], digits: int = 3) -> str:
    if any(math.isnan(value) for value in values):
        return "diverged"
    middle, half = interval(values)
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def signed(values: Collection[float]) -> str:
    middle, half = interval(values)
    return f"{middle:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def paired(one: Scores, other: Scores) -> Scores:
    """The differences of the seeds that both have."""
    return joined_by_seed([one, other]) @ [1.0, -1.0]


def verdict(differences: Collection[float]) -> str:
    """ "better", "worse", or "level" where the 95 % interval holds zero."""
    middle, half = interval(differences)
    if math.isnan(half) or abs(middle) <= half:
        return "level"
    return "better" if middle > 0 else "worse"


def markdown(lines: Sequence[Sequence[str]], columns: Sequence[str], left: int = 1) -> str:
    frame = pd.DataFrame(lines, columns=list(columns))
    align = [*["left"] * left, *["right"] * (len(columns) - left)]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"
