"""The data of a run: the task that its options name, and the splits of the task as token ids."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from loretta.errors import InputError
from loretta.files import read_object
from loretta.plan import default_task_type, find_config
from loretta.pretrained import OTHER_TOKENS, embeddings_of
from loretta.record import RunRecord
from loretta.tasks import load_task
from loretta.tasks.base import KINDS, Known, Task
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED, PromptedTask, Sample, load_prompted
from loretta.tasks.read import SEPARATORS
from loretta.tasks.sources import ending, find_files, is_hub_id, is_saved
from loretta.training.config import OF_A_TABLE, RunConfig
from loretta.training.folder import CONFIG
from loretta.training.forms import Data, form_of
from loretta.training.methods import NO_FINAL_LAYER
from loretta.training.model import TASK_TYPES
from loretta.training.sources import NAMED, was_trained_on

NAMED_TASKS = {*GLUE, *PROMPTED}


def load_other_task(config: RunConfig, record: RunRecord, data: str) -> Task | PromptedTask:
    """Other data for a finished run, read with its columns, its kind and its labels; of a file all rows in each split.

    Raises InputError as :func:`load_config_task` does, and for a label that the run has not learned.
    """
    none = dict.fromkeys((*OF_A_TABLE, "limit", "data_dir"))
    if data in NAMED:
        kept: dict[str, Any] = {"data_dir": config.data_dir}
    else:
        names = GLUE[config.data].columns if config.data in GLUE else (config.text, config.text_pair)
        kind = record.kind if record.kind in KINDS else None
        kept = {"text": names[0], "text_pair": (*names, None)[1], "label": config.label, "kind": kind}
        if is_hub_id(data) or is_saved(data):
            kept["split"] = config.split
        else:
            is_separated = ending(find_files(data)) in SEPARATORS
            # files are their own validation files: no rows are held out of them
            kept |= {"validation": data, "test": data, "separator": config.separator if is_separated else None}
    known = Known(data=config.data, label_names=tuple(record.label_names))
    return load_config_task(config.model_copy(update={**none, **kept, "data": data}), known)


def load_config_task(config: RunConfig, known: Known | None = None) -> Task | PromptedTask:
    """The task that ``config`` names, in words or as a table, cut to ``limit`` rows a split.

    Labels are ``known`` ones, or those of the data.

    Raises InputError as ``load_task`` and ``load_prompted`` do, and for options that are of the other form.
    """
    data_dir = Path(config.data_dir) if config.data_dir else None
    of_table: dict[str, Any] = {key: getattr(config, key) for key in OF_A_TABLE}
    task: Task | PromptedTask
    if _has_prompts(config):
        task = load_prompted(config.data, data_dir=data_dir, sample=Sample(**config.sample), seed=config.seed)
    else:
        task = load_task(config.data, data_dir=data_dir, seed=config.seed, known=known, **of_table)
    found = find_config(config.model) if TASK_TYPES[task.kind] == "CAUSAL_LM" else None
    if found is not None and default_task_type(found) == "SEQ_CLS" and not getattr(found, "is_decoder", False):
        # it sees the next token, and its loss on that says nothing
        raise InputError(
            f"'{config.model}' ({found.model_type}) is an encoder, which reads a text from both sides and cannot be "
            "trained to go on with it: give a decoder, or --label COLUMN to classify"
        )
    task = replace(task, notes=(*task.notes, *_seen_by_start(config)))
    return task if config.limit is None else task.limited(config.limit)


def _seen_by_start(config: RunConfig) -> list[str]:
    """A sentence where the run that this one starts from did not hold out the same rows of the same data."""
    if config.start_from is None or config.validation is not None or is_saved(config.data):
        return []
    folder = Path(config.start_from)
    before = read_object(folder / CONFIG) or {}
    drawn = config.data in PROMPTED and before.get("data") == config.data
    held_alike = before.get("seed") == config.seed and before.get("validation") is None
    if held_alike or not (drawn or was_trained_on(folder, config.data)):
        return []
    return [
        f"'{folder}', from which the training starts, was trained on rows of '{config.data}' that are held out now, "
        f"which flatters the score: give --seed {before.get('seed')} and the --validation of that run"
    ]


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


def _has_prompts(config: RunConfig) -> bool:
    """As :func:`is_prompted`; raises InputError for options of the other form, too."""
    if is_prompted(config):
        given = [f"{key}={value!r}" for key in OF_A_TABLE if (value := getattr(config, key)) is not None]
        if given:
            raise InputError(f"'{config.data}' is put in words and has its own splits: leave out {', '.join(given)}")
        return True
    if config.sample or config.train_as != "auto":
        raise InputError(
            f"sample and train_as are for prompted tasks ({', '.join(PROMPTED)}) on a causal language model, and "
            f"'{config.data}' on '{config.model}' is none: leave them out"
        )
    return False


def load_task_to_train(config: RunConfig) -> Task | PromptedTask:
    """As :func:`load_config_task`; raises InputError for options that do nothing in a training on this task, too."""
    task = load_config_task(config)
    _check_kind(config, task.name, task.kind)
    return task


def check_named_task(config: RunConfig) -> None:
    """Raise as :func:`load_task_to_train` does for options that a GLUE or prompted task does not take, unloaded."""
    prompted = _has_prompts(config)
    _check_kind(config, config.data, PROMPTED[config.data].kind if prompted else GLUE[config.data].kind)


def _check_kind(config: RunConfig, name: str, kind: str) -> None:
    """Raise InputError for a loss that a task of this kind does not have, and for options of other kinds."""
    words, has_labels = kind.replace("_", " "), TASK_TYPES[kind] != "CAUSAL_LM"
    if config.packing and kind not in ("chat", "completion"):
        raise InputError(f"packing is for chats and completions, and '{name}' is {words}: leave it out")
    if config.beta != RunConfig.model_fields["beta"].default and kind != "preference":
        raise InputError(f"beta={config.beta} is for pairs of answers, and '{name}' is {words}: leave it out")
    if has_labels and config.max_new_tokens != RunConfig.model_fields["max_new_tokens"].default:
        raise InputError(
            f"max_new_tokens={config.max_new_tokens} is for answers that are written, and '{name}' is {words}: leave "
            "it out"
        )
    if config.head_policy == "full" and not has_labels:
        raise InputError(
            f"head_policy='full' is for a head of labels, and '{name}' is {words}, which has none: leave it out"
        )
    if config.head_learning_rate is not None and not has_labels:
        raise InputError(NO_FINAL_LAYER.format(config.method))
    if config.train_as == "classification" and kind == "generation":
        raise InputError(f"train_as='classification': '{name}' has no options to choose from, leave it out")


def check_tokens(data: Data, model: nn.Module) -> None:
    """Raise InputError where the data have a token that the model has no embedding for: its tokenizer is another's."""
    if (table := embeddings_of(model)) is None:
        return
    room, form = table.num_embeddings, form_of(data.task.kind)
    given = max((form.largest_token(rows) for rows in data.splits.values()), default=0)
    if given >= room:
        raise InputError(OTHER_TOKENS.format(data.config.model, room, given, " in these data"))
    # blocks of text are of one length
    if data.task.kind != "language_modeling" and (filler := data.tokenizer.pad_token_id or 0) >= room:
        raise InputError(OTHER_TOKENS.format(data.config.model, room, filler, " to fill up rows"))


def encode_splits(config: RunConfig, task: Task | PromptedTask, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The data, with its splits encoded by the form of the task. Raises the InputError of the form."""
    form = form_of(task.kind)
    names = [split for split in ("train", "validation", "test") if getattr(task, split) is not None]
    splits = {split: form.encode(config, task, tokenizer, split) for split in names}
    return Data(config=config, task=task, tokenizer=tokenizer, splits=splits)
