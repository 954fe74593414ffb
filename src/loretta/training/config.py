"""The options of one run as plain frozen data: from a YAML file, the command line, and ``--set key=value``."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from loretta.errors import InputError
from loretta.files import read_plain
from loretta.options import parse_option, read_yaml, wanted
from loretta.tasks.base import Kind
from loretta.tasks.read import short_name
from loretta.wording import one_line, quoted

Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "fp8"]
HeadPolicy = Literal["method", "full", "frozen"]

# options that say which rows and columns of a user's own data are read
OF_A_TABLE = ("text", "text_pair", "label", "kind", "validation", "test", "separator", "split")
# other words for an option, wherever an option may stand
ALIASES = {"lr": "learning_rate", "epoch": "epochs", "eval": "validation", "batch": "batch_size"}
_SAMPLE = re.compile(r"\s*\w+=\d{1,9}\s*(,\s*\w+=\d{1,9}\s*)*", re.ASCII)


def read_sample(given: object) -> object:
    """``train=100,test=50``, as a command line says it, as a mapping; anything else as it is."""
    if not isinstance(given, str) or not _SAMPLE.fullmatch(given):
        return given
    pairs = [word.strip().split("=") for word in given.split(",")]
    found = {split: int(number) for split, number in pairs}
    return found if len(found) == len(pairs) else given


def _kinds(hint: Any) -> Iterator[Any]:
    """The types of which a hint is made."""
    yield hint
    for part in get_args(hint):
        yield from _kinds(part)


class RunConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """One training run.

    Every key is an option of ``loretta train`` and may stand in the YAML file of ``--config`` and after ``--set``.
    A key there that is none of these is an option of the method, as if it stood in ``method_args``.
    """

    model: str = Field(description="Hub id or folder of the base model.")
    data: str = Field(
        description="GLUE or prompted task, 'stdlib', CSV, TSV, JSONL, Parquet or text files (one, several with "
        "commas, a pattern, a folder), or a dataset on the Hub as org/name:config.",
    )
    method: str = Field(
        default="compact",
        description="compact (rep as it measured best), auto (by the budget), rep, adp, shared, lora, ia3, ft, norms, "
        "head, ..., or any of PEFT's as peft:NAME.",
    )
    budget: str | None = Field(
        default=None,
        description="Trained parameters (100k) or bytes (400kB) at most: takes method auto, the form that measured "
        "best among those that fit; with rep, adp or shared the highest rank that fits. An option of the method.",
    )
    method_args: dict[str, Any] = Field(default={}, description="Options of the method, each by --set.")
    adaptive_ranks: bool = Field(
        default=False,
        description="Start with higher ranks than the budget allows, and end within it with ranks where they earn most "
        "(rep and compact). Measured as no gain yet, and for compact as a loss (docs/choosing.md). An option of the "
        "method.",
    )
    head_policy: HeadPolicy = Field(
        default="method",
        description="What is trained of a classification head. method: what the method itself does (LoRETTA: its "
        "train_head; PEFT's: the final layer; ft: all); full: its hidden and its final layer, dense, for every method; "
        "frozen: nothing.",
    )
    start_from: str | None = Field(
        default=None,
        description="Folder of a finished run of the same method, whose trained weights this one starts from.",
    )
    output: str | None = Field(default=None, description="Folder of the run; default: runs/DATA-METHOD-sSEED.")

    text: str | None = Field(default=None, description="Column with the text; default: 'text'.")
    text_pair: str | None = Field(default=None, description="Column with the second text of a pair.")
    label: str | None = Field(default=None, description="Column with the label; default: 'label'.")
    kind: Kind | None = Field(default=None, description="Of the task; default: by the columns and the label.")
    validation: str | None = Field(default=None, description="File to validate on; default: a part of the data.")
    test: str | None = Field(default=None, description="File to test the best checkpoint on.")
    separator: str | None = Field(default=None, description="Between the cells of a CSV or TSV: ';', '|', tab.")
    split: str | None = Field(
        default=None,
        description="Of a dataset on the Hub: its name for train, or train=NAME,validation=NAME,test=NAME.",
    )
    data_dir: str | None = Field(default=None, description="Folder with the tasks' files, one folder a task.")
    limit: int | None = Field(default=None, ge=1, description="Use at most this many rows of each split.")

    prompted: bool | None = Field(
        default=None, description="Put a task in words; default: where it has a prompt and the model is a causal one."
    )
    train_as: Literal["auto", "classification", "language_modeling"] = Field(
        default="auto",
        description="Loss of a prompted task. classification: cross-entropy over the mean log-probabilities of all "
        "options; language_modeling: of the gold completion; auto: the former where all examples have the same "
        "options.",
    )
    sample: Annotated[
        dict[Literal["train", "validation", "test"], Annotated[int, Field(ge=1)]], BeforeValidator(read_sample)
    ] = Field(
        default={},
        description="Examples of a prompted task to draw, as train=100,test=50; default: 1000, of validation 500.",
    )
    max_new_tokens: int = Field(default=50, ge=1, description="Of an answer that is generated.")

    epochs: float = Field(default=3.0, gt=0, lt=1e6, description="Passes over the training data.")
    max_steps: int | None = Field(default=None, ge=1, description="Steps to train, in place of epochs.")
    batch_size: int = Field(
        default=16, ge=1, description="Examples in a training step, of all processes of a launcher together."
    )
    accumulate: int = Field(default=1, ge=1, description="Training steps whose gradients make one update.")
    auto_batch: bool = Field(
        default=False,
        description="Where the memory is too small for a batch: halve it and double accumulate, for the same updates.",
    )
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="Where a loss or gradient is not finite: stop the run with status 3, skip such updates, or go back "
        "to the last checkpoint and on at half the learning rate, at most three times.",
    )
    eval_batch_size: int = Field(default=64, ge=1, description="Examples scored at once.")
    learning_rate: float | None = Field(default=None, gt=0, description="Default: the method's own.")
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Of the final layer, which starts from nothing; default: the learning rate."
    )
    optimizer: str | None = Field(
        default=None, description="Any of the Trainer's: adamw_torch, sgd, adafactor, lion_8bit, ...; default: AdamW."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Of the optimizer.")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Steps in which the rate rises, in place of warmup."
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="How the rate falls after the warm-up."
    )
    beta: float = Field(default=0.1, gt=0, description="Of DPO: how strongly pairs are held to the base model.")
    packing: bool = Field(
        default=False, description="Put several chats or completions into one row, each seeing itself alone."
    )
    max_length: int = Field(default=128, ge=2, description="Tokens per example, or per block in language modelling.")
    eval_steps: int | None = Field(default=None, ge=1, description="Steps between evaluations; default: an epoch.")
    select_by: Literal["metric", "loss"] | None = Field(
        default=None, description="What chooses the best checkpoint; default: the metric, of a prompted task the loss."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many evaluations in a row that are no better than the best."
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between lines of the log.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,  # NumPy takes no other
        description="Of the start, the order of the data and what is drawn or held out.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="Of the base model's weights; auto: as they are stored."
    )
    quantize: Quantization | None = Field(default=None, description="Load the base in fewer bits.")
    bf16: bool = Field(default=False, description="Autocast the forward pass to bfloat16.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass, which saves memory."
    )
    cuda_graph: bool = Field(
        default=False,
        description="Replay training steps as CUDA graphs, one for each length of batch: faster where the GPU waits "
        "for the CPU; where that cannot be, a line says why. Runs that are trained together always are.",
    )
    fsdp: bool = Field(
        default=False,
        description="Share the base's weights out over the processes of torchrun (FSDP2), where one GPU is too small.",
    )
    cpu: bool = Field(default=False, description="Stay on the CPU even where there is an accelerator.")
    tensorboard: bool = Field(default=False, description="Also log for TensorBoard.")
    report_to: str | None = Field(
        default=None, description="Also log to the Trainer's other reporters, as wandb,mlflow,trackio."
    )
    push_to_hub: str | None = Field(
        default=None, description="Hub id of the repository (private when new) that adapter/ goes to at the end."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_budget(cls, raw: Any) -> Any:
        """A budget is an option of the method, and alone it chooses the method. So are adaptive ranks."""
        if not isinstance(raw, dict) or not isinstance(raw.get("method_args", {}), dict):
            return raw
        given = {key: raw[key] for key in ("budget", "adaptive_ranks") if raw.get(key)}
        if not given:
            return raw
        kept = {key: value for key, value in raw.items() if key not in given}
        if "budget" in given and "adaptive_ranks" not in given:
            kept["method"] = raw.get("method") or "auto"
        return {**kept, "method_args": {**raw.get("method_args", {}), **given}}

    @field_validator("model", "start_from", "output")
    @classmethod
    def _from_home(cls, value: str | None) -> str | None:
        """As ``data`` is read: no shell expands ``~`` in a file of options, nor bash in ``--output=~/runs``."""
        return os.path.expanduser(value) if value is not None else None

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = {*_kinds(cls.model_fields[str(info.field_name)].annotation)}
        if isinstance(value, bool) and kinds & {int, float}:
            raise PydanticCustomError("number", "must be a number")
        # beyond 32 bits tokenizers, loaders and clocks overflow; a seed has a bound of its own
        if isinstance(value, int) and int in kinds and value >= 1 << 31 and info.field_name != "seed":
            raise PydanticCustomError("number", "must be below 2,147,483,648")
        return value

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{short_name(self.data)}-{self.method.replace(':', '-')}-s{self.seed}")


# how --help groups the options
GROUPS: dict[str, tuple[str, ...]] = {
    "What to train": (
        "model", "data", "method", "budget", "adaptive_ranks", "head_policy", "start_from", "output", "push_to_hub",
        "seed",
    ),
    "Data": (
        "text", "text_pair", "label", "kind", "validation", "test", "separator", "split", "data_dir", "limit",
        "max_length", "packing", "beta",
    ),
    "Prompted tasks": ("prompted", "train_as", "sample", "max_new_tokens"),
    "Training": (
        "epochs", "max_steps", "batch_size", "accumulate", "auto_batch", "on_nan", "learning_rate",
        "head_learning_rate", "optimizer", "weight_decay", "warmup", "warmup_steps", "schedule",
    ),
    "Evaluation and logs": (
        "eval_batch_size", "eval_steps", "select_by", "patience", "logging_steps", "tensorboard", "report_to",
    ),
    "Precision and device": ("dtype", "quantize", "bf16", "gradient_checkpointing", "cuda_graph", "fsdp", "cpu"),
}  # fmt: skip


def read_config(path: Path | None, options: Mapping[str, Any], sets: Sequence[str] = ()) -> RunConfig:
    """Merge a YAML file, command-line options (None means not given) and ``key=value`` words, later ones winning.

    The file and the words share one namespace: options of the run, their aliases, and options of the method.

    Raises InputError that names every mistake at once.
    """
    raw: dict[str, Any] = {"method_args": {}}
    if path is not None:
        for key, value in _read_yaml(path).items():
            _put(raw, key, value)
    raw |= {key: value for key, value in options.items() if value is not None}
    for word in sets:
        _put(raw, *parse_option(word))
    if empty := [key for key in RunConfig.model_fields if raw.get(key) == ""]:
        raise InputError(f"run options: {', '.join(empty)} given and empty: say what is meant, or leave it out")
    try:
        return RunConfig(**raw)
    except ValidationError as error:
        raise InputError(f"run options: {_all_mistakes(error, raw)}") from None


def recorded_config(options: Mapping[str, Any], file: Path) -> RunConfig:
    """The options of a finished run, which ``file`` holds. Raises InputError where this version does not take them."""
    try:
        return RunConfig(**options)
    except (ValidationError, TypeError) as error:
        reason = _all_mistakes(error, options) if isinstance(error, ValidationError) else one_line(error)
        raise InputError(
            f"'{file}' holds options that this version does not take ({reason}): upgrade loretta, or do the run again"
        ) from None


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    key = ALIASES.get(key, key)
    if key == "method_args" and isinstance(value or {}, dict):
        raw["method_args"] = {**raw["method_args"], **(value or {})}
    elif key in RunConfig.model_fields:
        raw[key] = value
    elif isinstance(raw["method_args"], dict):  # anything else is told with the other mistakes
        raw["method_args"] = {**raw["method_args"], key.removeprefix("method_args."): value}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(read_plain(path).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"the config file '{path}' does not exist: give the path of a YAML file") from None
    except OSError as error:
        raise InputError(f"the config file '{path}' cannot be read ({error.strerror}): give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the config file '{path}' is not YAML in UTF-8: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise InputError(f"the config file '{path}' holds no keys: write lines such as 'epochs: 3'")
    for other, key in ALIASES.items():
        if other in raw and key in raw:
            raise InputError(
                f"the config file '{path}' has both {other!r} and {key!r}, which are one: give one of them"
            )
    return {str(key): value for key, value in raw.items()}


def _all_mistakes(error: ValidationError, raw: Mapping[str, Any]) -> str:
    problems = []
    for mistake in error.errors():
        key = ".".join(map(str, mistake["loc"]))
        if mistake["type"] == "missing":
            problems.append(f"{key} is missing: give --{key.replace('_', '-')}")
        elif mistake["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}: put a method's options under method_args")
        elif mistake["loc"][0] == "sample":
            problems.append(
                f"sample={quoted(raw['sample'])} must say how many examples of train, validation and test: write "
                "train=100,test=50"
            )
        else:
            problems.append(f"{key}={quoted(mistake['input'])} {wanted(mistake)}")
    return "; ".join(dict.fromkeys(problems))
