"""The model of a run as it is before its first step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.config import RunConfig, recorded_config
from loretta.training.folder import ADAPTER, RECORD
from loretta.training.methods import FULL, find_method
from loretta.training.model import TASK_TYPES, Trained, load_base, start_from, wrap


def prepare_model(
    config: RunConfig, task: Task | PromptedTask, tokenizer: PreTrainedTokenizerBase
) -> tuple[Trained, bool]:
    """The base model with the method on it, and whether it has to compute in bfloat16.

    A new head and a new adapter are random: set the seed before. Raises InputError for a method that does not fit, a
    model that cannot be loaded, and a ``start_from`` that is no run of the same kind.
    """
    whole = find_method(config.method) is FULL
    before = None if config.start_from is None else find_start(config, task)
    base = load_base(
        str(before) if whole and before is not None else config.model,
        task.kind,
        label_names=task.label_names,
        dtype=config.dtype,
        quantize=config.quantize,
        cpu=config.cpu,
        pad_token_id=tokenizer.pad_token_id,
    )
    in_half = whole and base.dtype != torch.float32
    if in_half:
        # half precision loses the small steps of the weights: it computes, and float32 is trained
        base = base.float()
    model = wrap(base, config.method, task.kind, config.method_args, config.head_policy)
    if before is not None and isinstance(model, PeftModel):
        start_from(model, before)
    return model, config.bf16 or in_half


def find_start(config: RunConfig, task: Task | PromptedTask) -> Path:
    """The adapter that the training starts from: the one of the run ``config.start_from``.

    Raises InputError when that is no finished run, or not one of the same model, method and labels.
    """
    folder = Path(str(config.start_from))
    record = RunRecord.load(folder / RECORD)
    earlier = recorded_config(record.config, folder / RECORD)
    if find_method(earlier.method) == find_method(config.method):  # rep and loretta_rep
        earlier = earlier.model_copy(update={"method": config.method})
    then, now = _compared(earlier, record.kind, record.label_names), _compared(config, task.kind, task.label_names)
    if different := [
        f"{what} was {then.get(what)!r} and is {now[what]!r}" for what in now if then.get(what) != now[what]
    ]:
        raise InputError(
            f"cannot start from '{folder}' ({'; '.join(different)}): give a run that differs in its data alone"
        )
    return folder / ADAPTER


def _compared(config: RunConfig, kind: str, label_names: Sequence[str]) -> dict[str, Any]:
    """What two runs must share for one to start from the other."""
    own = config.model_dump(include={"model", "method", "method_args", "head_policy"})
    labels = {} if TASK_TYPES[kind] == "CAUSAL_LM" else {"the number of labels": len(label_names)}
    return {**own, "the kind of model": TASK_TYPES[kind], **labels}
