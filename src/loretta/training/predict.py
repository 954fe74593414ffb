"""Use a finished run: score it, apply it to new text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loretta.errors import InputError
from loretta.memory import is_out_of_memory
from loretta.tasks.base import Task
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PromptedTask
from loretta.training.data import encode
from loretta.training.generate import Sampling, continue_text
from loretta.training.loaded import LoadedRun
from loretta.training.loaded import load_run as load_run
from loretta.training.model import TASK_TYPES
from loretta.training.prompted import encode_examples, judge
from loretta.training.scores import prediction_rows, score_logits


@torch.inference_mode()
def evaluate(run: LoadedRun, task: Task | PromptedTask, split: str) -> dict[str, float]:
    """The task's metrics on one split. Raises InputError for a task of another kind or with other labels."""
    if isinstance(task, PromptedTask):
        return _judge(run, task, split)
    if task.kind != run.kind or (task.label_names and list(task.label_names) != run.record.label_names):
        raise InputError(
            f"the run was trained on a {run.kind} task with the labels {run.record.label_names}, and "
            f"'{task.name}' is a {task.kind} task with {list(task.label_names)}: give data with the same labels"
        )
    data = getattr(task, split)
    if data is None:
        raise InputError(f"'{task.name}' has no {split} split: choose another with --split")
    if run.kind == "language_modeling":
        blocks = encode(data, task, run.tokenizer, run.config.max_length)
        losses = [
            run.model(input_ids=ids, labels=ids).loss.double()
            for row in blocks["input_ids"]
            for ids in [torch.tensor([row], device=run.model.device)]
        ]
        loss = float(torch.stack(losses).mean())
        return {"loss": loss, "perplexity": float(torch.tensor(loss).exp())}
    texts = [list(data[column]) for column in task.columns]
    return score_logits(task, torch.cat(list(_logits(run, texts))).numpy(), list(data["label"]))


def _judge(run: LoadedRun, task: PromptedTask, split: str) -> dict[str, float]:
    if TASK_TYPES[run.kind] != "CAUSAL_LM":
        raise InputError(
            f"the run was trained on a {run.kind} task, and '{task.name}' is put in words: give data with labels"
        )
    examples = getattr(task, split)
    texts = encode_examples(examples, run.tokenizer, run.config)
    return judge(run.model, run.tokenizer, task, examples, texts, run.config, progress=split).values


def text_columns(run: LoadedRun) -> tuple[str, ...]:
    """The columns of text, by their names in the data, that a run was trained on."""
    if run.config.data in GLUE:
        return GLUE[run.config.data].columns
    pair = (run.config.text_pair,) if run.config.text_pair else ()
    return (run.config.text or "text", *pair)


def predict(
    run: LoadedRun,
    texts: Sequence[Sequence[str]],
    *,
    all_probabilities: bool = False,
    go_on: Callable[[LoadedRun, str], str] | None = None,
) -> list[dict[str, Any]]:
    """One row per example. ``texts`` holds the text columns, as the run was trained with them.

    Classification gives "label" and its "probability" (with ``all_probabilities`` also a "probability_NAME" for each
    class), regression a "score", a language model a "continuation" (``go_on`` of each text, greedy without it).
    Raises InputError for one text where the run was trained on pairs, and the other way round.
    """
    columns = text_columns(run)
    if TASK_TYPES[run.kind] != "CAUSAL_LM" and len(texts) != len(columns):
        advice = "give the pair too" if len(texts) < len(columns) else "leave the pair out"
        raise InputError(
            f"each example of the run has {' and '.join(map(repr, columns))}, got {len(texts)} texts of each: {advice}"
        )
    if TASK_TYPES[run.kind] == "CAUSAL_LM":
        return [{"continuation": go_on(run, t) if go_on else continue_text(run, t, Sampling())} for t in texts[0]]
    names = run.record.label_names
    if all_probabilities and not names:
        raise InputError(f"the run was trained on a {run.kind} task, which has scores and no probabilities")
    return [
        row for logits in _logits(run, texts) for row in prediction_rows(logits, names, all_of_them=all_probabilities)
    ]


@torch.inference_mode()
def _logits(run: LoadedRun, texts: Sequence[Sequence[str]]) -> Iterator[Tensor]:
    """(B, labels) logits in float32 on the CPU, batch by batch and in order; what does not fit is halved."""
    size, start = run.config.eval_batch_size, 0
    while start < len(texts[0]):
        try:
            logits = _logits_of(run, [list(column[start : start + size]) for column in texts])
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            continue
        yield logits
        start += size


def _logits_of(run: LoadedRun, columns: Sequence[list[str]]) -> Tensor:
    batch: Mapping[str, Tensor] = run.tokenizer(
        *columns, truncation=True, max_length=run.config.max_length, padding=True, return_tensors="pt"
    ).to(run.model.device)
    logits: Tensor = run.model(**batch).logits
    return logits.float().cpu()
