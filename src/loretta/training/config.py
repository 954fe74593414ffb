"""The options of one run as plain frozen data: from a YAML file, the command line, and ``--set key=value``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loretta.errors import InputError
from loretta.options import parse_option

Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "fp8"]
HeadPolicy = Literal["method", "full", "frozen"]


class RunConfig(BaseModel):
    """One training run.

    Every key may stand in the YAML file of ``--config`` and after ``--set``; a key that is none of these is an
    option of the method (``--set tensor_rank=8`` is ``method_args: {tensor_rank: 8}``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Hub id or folder of the base model")
    data: str = Field(description="GLUE or prompted task, 'stdlib', or the path of a table or text file")
    method: str = "rep"
    method_args: dict[str, Any] = {}
    head_policy: HeadPolicy = Field(
        default="method",
        description="what is trained of a classification head. method: what the method itself does (LoRETTA: its "
        "train_head; PEFT's: the final layer; ft: all); full: its hidden and its final layer, dense, for every method; "
        "frozen: nothing",
    )
    start_from: str | None = Field(
        default=None,
        description="folder of a finished run of the same method, whose trained weights this one starts from",
    )
    output: str | None = Field(default=None, description="folder of the run; default runs/DATA-METHOD-sSEED")

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    kind: Literal["classification", "regression", "language_modeling"] | None = None
    validation: str | None = None
    test: str | None = None
    data_dir: str | None = None
    limit: int | None = Field(default=None, ge=1, description="use at most this many rows of each split")

    prompted: bool | None = Field(
        default=None, description="put a task in words; default: where it has a prompt and the model is a causal one"
    )
    train_as: Literal["auto", "classification", "language_modeling"] = Field(
        default="auto",
        description="loss of a prompted task. classification: cross-entropy over the mean log-probabilities of all "
        "options; language_modeling: of the gold completion; auto: the former where all examples have the same options",
    )
    sample: dict[Literal["train", "validation", "test"], Annotated[int, Field(ge=1)]] = Field(
        default={}, description="examples of a prompted task to draw; default: 1000, 500 and 1000"
    )
    max_new_tokens: int = Field(default=50, ge=1, description="of an answer that is generated")

    epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1, description="in place of epochs")
    batch_size: int = Field(default=16, ge=1)
    eval_batch_size: int = Field(default=64, ge=1)
    learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="default: the method's (loretta.training.methods)"
    )
    head_learning_rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="of the final layer, which starts from nothing; default: learning_rate",
    )
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps")
    warmup_steps: int | None = Field(default=None, ge=0, description="in place of warmup")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    max_length: int = Field(default=128, ge=2, description="tokens per example, or per block in language modelling")
    eval_steps: int | None = Field(default=None, ge=1, description="default: after each epoch")
    select_by: Literal["metric", "loss"] | None = Field(
        default=None, description="what chooses the best checkpoint; default: the metric, of a prompted task the loss"
    )
    logging_steps: int = Field(default=10, ge=1)
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    quantize: Quantization | None = Field(default=None, description="load the base with quantised weights")
    bf16: bool = Field(default=False, description="autocast the forward pass to bfloat16")
    gradient_checkpointing: bool = False
    cuda_graph: bool = Field(
        default=False,
        description="replay training steps as CUDA graphs, one for each length of batch: faster where the GPU waits "
        "for the CPU; where that cannot be, a line says why",
    )
    cpu: bool = Field(default=False, description="stay on the CPU even where there is an accelerator")
    tensorboard: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{Path(self.data).stem}-{self.method.replace(':', '-')}-s{self.seed}")


def read_config(path: Path | None, options: Mapping[str, Any], sets: Sequence[str] = ()) -> RunConfig:
    """Merge a YAML file, command-line options (None means not given) and ``key=value`` words, later ones winning.

    Raises InputError that names every mistake at once.
    """
    raw = _read_yaml(path) if path is not None else {}
    raw |= {key: value for key, value in options.items() if value is not None}
    for word in sets:
        key, value = parse_option(word)
        key = key.removeprefix("method_args.")
        if key in RunConfig.model_fields and key != "method_args":
            raw[key] = value
        else:
            raw["method_args"] = {**(raw.get("method_args") or {}), key: value}
    try:
        return RunConfig(**raw)
    except ValidationError as error:
        raise InputError(_all_mistakes(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"the config file '{path}' does not exist: give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"the config file '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"the config file '{path}' holds no keys: write lines such as 'epochs: 3'")
    return raw


def _all_mistakes(error: ValidationError) -> str:
    problems = []
    for mistake in error.errors():
        key = ".".join(map(str, mistake["loc"]))
        if mistake["type"] == "missing":
            problems.append(f"{key} is missing: give --{key.replace('_', '-')}")
        elif mistake["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}: put a method's options under method_args")
        else:
            problems.append(f"{key}={mistake['input']!r}: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}")
    return "run options: " + "; ".join(problems)
