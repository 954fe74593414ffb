"""Use a finished run: score it, apply it to new text, have it go on with text, greedily or by drawing."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from loretta.errors import InputError
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.arguments import make_trainer
from loretta.training.forms import form_of
from loretta.training.loaded import NOT_FINITE, LoadedRun
from loretta.training.loaded import load_run as load_run
from loretta.training.model import TASK_TYPES, room_of
from loretta.wording import spelled


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; without a temperature and top_p it is the likeliest one.

    Raises InputError for numbers that are none of these.
    """

    max_new_tokens: int | None = None  # None: the run's own
    temperature: float | None = None
    top_p: float | None = None  # the likeliest tokens that hold this probability together

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise InputError(f"--temperature {self.temperature:g} must lie between 0 (the likeliest token) and 100")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p:g} must be above 0 and at most 1")
        if self.temperature == 0 and self.top_p is not None:
            raise InputError("--temperature 0 takes the likeliest token, and --top-p draws one: give one of them")

    def options(self, run: LoadedRun) -> dict[str, Any]:
        """Of ``generate``."""
        draws = self.temperature != 0 and (self.temperature is not None or self.top_p is not None)
        drawn = {"temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0, "top_k": 0}
        return {
            "max_new_tokens": self.max_new_tokens or run.config.max_new_tokens,
            "do_sample": draws,
            "pad_token_id": run.tokenizer.pad_token_id,
            **(drawn if draws else {"temperature": None, "top_p": None, "top_k": None}),
        }


def refuse_classifier(run: LoadedRun, mend: str) -> None:
    """Raise InputError, which says what to do, for a run that gives labels and no text."""
    if TASK_TYPES[run.kind] != "CAUSAL_LM":
        raise InputError(f"the run was trained on a {run.kind} task and goes on with no text: {mend}")


class _Spelling(TextStreamer):
    """Prints text as it is generated, without the characters that steer a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(spelled(text), stream_end)


def _refuse_nan(ids: Tensor, scores: Tensor) -> Tensor:
    if scores.isnan().any():  # of which the largest is the first
        raise InputError(f"there is no answer: {NOT_FINITE}")
    return scores


@torch.inference_mode()
def _go_on(run: LoadedRun, given: Any, sampling: Sampling, streamer: TextStreamer | None = None) -> str:
    inputs = given.to(run.model.device)
    inputs.pop("token_type_ids", None)
    asked, options = inputs["input_ids"].shape[1], sampling.options(run)
    if (room := room_of(run.model)) is not None:  # behind its positions a model has nothing to compute with
        if asked >= room:
            raise InputError(
                f"{asked:,} tokens leave no room for an answer in the {room:,} positions of the model: give a shorter "
                "text, or begin a new conversation"
            )
        options["max_new_tokens"] = min(options["max_new_tokens"], room - asked)
    with warnings.catch_warnings(), run.as_trained():
        # PEFT's own positions are right where there are no pads
        warnings.filterwarnings("ignore", message="Position ids are not supported", module="peft")
        out = run.model.generate(**inputs, **options, streamer=streamer, logits_processor=[_refuse_nan])
    return run.tokenizer.decode(out[0, asked:], skip_special_tokens=True)


def reply(run: LoadedRun, asked: str | Sequence[Mapping[str, str]], sampling: Sampling) -> str:
    """The continuation of a text, or the answer to messages; to a run that was trained on chats all is a message."""
    if isinstance(asked, str) and run.kind != "chat":
        return _go_on(run, run.tokenizer(asked, return_tensors="pt"), sampling)
    return answer_chat(run, [{"role": "user", "content": asked}] if isinstance(asked, str) else asked, sampling)


def answer_chat(
    run: LoadedRun, messages: Sequence[Mapping[str, str]], sampling: Sampling, *, show: bool = False
) -> str:
    """The next turn of a conversation, by the tokenizer's chat template.

    A tokenizer without one continues the last message as plain text. ``show`` prints the words as they come.
    """
    if run.tokenizer.chat_template:
        inputs = run.tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = run.tokenizer(messages[-1]["content"], return_tensors="pt")
    streamer = _Spelling(run.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    return _go_on(run, inputs, sampling, streamer)


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


def answers(
    run: LoadedRun,
    asked: Sequence[Sequence[Any]],
    *,
    all_probabilities: bool = False,
    go_on: Callable[[LoadedRun, Any], str] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per example, as it is computed. ``asked`` has the columns that are answered, as the run was trained with.

    Classification gives "label" and its "probability" (with ``all_probabilities`` also a "probability_NAME" for each
    class), regression a "score", a language model a "continuation" (``go_on`` of each text, greedy without it).
    Raises InputError for one text where the run was trained on pairs, and the other way round.
    """
    go_on = go_on or (lambda run, text: reply(run, text, Sampling()))
    return form_of(run.kind).predict(run, asked, all_probabilities=all_probabilities, go_on=go_on)


def predict(run: LoadedRun, asked: Sequence[Sequence[Any]], *, all_probabilities: bool = False) -> list[dict[str, Any]]:
    """As :func:`answers`, all at once."""
    return list(answers(run, asked, all_probabilities=all_probabilities))
