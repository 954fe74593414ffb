"""Differences between two methods on the same rows of data, with intervals over rows and seeds.

Axes: S seeds, T different texts, B resamples.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.studies.results import CONFIDENCE, Cell, Results
from loretta.tasks import metrics
from loretta.training.folder import PREDICTIONS, RECORD

RESAMPLES = {True: 4000, False: 300}  # key: whether the metric is a mean over rows, which is quick to resample
Rows = list[dict[str, Any]]


class Difference(BaseModel, frozen=True):
    """The best method minus another one, in the metric's unit, with a bootstrap interval at 95%."""

    best: str
    other: str
    mean: float
    low: float
    high: float
    seeds: int  # of both methods
    better: int  # seeds on which the best method is the better one
    rows: int  # different texts

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def differences(results: Results, root: Path) -> list[Difference]:
    """The best method of a comparison against each of the others, on the seeds and rows that both have.

    A method without answers for each row is left out: generated answers and language models.
    """
    cells = [cell for cell in results.final() if cell.task in results.study.tasks and cell.mean is not None]
    cells = [cell for cell in cells if np.isfinite(cell.mean) and cell.metric not in ("perplexity", "loss")]  # type: ignore[arg-type]
    if len(cells) < 2:
        return []
    sign = 1 if cells[0].higher_is_better else -1
    best = max(cells, key=lambda cell: sign * (cell.mean or 0.0))
    answers = {cell.row: _answers_of(cell, root) for cell in cells}
    names = RunRecord.load(root / best.scores[0].folder / RECORD).label_names
    found = (_difference(best, cell, answers[best.row], answers[cell.row], names) for cell in cells if cell is not best)
    return [difference for difference in found if difference is not None]


def _answers_of(cell: Cell, root: Path) -> dict[int, Rows]:
    found = {}
    for score in cell.scores:
        try:
            lines = (root / score.folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            continue
        if rows and all("gold" in row and "text" in row and _answer(row) is not None for row in rows):
            found[score.seed] = rows
    return found


def _answer(row: Mapping[str, Any]) -> Any:
    return row.get("label", row.get("option", row.get("score")))


def _difference(
    best: Cell, other: Cell, ours: Mapping[int, Rows], theirs: Mapping[int, Rows], names: Sequence[str]
) -> Difference | None:
    seeds = [s for s in sorted(ours.keys() & theirs.keys()) if list(map(_key, ours[s])) == list(map(_key, theirs[s]))]
    if not seeds:
        return None
    texts = {key: at for at, key in enumerate(dict.fromkeys(_key(row) for s in seeds for row in ours[s]))}
    pairs = [(ours[s], theirs[s], np.array([texts[_key(row)] for row in ours[s]])) for s in seeds]
    try:
        observed, samples = _bootstrap(best.metric, pairs, len(texts), names)
    except InputError:  # the metric is one of answers in words
        return None
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(
        best=best.row,
        other=other.row,
        mean=float(np.mean(observed)),
        low=float(low),
        high=float(high),
        seeds=len(seeds),
        better=int(sum(d > 0 if best.higher_is_better else d < 0 for d in observed)),
        rows=len(texts),
    )


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row["text"]), str(row.get("text_pair", "")), str(row["gold"])


def _bootstrap(
    metric: str, pairs: Sequence[tuple[Rows, Rows, NDArray]], n_texts: int, names: Sequence[str]
) -> tuple[NDArray, NDArray]:
    """Resample the difference of a metric. Returns (S) its values, and (B) their means over drawn seeds and texts.

    Seeds and texts are drawn with replacement, independently (Owen 2007, the pigeonhole bootstrap); a text that several
    seeds hold out is drawn for all of them at once. Each value is a difference of two scores, so that none can leave
    the metric's range.
    """
    generator = np.random.default_rng(0)
    by_row = {"accuracy": lambda a, g: (a == g).astype(float), "mse": lambda a, g: (a - g) ** 2}.get(metric)
    n_resamples = RESAMPLES[by_row is not None]
    drawn_BT = generator.multinomial(n_texts, np.full(n_texts, 1 / n_texts), size=n_resamples)
    columns = [_columns(ours, theirs, names) for ours, theirs, _ in pairs]
    if by_row is not None:
        sums_ST = np.zeros((len(pairs), n_texts))
        counts_ST = np.zeros_like(sums_ST)
        for s, ((gold, mine, other), (_, _, at)) in enumerate(zip(columns, pairs, strict=True)):
            np.add.at(sums_ST[s], at, by_row(mine, gold) - by_row(other, gold))
            np.add.at(counts_ST[s], at, 1.0)
        observed_S = sums_ST.sum(1) / counts_ST.sum(1)
        counts_SB = counts_ST @ drawn_BT.T
        # a draw without any text of a seed says nothing about that seed
        values_SB = np.divide(sums_ST @ drawn_BT.T, counts_SB, out=np.zeros_like(counts_SB), where=counts_SB > 0)
    else:

        def difference(s: int, rows: NDArray) -> float:
            gold, mine, other = (column[rows] for column in columns[s])
            return metrics.compute([metric], mine, gold)[metric] - metrics.compute([metric], other, gold)[metric]

        observed_S = np.array([difference(s, np.arange(len(at))) for s, (_, _, at) in enumerate(pairs)])
        values_SB = np.zeros((len(pairs), n_resamples))
        for s, (_, _, at) in enumerate(pairs):
            for b in range(n_resamples):
                rows = np.repeat(np.arange(len(at)), drawn_BT[b][at])
                values_SB[s, b] = difference(s, rows) if len(rows) else 0.0
    seeds_SB = generator.integers(len(pairs), size=(len(pairs), n_resamples))
    return observed_S, np.take_along_axis(values_SB, seeds_SB, axis=0).mean(0)


def _columns(ours: Rows, theirs: Rows, names: Sequence[str]) -> tuple[NDArray, NDArray, NDArray]:
    """Gold answers and those of both methods as numbers: scores, or class ids, by which F1 knows its positive class.

    Names of answers that are not among those of the classes come behind these.
    """
    columns = [row["gold"] for row in ours], [_answer(row) for row in ours], [_answer(row) for row in theirs]
    if "score" in ours[0]:
        return tuple(np.array(column, dtype=float) for column in columns)  # type: ignore[return-value]
    found = sorted({str(value) for column in columns for value in column})
    ids = {name: at for at, name in enumerate(dict.fromkeys([*names, *found]))}
    return tuple(np.array([ids[str(value)] for value in column]) for column in columns)  # type: ignore[return-value]
