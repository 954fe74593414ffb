"""Scores and predictions of a split, out of a model's logits and the Trainer's metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from loretta.tasks import metrics
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask


def score_logits(task: Task, logits: np.ndarray, labels: Sequence[Any] | np.ndarray) -> dict[str, float]:
    """The task's metrics of (rows, labels) logits. All are NaN where one logit is not finite.

    The largest of logits that are all NaN is the first: a run that diverged would score as the first class does.
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys(task.metrics, math.nan)
    if task.kind == "multi_label":
        return metrics.compute(task.metrics, logits > 0, np.asarray(labels) > 0.5)
    predicted = logits[:, 0] if task.kind == "regression" else logits.argmax(-1)
    return metrics.compute(task.metrics, predicted, labels)


def prediction_rows(
    logits: torch.Tensor, label_names: Sequence[str], *, all_of_them: bool = False
) -> list[dict[str, Any]]:
    """(B, labels) logits -> a "label" and its "probability" each; without label names a "score" each.

    ``all_of_them`` adds "probability_NAME" of every class.
    """
    if not label_names:
        return [{"score": float(score)} for score in logits[:, 0]]
    probabilities = logits.float().softmax(-1)
    best = probabilities.max(-1)
    keys = [f"probability_{name}" for name in label_names] if all_of_them else []
    return [
        {"label": label_names[int(k)], "probability": float(p), **dict(zip(keys, each.tolist(), strict=False))}
        for p, k, each in zip(best.values, best.indices, probabilities, strict=True)
    ]


def named_values(raw: Mapping[str, float], task: Task | PromptedTask, prefix: str) -> dict[str, float]:
    """Loss and metrics out of the Trainer's prefixed names, with perplexity where the task has it."""
    values = {
        key.removeprefix(prefix): float(value)
        for key, value in raw.items()
        if key.removeprefix(prefix) in ("loss", *task.metrics)
    }
    if "perplexity" in task.metrics and "loss" in values:
        values["perplexity"] = math.exp(min(values["loss"], 700))
    return values


def logits_alone(outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
    """What the Trainer keeps of a batch: encoder-decoder models give hidden states behind the logits."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
