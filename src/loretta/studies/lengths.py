"""How long the examples of a run are: what a training step computes, and what it holds at most."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from datasets import Dataset

from loretta.errors import InputError
from loretta.tasks.base import Task
from loretta.tasks.sources import names_files
from loretta.training.config import RunConfig
from loretta.training.data import load_config_task
from loretta.training.forms import form_of
from loretta.training.forms.labels import lengths_of as tokens_of
from loretta.training.forms.turns import Rows
from loretta.training.model import load_tokenizer
from loretta.training.trainer import EpochOrder

MEASURED = 1000  # rows that stand for all: drawn at random, of prompts and conversations the first
# what decides how a row is encoded, and with which others it stands in a batch
_DECIDE = (
    "model", "data", "data_dir", "text", "text_pair", "label", "kind", "validation", "test", "separator", "split",
    "limit", "max_length", "prompted", "train_as", "sample", "batch_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of an example as it is padded in its batch, on average, and of the longest one."""

    mean: float
    longest: int
    known: bool = True  # or the longest that are allowed, where the data or a tokenizer is not at hand


def lengths_of(config: RunConfig) -> Lengths:
    """The lengths of the training examples of a run."""
    return _lengths(config.model_dump_json(include=set(_DECIDE)))


@lru_cache(maxsize=64)
def _lengths(options: str) -> Lengths:
    config = RunConfig.model_validate_json(options)
    full = Lengths(mean=config.max_length, longest=config.max_length, known=False)
    if config.data_dir is None and not names_files(config.data):
        return full
    try:
        task: Any = load_config_task(config)
        if task.kind == "language_modeling":
            return replace(full, known=True)  # of blocks
        few = task.limited(MEASURED) if isinstance(task, Task) else replace(task, train=task.train[:MEASURED])
        examples = form_of(task.kind).encode(config, few, load_tokenizer(config.model), "train")
    except InputError:
        return full
    if isinstance(examples, Dataset):
        found = [(length, 1) for length in tokens_of(examples)]
    elif isinstance(examples, Rows):
        found = [(min(length, config.max_length), 1) for length in examples.tokens]
    else:  # prompts, each with its options beside each other
        found = [(len(texts), len(texts.options)) for texts in examples]
    lengths = [length for length, _ in found]
    alike = None if isinstance(examples, Rows) else lengths  # TRL's trainers take them as they come
    order = list(EpochOrder(len(found), seed=config.seed, batch_size=config.batch_size, lengths=alike))
    tokens = 0
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        tokens += max(lengths[k] for k in batch) * sum(found[k][1] for k in batch)
    return Lengths(mean=tokens / len(found), longest=max(length * texts for length, texts in found))
