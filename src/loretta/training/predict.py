"""Use a finished run: score it, apply it to new text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from loretta.errors import InputError
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.arguments import make_trainer
from loretta.training.forms import form_of
from loretta.training.generate import Sampling, reply
from loretta.training.loaded import LoadedRun
from loretta.training.loaded import load_run as load_run
from loretta.training.model import TASK_TYPES


@torch.inference_mode()
def evaluate(run: LoadedRun, task: Task | PromptedTask, split: str) -> dict[str, float]:
    """The task's metrics on one split. Raises InputError for a task of another kind or with other labels."""
    if isinstance(task, PromptedTask):
        if TASK_TYPES[run.kind] != "CAUSAL_LM":
            raise InputError(
                f"the run was trained on a {run.kind} task, and '{task.name}' is put in words: give data with labels"
            )
    elif task.kind != run.kind or (task.label_names and list(task.label_names) != run.record.label_names):
        raise InputError(
            f"the run was trained on a {run.kind} task with the labels {run.record.label_names}, and "
            f"'{task.name}' is a {task.kind} task with {list(task.label_names)}: give data with the same labels"
        )
    if getattr(task, split) is None:
        raise InputError(f"'{task.name}' has no {split} split: choose another with --split")
    return form_of(task.kind).evaluate(run, task, split, make_trainer)


def predict(
    run: LoadedRun,
    asked: Sequence[Sequence[Any]],
    *,
    all_probabilities: bool = False,
    go_on: Callable[[LoadedRun, Any], str] | None = None,
) -> list[dict[str, Any]]:
    """One row per example. ``asked`` holds the columns that are answered, as the run was trained with them.

    Classification gives "label" and its "probability" (with ``all_probabilities`` also a "probability_NAME" for each
    class), regression a "score", a language model a "continuation" (``go_on`` of each text, greedy without it).
    Raises InputError for one text where the run was trained on pairs, and the other way round.
    """
    go_on = go_on or (lambda run, text: reply(run, text, Sampling()))
    return form_of(run.kind).predict(run, asked, all_probabilities=all_probabilities, go_on=go_on)
