"""Runs that pause behind a share of their steps, to be compared with others before they go on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.arguments import higher_is_better
from loretta.training.scores import named_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """Where a run waits, and what it scored on validation there."""

    step: int
    steps: int
    validation: dict[str, float]
    metric: str
    higher_is_better: bool


def step_of(share: float, steps: int) -> int:
    """The step behind which a share of a training is done; 0 to ``steps``."""
    return math.ceil(share * steps)


class PauseBehind(TrainerCallback):
    """Evaluates, saves a checkpoint and ends the training behind ``share`` of its steps."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step == step_of(self.share, state.max_steps):
            control.should_training_stop = True
            if args.save_strategy != SaveStrategy.EPOCH:  # an epoch that is left evaluates and saves
                control.should_evaluate = control.should_save = True


def paused_at(log: Sequence[Mapping[str, Any]], task: Task | PromptedTask, step: int, steps: int) -> Paused:
    """What the Trainer's ``log`` says of a run that waits behind ``step``: its last evaluation, if there was one."""
    last: Mapping[str, Any] = next((entry for entry in reversed(log) if "eval_loss" in entry), {})
    return Paused(
        step=step,
        steps=steps,
        validation=named_values(last, task, "eval_"),
        metric=task.metrics[0],
        higher_is_better=higher_is_better(task),
    )
