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
