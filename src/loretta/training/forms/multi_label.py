"""Several labels for a text or a pair, each there or not: binary cross-entropy over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from loretta.record import Answers
from loretta.tasks import metrics
from loretta.tasks.base import Task
from loretta.training.forms.base import Data, Row
from loretta.training.forms.labels import Labels, count_classes, finite, only_one, shown_texts, worst
from loretta.training.trainer import TwoRateTrainer


class MultiLabel(Labels):
    """A label is answered where its probability is above one half."""

    def counts(self, task: Task) -> dict[str, list[int]]:
        return count_classes(task, lambda data: [k for row in data["label"] for k, there in enumerate(row) if there])

    def rows_of(self, logits: Tensor, names: Sequence[str], *, all_of_them: bool = True) -> list[Row]:
        """(B, labels) logits -> the "labels" above one half; ``all_of_them`` adds "probability_NAME" of every label."""
        return [
            {
                "labels": [name for name, p in zip(names, row, strict=True) if p > 0.5],
                **({f"probability_{name}": p for name, p in zip(names, row, strict=True)} if all_of_them else {}),
            }
            for row in logits.float().sigmoid().tolist()
        ]

    def golds_of(self, task: Task, split: str) -> list[Any]:
        names = task.label_names
        labels = getattr(task, split)["label"]
        return [[name for name, there in zip(names, row, strict=True) if there] for row in labels]

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        task = data.task
        names, texts = task.label_names, shown_texts(task, split)
        # the labels that a constant answer scores best with, on the rows that are known
        train, golds = np.array(task.train["label"]), np.array(getattr(task, split)["label"])
        order = (-train.mean(0)).argsort(kind="stable")
        most = max(range(1, len(names) + 1), key=lambda n: _score(task, order[:n], train)[task.metrics[0]])
        constant = ", ".join(map(repr, sorted(names[k] for k in order[:most])))
        wrong = {k: size for k, row in enumerate(rows) if (size := _worst(row, names)) > 0}
        return Answers(
            split=split,
            rows=len(rows),
            constant=f"{constant} for every row, the best such answer on train,",
            baseline=_score(task, order[:most], golds),
            only=only_one(", ".join(row["labels"]) for row in rows),
            mistakes=worst(wrong, lambda k: (texts[k], ", ".join(rows[k]["gold"]), ", ".join(rows[k]["labels"]))),
        )


def _score(task: Task, labels: Any, golds: np.ndarray) -> dict[str, float]:
    constant = np.zeros_like(golds)
    constant[:, labels] = 1
    return metrics.compute(task.metrics, constant, golds)


def _worst(row: Mapping[str, Any], names: Sequence[str]) -> float:
    """The probability of the surest wrong answer about a label of a row; 0 where none is wrong."""
    sure = {name: finite(row[f"probability_{name}"]) for name in names}
    return max(
        (
            p if name in row["labels"] else 1 - p
            for name, p in sure.items()
            if (name in row["labels"]) != (name in row["gold"])
        ),
        default=0.0,
    )
