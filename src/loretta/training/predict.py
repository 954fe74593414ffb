"""Use a finished run: load its adapter again, score it, apply it to new text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from loretta.convert.load import load_adapter
from loretta.errors import InputError
from loretta.locks import refuse_held
from loretta.record import RunRecord
from loretta.tasks.base import Task
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PromptedTask
from loretta.training.config import RunConfig, recorded_config
from loretta.training.data import encode
from loretta.training.folder import ADAPTER
from loretta.training.methods import FULL, find_method
from loretta.training.model import TASK_TYPES, Trained, load_base, load_tokenizer
from loretta.training.prompted import encode_examples, judge
from loretta.training.scores import prediction_rows, score_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """A finished run with its adapter on the base model again, or the fine-tuned model itself."""

    record: RunRecord
    config: RunConfig
    model: Trained
    tokenizer: PreTrainedTokenizerBase
    kind: str


def load_run(folder: Path, *, model: str | None = None, cpu: bool = False) -> LoadedRun:
    """Load the adapter of a run folder onto its base model, or onto ``model`` where that has moved.

    Raises InputError when the folder holds no run or the adapter does not fit.
    """
    refuse_held(folder)
    record = RunRecord.load(folder / "run.json")
    config = recorded_config(record.config, folder / "run.json")
    name = model or config.model
    tokenizer = load_tokenizer(name)
    whole = find_method(record.method) is FULL
    # what the checkpoint lacks and the adapter's file leaves out is random: the same as in the run
    set_seed(config.seed)
    base = load_base(
        str(folder / ADAPTER) if whole else name,
        record.kind,
        label_names=tuple(record.label_names),
        dtype=config.dtype,
        quantize=config.quantize,
        cpu=cpu,
        pad_token_id=tokenizer.pad_token_id,
    )
    adapted = base.eval() if whole else load_adapter(base, folder / ADAPTER)
    # a quantised base may already lie there, and not every one may be moved
    if torch.cuda.is_available() and not cpu and adapted.device.type == "cpu":
        adapted = adapted.cuda()
    return LoadedRun(record=record, config=config, model=adapted, tokenizer=tokenizer, kind=record.kind)


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


def predict(run: LoadedRun, texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One row per example. ``texts`` holds the text columns, as the run was trained with them.

    Classification gives "label" and its "probability", regression a "score", a language model a "continuation".
    Raises InputError for one text where the run was trained on pairs, and the other way round.
    """
    columns = text_columns(run)
    if TASK_TYPES[run.kind] != "CAUSAL_LM" and len(texts) != len(columns):
        advice = "give the pair too" if len(texts) < len(columns) else "leave the pair out"
        raise InputError(
            f"each example of the run has {' and '.join(map(repr, columns))}, got {len(texts)} texts of each: {advice}"
        )
    if TASK_TYPES[run.kind] == "CAUSAL_LM":
        return [{"continuation": _continue(run, text)} for text in texts[0]]
    return [row for logits in _logits(run, texts) for row in prediction_rows(logits, run.record.label_names)]


@torch.inference_mode()
def _logits(run: LoadedRun, texts: Sequence[Sequence[str]]) -> Iterator[Tensor]:
    """(B, labels) logits in float32 on the CPU, batch by batch and in order."""
    size = run.config.eval_batch_size
    for start in range(0, len(texts[0]), size):
        batch: Mapping[str, Tensor] = run.tokenizer(
            *[list(column[start : start + size]) for column in texts],
            truncation=True,
            max_length=run.config.max_length,
            padding=True,
            return_tensors="pt",
        ).to(run.model.device)
        yield run.model(**batch).logits.float().cpu()


@torch.inference_mode()
def _continue(run: LoadedRun, text: str) -> str:
    inputs = run.tokenizer(text, return_tensors="pt").to(run.model.device)
    inputs.pop("token_type_ids", None)
    out = run.model.generate(**inputs, max_new_tokens=50, do_sample=False, pad_token_id=run.tokenizer.pad_token_id)
    return run.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
