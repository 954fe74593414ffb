"""Quantised bases: the words of ``--quantize``, and what each needs for loading and training."""

import importlib.util
import logging
from typing import Any, get_args

import torch
from peft import prepare_model_for_kbit_training
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from loretta import quantizer_logs
from loretta.errors import InputError
from loretta.training.config import Quantization
from loretta.tuners.layer import keep_differentiable
from loretta.tuners.task_types import HEADS, HIDDEN_LAYERS

_PACKAGES = {name: "torchao" if name in ("torchao-int8", "fp8") else "bitsandbytes" for name in get_args(Quantization)}
# The layers between an encoder and the labels stay in float, because they are trained whole. By itself transformers
# would spare the module of the last parameter alone.
_WHOLE = (*HEADS, "pre_classifier", *(name.partition(".")[0] for name in HIDDEN_LAYERS))


def quantized_loading(name: str, *, task_type: str, dtype: str, cpu: bool) -> dict[str, Any]:
    """Options for ``from_pretrained`` with which it quantises the linear layers of a base while loading it.

    The base lands on the accelerator where there is one, unless ``cpu``: many quantised weights cannot be moved later.
    Raises InputError for an unknown name and for a missing package.
    """
    if name not in _PACKAGES:
        raise InputError(f"quantize={name!r} is none of {', '.join(_PACKAGES)}")
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        raise InputError(f"quantize={name!r} needs the package {_PACKAGES[name]}: pip install 'loretta-peft[quantize]'")
    quantizer_logs.show()
    whole = None if task_type == "CAUSAL_LM" else [rf"(.*\.)?{head}" for head in _WHOLE]
    on_cpu = cpu or not torch.cuda.is_available()
    return {
        "quantization_config": _config(name, whole, dtype),
        "device_map": {"": "cpu" if on_cpu else torch.cuda.current_device()},
    }


def _config(name: str, whole: list[str] | None, dtype: str) -> BitsAndBytesConfig | TorchAoConfig:
    if _PACKAGES[name] == "torchao":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # type: ignore # has no types

        weights = Float8WeightOnlyConfig() if name == "fp8" else Int8WeightOnlyConfig()
        return TorchAoConfig(weights, modules_to_not_convert=whole)
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_compute_dtype=None if dtype == "auto" else getattr(torch, dtype),
        llm_int8_skip_modules=whole,
    )


def require_quantized(base: PreTrainedModel, name: str) -> None:
    """Raise InputError when ``name`` has left every layer of ``base`` in its float form."""
    known = get_quantization_kwargs(base)
    if not any(resolve_quantization_backend(module, **known) for module in base.modules()):
        raise InputError(
            f"quantize={name!r} changes no layer of '{base.config.name_or_path}', whose layers are not of the class "
            f"nn.Linear: choose another of {', '.join(_PACKAGES)}, or none"
        )


def prepare_quantized(base: PreTrainedModel) -> None:
    """Make a base with quantised weights ready for an adapter, as PEFT recommends: all frozen, norms in float32.

    The same before training and before using the adapter, so that both compute the same. A base that is not quantised
    stays as it is.
    """
    if not getattr(base, "is_quantized", False):
        return
    # the Trainer turns checkpointing on when the run asks for it
    prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    keep_differentiable(base)
    # one line per layer and step, that it computes in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
