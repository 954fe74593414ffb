"""How every figure of the evidence is measured: the tasks, what is held out, and the form of a result.

Each member trains on 90 % of a task's official training rows and is scored on the other 10 % behind every epoch; these
scores choose its epoch, and their means over the seeds the learning rate of a method. The official validation rows are
scored once, at the end. What is compared or joined is that of the seeds which all sides have, each with itself.
"""

import gzip
import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

HELD_OUT = 0.1
BATCH = 32
HEAD_RATE = 1e-2  # of the final layer, the same for all methods
OFFICIAL_LENGTH = 128  # tokens of the texts that are scored at the end
SAME = ("epochs", "batch", "length", "rows", "metric")  # of all methods on a task
PER_RATE = ("held_out", "official", "curve", "losses", "train_loss", "wiki")  # what a row has by rate, and then by seed


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """How one task is trained.

    ``length`` is in tokens, of a training text: nearly all of them whole, and one length for all batches makes one
    recorded step.
    """

    length: int
    epochs: int
    rows: int | None = None  # of the training data, drawn
    official: int | None = None  # of the official validation data, drawn; else all
    metric: str = "accuracy"
    batch: int = BATCH
    kind: str = "glue"  # or "words", a prompted task (prompts.py), or "text", for the perplexity
    faster: float = 1.0  # times the rates of a method's grid


TASKS: dict[str, TaskPlan] = {
    "cola": TaskPlan(length=24, epochs=5, metric="mcc"),
    "mrpc": TaskPlan(length=80, epochs=5, metric="f1"),
    "stsb": TaskPlan(length=64, epochs=4, metric="spearman"),
    "rte": TaskPlan(length=128, epochs=5),
    "sst2": TaskPlan(length=40, epochs=2, rows=12_000),
    "qnli": TaskPlan(length=96, epochs=2),
    "mnli": TaskPlan(length=80, epochs=2),
    "qqp": TaskPlan(length=64, epochs=2, metric="f1", official=10_000),
    "sst2-words": TaskPlan(length=48, epochs=5, kind="words"),
    "cb-words": TaskPlan(length=160, epochs=10, kind="words"),
    "boolq-words": TaskPlan(length=192, epochs=3, kind="words"),
    "rte-words": TaskPlan(length=128, epochs=3, kind="words"),
    # twice the rates: the first five methods were all best at the highest of theirs
    "stories": TaskPlan(length=128, epochs=2, metric="loss", batch=8, kind="text", faster=2.0),
    "wiki": TaskPlan(length=128, epochs=2, metric="loss", batch=8, kind="text"),
}

# of a task's epochs: all methods of a model that trains slowly have as many fewer
SHARES = {"all-mpnet-base-v2": 0.6}

METRICS = {"mcc": "Matthews", "f1": "F1", "spearman": "Spearman", "accuracy": "accuracy", "loss": "loss"}

# the accuracy on the official validation rows of the answer that most of them have
CONSTANT = {"rte": 0.527, "cb-words": 0.5, "boolq-words": 0.611, "sst2-words": 0.509}

# the contrastive training of both encoders used pairs of these tasks' texts: no mean over tasks has them
SEEN = ("mnli", "qnli", "qqp")

# what of a task's validation data a method may have met before
LEAKS = {
    "mnli": "NLI pairs were among the contrastive training data of both encoders",
    "qnli": "SQuAD questions were among the contrastive training data of both encoders",
    "qqp": "Quora duplicates were among the contrastive training data of both encoders",
    "cola": "16 official validation sentences also occur in the official training data",
} | dict.fromkeys(
    ("sst2-words", "cb-words", "boolq-words", "rte-words"),
    "Whether SmolLM2 met texts of this task in its own training is not known",
)


def epochs_of(task: str, model: Path | str) -> float:
    """The epochs of a task on the front, the same for all methods of a model, which a path or a name says."""
    return TASKS[task].epochs * SHARES.get(Path(model).name, 1.0)


def split(task: str, source: Path, target: Path) -> None:
    """Write ``train`` (90 %) and ``validation`` (10 %) of the official training rows into ``target / task``.

    The shuffle has the seed 0 for all methods and seeds of a training.
    """
    rows = lines_of(source / task / "train.jsonl.gz")
    random.Random(0).shuffle(rows)
    rows = rows[: TASKS[task].rows or len(rows)]
    held_out = round(HELD_OUT * len(rows))
    (target / task).mkdir(parents=True, exist_ok=True)
    names = ("validation_matched" if task == "mnli" else "validation", "train")
    for name, part in zip(names, (rows[:held_out], rows[held_out:]), strict=True):
        with gzip.open(target / task / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(part)


def lines_of(file: Path) -> list[str]:
    with gzip.open(file, "rt") as lines:
        return [line for line in lines if line.strip()]


def read_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of several result files; of two rows of one cell the later one."""
    found = {cell_of(row): row for file in files if file.exists() for row in json.loads(file.read_text())}
    return list(found.values())


def alike(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, where those of one part, model and task were trained and scored in the same way, but for their method.

    Raises ValueError naming the first that was not: a method with more epochs would look better than it is. Searches
    for a rate may have other epochs: they say where a method's own peak lies, and no score of theirs is compared.
    """
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in found:
        other = first.setdefault((row.get("part"), row["model"], row["task"]), row)
        for key in SAME:
            if row.get(key) != other.get(key) and (key, row.get("part")) != ("epochs", "rates"):
                ways = f"{row.get(key)} in the rows of {row['method']}, {other.get(key)} in those of {other['method']}"
                raise ValueError(f"{key} on {row['task']} of {row['model']}: {ways}; run one of them again")
    return found


def cell_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is of; one run has a rate and a seed, all others those of a population."""
    run = [row[key] for key in ("rate", "seed") if key in row]
    return row.get("part", "front"), row["model"], row["task"], row["method"], *run


def best_rate(row: Mapping[str, Any]) -> str:
    """The learning rate with the best mean on the held-out rows; a rate at which a member diverged comes last."""
    return _best_rate(row["metric"], tuple((rate, tuple(scores)) for rate, scores in row["held_out"].items()))


@cache  # the tables ask for the rate of a row 25 times
def _best_rate(metric: str, held_out: tuple[tuple[str, tuple[float | None, ...]], ...]) -> str:
    sign = -1 if metric == "loss" else 1

    def worth(scores: tuple[float | None, ...]) -> float:
        return -math.inf if None in scores else sign * mean(scores)

    return max(held_out, key=lambda of_rate: worth(of_rate[1]))[0]


def at_edge(row: Mapping[str, Any]) -> bool:
    """Whether the best rate is the lowest or the highest of the grid, so that a better one may lie beyond."""
    return bool(edge(row))


def edge(row: Mapping[str, Any]) -> str:
    """Which way a better rate may lie beyond those that were run: "≥", "≤", or "" where the best one is within them."""
    rates = sorted(row["held_out"], key=float)
    if len(rates) == 1:
        return ""
    return {rates[0]: "≤", rates[-1]: "≥"}.get(best_rate(row), "")


def chosen(row: Mapping[str, Any], which: str) -> pd.Series:
    """The scores by seed at the best rate, on the "held_out" or the "official" rows."""
    return by_seed(row, row[which][best_rate(row)])


def by_seed(row: Mapping[str, Any], scores: Sequence[float | None]) -> pd.Series:
    """Scores of a row under the numbers of its seeds; NaN is that of a member that diverged."""
    return _by_seed(tuple(scores), tuple(row["seeds"]))


@cache
def _by_seed(scores: tuple[float | None, ...], seeds: tuple[int, ...]) -> pd.Series:
    return pd.Series([math.nan if score is None else score for score in scores], index=seeds, dtype=float)


def joined_by_seed(some: Sequence[pd.Series]) -> pd.DataFrame:
    """Several measurements side by side, a row for each seed that all of them have."""
    first = some[0].index
    if all(one.index.equals(first) for one in some):  # at once, as ``concat`` needs a millisecond
        return pd.DataFrame(np.column_stack(some), index=first)
    return pd.concat(some, axis="columns", join="inner", keys=range(len(some)))


def mean_by_seed(some: Sequence[pd.Series]) -> pd.Series:
    joined = joined_by_seed(some)
    return pd.Series(joined.to_numpy().mean(axis=1), index=joined.index)


def same_seeds(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with those seeds alone that all rows of their part, model and task have.

    So no method is chosen from more seeds, or compared on others. Raises ValueError where rows have no seed in common.
    """
    common: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        common[_table(row)] = common.get(_table(row), set(row["seeds"])) & set(row["seeds"])
    found: list[Mapping[str, Any]] = []
    for row in rows:
        if not common[_table(row)]:
            raise ValueError(f"the rows of {', '.join(_table(row))} have no seed in common: run one of them again")
        at = [k for k, seed in enumerate(row["seeds"]) if seed in common[_table(row)]]
        scores = {
            key: {rate: [of_seeds[k] for k in at] for rate, of_seeds in row[key].items()}
            for key in PER_RATE
            if key in row
        }
        found.append({**row, **scores, "seeds": [row["seeds"][k] for k in at]})
    return found


def _table(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row.get("part", "front"), row["model"], row["task"]


def interval(values: Collection[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, by Student's t over the seeds; NaN for the half of one value."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


@cache
def _quantile(freedom: int) -> float:
    return float(student.ppf(0.975, freedom))
