"""The lines that a run prints: before its first step, now and then where nobody watches a bar, after its last step."""

import math
import shlex
import time
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from loretta.plan import trainable_by_kind
from loretta.record import RunRecord
from loretta.tasks.base import Task
from loretta.tasks.files import shared_words
from loretta.tasks.prompted import PromptedTask
from loretta.training.baseline import CHANCE, beats_baseline, chance_of
from loretta.training.config import RunConfig
from loretta.training.finish import count_all
from loretta.training.forms import Data, form_of
from loretta.training.methods import find_method
from loretta.training.sources import NAMED
from loretta.training.trainer import TwoRateTrainer
from loretta.wording import duration, quoted

MOST_LABELS = 12  # named at the start, the most frequent ones
FURTHER = 3.0  # factor between a learning rate that failed and the one to try


def first_lines(data: Data, trainer: TwoRateTrainer) -> list[str]:
    """The data, what is odd about them, what is trained, and for how long."""
    config, task, adapters = data.config, data.task, getattr(trainer.model, "peft_config", {})
    return [
        _of_task(config, task),
        _of_splits(data),
        *(f"note: {note}" for note in task.notes),
        *form_of(task.kind).lengths(data),
        *_of_shared_texts(task),
        _of_method(config, trainer),
        *(f"by the budget: {why}" for config in adapters.values() if (why := getattr(config, "why", ""))),
        _of_steps(trainer),
    ]


def _of_task(config: RunConfig, task: Task | PromptedTask) -> str:
    words = f"{task.name}: {task.kind.replace('_', ' ')}"
    has_columns = config.data not in NAMED and task.kind in ("classification", "regression", "multi_label")
    if has_columns or config.label is not None:
        words += f" of column {quoted(config.text or 'text')} by column {quoted(config.label or 'label')}"
    counts = form_of(task.kind).counts(task)
    if counts:
        named = sorted(zip(task.label_names, counts["train"], strict=True), key=lambda pair: -pair[1])
        words += "; in train " + ", ".join(f"{quoted(name)} {count:,}" for name, count in named[:MOST_LABELS])
        words += f" and {len(named) - MOST_LABELS} more classes" if len(named) > MOST_LABELS else ""
    elif task.kind == "regression":
        assert isinstance(task, Task)
        scores = list(task.train["label"])
        words += f"; in train from {min(scores):g} to {max(scores):g}, mean {sum(scores) / len(scores):.4g}"
    return words


def _of_splits(data: Data) -> str:
    unit, config = form_of(data.task.kind).unit, data.config
    files = {
        "train": None if config.data in NAMED else config.data,
        **config.model_dump(include={"validation", "test"}),
    }
    words = [
        f"{split} {len(rows):,} {unit}" + (f" ('{files[split]}')" if files[split] else "")
        for split, rows in data.splits.items()
    ]
    return ", ".join([*words, *([] if "test" in data.splits else ["no test"])])


def _of_shared_texts(task: Task | PromptedTask) -> list[str]:
    form = form_of(task.kind)
    known = set(form.texts(task, "train"))
    others = {split: form.texts(task, split) for split in ("validation", "test") if getattr(task, split) is not None}
    shared = {split: sum(text in known for text in texts) for split, texts in others.items()}
    if not any(shared.values()):
        return [f"no text of {' or '.join(shared)} is in train"]
    words = [shared_words(split, count, len(others[split])) for split, count in shared.items() if count]
    return [sentence for sentence in words if sentence not in task.notes]


def _of_method(config: RunConfig, trainer: TwoRateTrainer) -> str:
    model: Any = trainer.model
    counts, total = trainable_by_kind(model), count_all(model)
    trained = sum(counts.values())
    parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
    rate = f"learning rate {trainer.args.learning_rate:g}" + (
        " (the method's own)" if config.learning_rate is None else ""
    )
    head = "" if config.head_learning_rate is None else f", of the final layer {config.head_learning_rate:g}"
    device = "" if trainer.args.device.type == "cuda" else ", on the CPU"
    return (
        f"{config.method} on {config.model}{device}: {trained:,} of {total:,} parameters are trained "
        f"({100 * trained / total:.2g}%: {parts}), {rate}{head}"
    )


def _of_steps(trainer: TwoRateTrainer) -> str:
    args, data = trainer.args, trainer.train_dataset
    assert data is not None
    batches = math.ceil(len(data) / (args.train_batch_size * args.world_size))
    updates = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    each = f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps} rows each"
    epochs = f"{steps / updates:.3g} epoch{'' if steps == updates else 's'}"
    return f"{steps:,} steps ({epochs} of {updates:,}) of {each}"


def last_lines(record: RunRecord) -> list[str]:
    """The score beside what needs no text, whether every answer is the same, and what to try next."""
    answers, lines = record.answers, []
    if answers is not None and answers.baseline:
        values = ", ".join(f"{name} {value:.4f}" for name, value in answers.baseline.items() if name != "loss")
        lines.append(f"for comparison: {answers.constant} scores {values} on {answers.split}")
        if answers.only is not None:
            lines.append(f"every answer is the same: {quoted(answers.only)}")
    return [*lines, f"next: {next_step(record)}"]


def next_step(record: RunRecord) -> str:
    """What to try after this run, in a sentence that follows from its scores and losses."""
    config = RunConfig(**record.config)
    own_rate = find_method(config.method).learning_rate
    # without one in its options a run has its method's, or that of its rank or of the form that a budget chose
    rate = config.learning_rate or record.learning_rate or own_rate
    higher = own_rate if rate < own_rate else rate * FURTHER
    longer = f"--max-steps {2 * config.max_steps}" if config.max_steps else f"--epochs {2 * config.epochs:g}"
    losses = [point.values["loss"] for point in record.history if point.split == "train" and "loss" in point.values]
    checked = [point for point in record.history if point.split == "validation"]
    last = max((point.step for point in record.history), default=record.best_step)
    if losses and not math.isfinite(losses[-1]):
        return f"the loss is not finite: lower the rate, --lr {rate / FURTHER:.2g}"
    if beats_baseline(record) is False:
        if len(losses) > 1 and losses[-1] > 1.05 * losses[0]:
            return f"nothing was learned and the loss rose: lower the rate, --lr {rate / FURTHER:.2g}"
        return (
            f"nothing was learned: raise the rate, --lr {higher:.2g}, or train longer, {longer}; if neither helps, "
            "look whether the texts tell the label"
        )
    chance = chance_of(record)
    if chance is not None and chance > CHANCE and record.answers is not None:
        return (
            f"on {record.answers.rows} rows this may be chance (p = {chance:.2f} against the constant answer): score "
            "more rows, with --test FILE or more data"
        )
    if len(checked) > 1 and record.best_step == last:
        return f"the last evaluation was the best one: {longer} may score higher"
    held = {point.step: point.values["loss"] for point in checked if "loss" in point.values}
    # a score of few rows stands still while their loss falls: that is no over-fitting
    fell = held.get(last, math.inf) < held.get(record.best_step, -math.inf)
    if len(checked) > 2 and record.best_step <= last / 2 and not fell:
        return (
            f"step {record.best_step} of {last} was the best, and what followed fitted the training rows alone: fewer "
            f"{longer.split()[0]}, --patience 2, or more data"
        )
    own = {"model": config.model, "data": config.data, "text": config.text, "label": config.label, "kind": config.kind}
    words = [word for name, value in own.items() if value for word in (f"--{name}", value)]
    return f"whether a smaller or another method does as well: {shlex.join(['loretta', 'compare', *words])}"


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
    words = "" if loss is None else f"loss {loss:.4f}, "
    return f"step {step:,} of {steps:,}, {words}{duration(seconds_left)} left"


def say_lines(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Lines in place of the Trainer's bar and of its log as dictionaries."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(ProgressLines(say))
