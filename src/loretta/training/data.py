"""The data of a run: the task that its options name, and the splits of the task as token ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from loretta.errors import InputError
from loretta.plan import default_task_type, find_config
from loretta.tasks import load_task
from loretta.tasks.base import Task
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED, PromptedTask, Sample, load_prompted
from loretta.training.config import RunConfig
from loretta.training.prompted import Texts, encode_task


def load_config_task(config: RunConfig) -> Task | PromptedTask:
    """The task that ``config`` names, in words or as a table, cut to ``limit`` rows a split.

    Raises InputError as ``load_task`` and ``load_prompted`` do, and for options that are of the other form.
    """
    data_dir = Path(config.data_dir) if config.data_dir else None
    task: Task | PromptedTask
    if is_prompted(config):
        of_tables = ("text", "text_pair", "label", "kind", "validation", "test")
        if given := [f"{key}={getattr(config, key)!r}" for key in of_tables if getattr(config, key) is not None]:
            raise InputError(f"'{config.data}' is put in words and has its own splits: leave out {', '.join(given)}")
        task = load_prompted(config.data, data_dir=data_dir, sample=Sample(**config.sample), seed=config.seed)
    else:
        if config.sample or config.train_as != "auto":
            raise InputError(
                f"sample and train_as are for prompted tasks ({', '.join(PROMPTED)}) on a causal language model, and "
                f"'{config.data}' on '{config.model}' is none: leave them out"
            )
        task = load_task(
            config.data,
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            kind=config.kind,
            data_dir=data_dir,
            validation=Path(config.validation) if config.validation else None,
            test=Path(config.test) if config.test else None,
            seed=config.seed,
        )
    if task.kind == "language_modeling":
        refuse_encoder(config.model)
    return task if config.limit is None else task.limited(config.limit)


def refuse_encoder(model: str) -> None:
    """Raise InputError for a model that sees what comes next: its loss on the next token says nothing."""
    found = find_config(model)
    if default_task_type(found) == "SEQ_CLS" and not getattr(found, "is_decoder", False):
        raise InputError(
            f"'{model}' ({found.model_type}) is an encoder, which reads a text from both sides and cannot be trained "
            "to go on with it: give a decoder, or --label COLUMN to classify"
        )


def is_prompted(config: RunConfig) -> bool:
    """Whether the task is put in words for the model to go on with. Raises InputError where it cannot be."""
    if config.data not in PROMPTED:
        if config.prompted:
            raise InputError(f"prompted: '{config.data}' has no prompt; there are {', '.join(PROMPTED)}")
        return False
    has_table = config.data in GLUE
    if config.prompted is False and has_table:
        return False
    if config.prompted is False:
        raise InputError(f"prompted=false: '{config.data}' has no other form than a prompt")
    is_causal = default_task_type(find_config(config.model)) == "CAUSAL_LM"
    if not is_causal and (config.prompted or not has_table):
        raise InputError(
            f"'{config.data}' is put in words for a causal language model, and '{config.model}' is none: give a decoder"
        )
    return is_causal


def check_loss(config: RunConfig, task: Task | PromptedTask) -> None:
    """Raise InputError for a loss that the task does not have."""
    if config.train_as == "classification" and task.kind == "generation":
        raise InputError(f"train_as='classification': '{task.name}' has no options to choose from, leave it out")


def encode_splits(
    config: RunConfig, task: Task | PromptedTask, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Dataset] | dict[str, list[Texts]]:
    """The splits that there are as token ids. Raises InputError as :func:`encode` and ``encode_task`` do."""
    if isinstance(task, PromptedTask):
        return encode_task(task, tokenizer, config)
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    return {
        split: encode(data, task, tokenizer, config.max_length) for split, data in splits.items() if data is not None
    }


def count_cut(
    encoded: Mapping[str, Any], task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[int, int]:
    """How many examples of all splits are longer than ``max_length`` tokens, and how many there are."""
    cut = total = 0
    for split, examples in encoded.items():
        data = getattr(task, split)
        total += len(data)
        full = [row for row, ids in enumerate(examples["input_ids"]) if len(ids) >= max_length]
        if full:
            columns = [data.select(full)[column] for column in task.columns]
            ids = tokenizer(*map(list, columns), verbose=False)["input_ids"]
            cut += sum(len(row) > max_length for row in ids)
    return cut, total


def encode(data: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of a split: an example a row, or (language modelling) blocks of ``max_length`` tokens.

    Raises InputError when the text is too short for one block.
    """
    if task.kind != "language_modeling":
        columns = [data[column] for column in task.columns]
        tokens = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        return Dataset.from_dict({**tokens, "labels": list(data["label"])})
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for row in tokenizer(list(data["text"]), verbose=False)["input_ids"] for token in [*row, *end]]
    blocks = [ids[k : k + max_length] for k in range(0, len(ids) - max_length + 1, max_length)]
    if not blocks:
        raise InputError(
            f"a split of '{task.name}' has {len(ids)} tokens, less than one block of {max_length}: "
            "give more text or a smaller max_length"
        )
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * max_length] * len(blocks)})
