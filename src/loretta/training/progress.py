"""Where nobody watches a bar, a line now and then: the step, the loss, and the time that is left."""

import time
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

# what the Trainer and TRL log beside the scores
OTHERS = (
    "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens", "entropy",
    "logps/", "logits/", "rewards/chosen", "rewards/rejected",
)  # fmt: skip
FIRST, LONGEST = 2.0, 60.0  # seconds to the first line, and at most between two; they double in between


class ProgressLines(TrainerCallback):
    """Says how far a training is, after 2 seconds, then after 4, 8, ... and every minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.loss: float | None = None
        self.begin, self.begin_step, self.due, self.wait = 0.0, 0, 0.0, FIRST

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin, self.begin_step, self.wait = time.monotonic(), state.global_step, FIRST
        self.due = self.begin + self.wait

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" in logs:
            values = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items() if not key.startswith(OTHERS))
            self.say(f"step {state.global_step:,}: validation {shown}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now < self.due or not state.is_world_process_zero:
            return
        each = (now - self.begin) / max(1, state.global_step - self.begin_step)
        self.say(
            progress_line(state.global_step, state.max_steps, self.loss, each * (state.max_steps - state.global_step))
        )
        self.wait = min(LONGEST, 2 * self.wait)
        self.due = now + self.wait


def progress_line(step: int, steps: int, loss: float | None, seconds_left: float) -> str:
    """As "step 10 of 40, loss 0.6931, 0:00:12 left"."""
    hours, rest = divmod(round(seconds_left), 3600)
    words = "" if loss is None else f"loss {loss:.4f}, "
    return f"step {step:,} of {steps:,}, {words}{hours}:{rest // 60:02}:{rest % 60:02} left"


def say_lines(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Lines in place of the Trainer's bar and of its log as dictionaries."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(ProgressLines(say))
