"""Load a base model, wrap it with a method, load a saved adapter: each with one clear sentence when it fails."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from loretta.errors import InputError
from loretta.training.methods import peft_config
from loretta.training.quantization import prepare_quantized, quantized_loading, require_quantized

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "language_modeling": "CAUSAL_LM"}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or folder, with a padding token. Raises InputError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(model, "tokenizer", error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_base(
    model: str,
    kind: str,
    *,
    label_names: tuple[str, ...] = (),
    dtype: str = "float32",
    quantize: str | None = None,
    cpu: bool = False,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The base model with the head that the kind of task needs; a new head is random, so set the seed before.

    ``quantize`` names the form of the weights of its linear layers (:mod:`loretta.training.quantization`); such a
    base comes on the accelerator unless ``cpu``, any other on the CPU.

    Raises InputError when it cannot be loaded.
    """
    wanted: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantize is not None:
        wanted |= quantized_loading(quantize, kind=kind, dtype=dtype, cpu=cpu)
    auto: Any = AutoModelForCausalLM
    if kind != "language_modeling":
        auto = AutoModelForSequenceClassification
        wanted["num_labels"] = max(1, len(label_names))
        if kind == "regression":
            wanted["problem_type"] = "regression"
        else:
            wanted["id2label"] = dict(enumerate(label_names))
            wanted["label2id"] = {name: k for k, name in enumerate(label_names)}
    # a random head is what a fine-tuning starts from, not news
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        base = auto.from_pretrained(model, **wanted)
    except (OSError, ValueError, SafetensorError, RuntimeError, ImportError) as error:
        raise InputError(_not_loaded(model, "model", error)) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    if quantize is not None:
        require_quantized(base, quantize)
    prepare_quantized(base)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad_token_id
    return base


def wrap(base: PreTrainedModel, method: str, kind: str, options: Mapping[str, Any]) -> PeftModel:
    """``base`` with a fresh adapter of ``method``. Raises InputError when the method's options do not fit it."""
    config = peft_config(method, base, TASK_TYPES[kind], options)
    try:
        return get_peft_model(base, config)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"method {method!r} does not fit this model: {_short(error)}") from None


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """``base`` with the adapter saved in ``folder``, in inference mode.

    Raises InputError for a missing or damaged file and for an adapter of another base model.
    """
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not weights.is_file():
        raise InputError(
            f"'{folder}' holds no adapter (adapter_config.json and adapter_model.safetensors): "
            "give the folder that `loretta train` wrote"
        )
    try:
        with safe_open(weights, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"'{weights}' is damaged or truncated ({_short(error)}): copy it again or train again"
        ) from None
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the adapter in '{folder}' does not fit the base model '{base.config.name_or_path}' "
            f"({_short(error)}): give the base model it was trained on"
        ) from None


def _not_loaded(model: str, what: str, error: Exception) -> str:
    return (
        f"cannot load a {what} from '{model}' ({_short(error)}): give a Hub id that can be reached, or a model's folder"
    )


def _short(error: Exception) -> str:
    """A library's message on one line, cut where it begins to list every tensor."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else words[:300] + "..."
