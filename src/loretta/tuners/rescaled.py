"""Trained scales: factors on what keys, values and the last layers of MLPs compute, as IA3's (arXiv:2205.05638)."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from typing import Any, NamedTuple, get_args

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loretta.errors import InputError
from loretta.tuners.adapted import base_of, transformers_loads
from loretta.tuners.adapted import chain as layers_from
from loretta.tuners.changes import ChangedModule, put_changes
from loretta.tuners.config import LorettaConfig, Place
from loretta.tuners.layer import parameter_of
from loretta.tuners.norms import named_whole, outer_modules
from loretta.tuners.placement import linear_size, require_linear

_BERT = ("self.key", "self.value", r"\d+.output.dense")  # not that of attention: its input is what the values give
_LLAMA = ("k_proj", "v_proj", "down_proj")
# by ``config.model_type``: how the names of keys, values and the last layers of MLPs end, keys and values alike where
# one layer computes both (:func:`_among_outputs`); "" where they are no outputs of linear layers
NAMES: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta", "xlm-roberta-xl"), _BERT),
    "albert": ("attention.key", "attention.value", "ffn_output"),
    "deberta-v2": ("self.key_proj", "self.value_proj", r"\d+.output.dense"),
    "mpnet": ("attn.k", "attn.v", r"\d+.output.dense"),
    "distilbert": ("k_lin", "v_lin", "ffn.lin2"),
    **dict.fromkeys(("cohere", "gemma", "gemma2", "gemma3_text", "glm", "granite", "llama", "mistral"), _LLAMA),
    **dict.fromkeys(("olmo", "olmo2", "qwen2", "qwen3", "smollm3", "stablelm"), _LLAMA),
    "gemma3": (r"language_model\..*k_proj", r"language_model\..*v_proj", r"language_model\..*down_proj"),
    **dict.fromkeys(("bart", "mbart", "opt", "pegasus", "phi"), ("k_proj", "v_proj", "fc2")),
    **dict.fromkeys(("t5", "mt5"), (r"\w+Attention.k", r"\w+Attention.v", "DenseReluDense.wo")),
    "gptj": ("k_proj", "v_proj", "fc_out"),
    **dict.fromkeys(("gpt_neo", "starcoder2"), ("k_proj", "v_proj", "mlp.c_proj")),
    # the MLPs are experts, whose weights lie in one tensor
    **dict.fromkeys(("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"), ("k_proj", "v_proj", "")),
    "codegen": ("qkv_proj", "qkv_proj", "fc_out"),
    "gpt2": ("c_attn", "c_attn", "mlp.c_proj"),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), (*2 * ("query_key_value",), "dense_4h_to_h")),
    "phi3": ("qkv_proj", "qkv_proj", "down_proj"),
    "modernbert": ("Wqkv", "Wqkv", "mlp.Wo"),
    "deberta": ("", "", r"\d+.output.dense"),  # the biases of the values are added to what their layer computes
}


TIMES = 8.0  # factors like so many times the rate of trains: a step of an optimizer changes them by as much more


class Scaled(NamedTuple):
    """The factors of an adapter on the inputs or outputs of a layer, or on some of the outputs.

    ``side`` ends the parameter's name: "in", "out", or "keys" or "values" where one layer computes both. Its ``width``
    outputs are ``groups`` equal parts then, and ``size / groups`` of each are scaled, from its number ``start`` on.
    """

    name: str
    side: str
    width: int
    size: int
    groups: int = 1
    start: int = 0

    def spread(self, values: Tensor) -> Tensor:
        """(..., size) -> (..., width): zeros where nothing is scaled."""
        if self.size == self.width:
            return values
        parts = values.unflatten(-1, (self.groups, -1))
        after = self.width // self.groups - self.start - parts.shape[-1]
        return nn.functional.pad(parts, (self.start, after)).flatten(-2)


class TrainedScale(ChangedModule):
    """A linear layer whose inputs or outputs are scaled by ``1 + 8 c``, where c sums the active adapters' changes.

    An update beside it, of the layer around it, sees the inputs as they are, and its outputs are not scaled.
    """

    kind, off = "scale", "train_scales=[]"
    parameter_names = ("weight", "bias")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = require_linear("a layer to scale", base_layer)
        self.scaled: dict[str, Scaled] = {}  # by their sides

    @property
    def is_plain(self) -> bool:
        """Whether the weight is one of plain numbers, and not quantised."""
        weight = getattr(self.base_layer, "weight", None)
        return type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1

    def update_layer(self, adapter_name: str, prefix: str, *scaled: Scaled) -> None:
        self.scaled |= {each.side: each for each in scaled}
        like = self._beside("")
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        likes = {each.side: torch.empty(each.size, dtype=dtype, device=like.device) for each in scaled}
        self.hold(adapter_name, prefix, likes)

    def _beside(self, name: str) -> Tensor:
        return next(chain(self.base_layer.parameters(), self.base_layer.buffers()))

    def to_base_dtype(self, adapter_name: str) -> None:
        """As of every changed module; a quantised layer has no such dtype."""
        if self.is_plain:
            super().to_base_dtype(adapter_name)

    def scaled_by(self, attribute: str) -> Scaled:
        """What the changes in this dictionary scale."""
        return self.scaled[attribute.rpartition("_")[2]]

    def factors(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """What some adapters, with these weights, multiply with: "in" (I), "out" (O), or those of them that are."""
        found: dict[str, Tensor] = {}
        for attribute in self.adapter_layer_names:
            changes, scaled = getattr(self, attribute), self.scaled_by(attribute)
            side = "in" if scaled.side == "in" else "out"
            for name in (name for name in weights if name in changes):
                values = scaled.spread(parameter_of(changes[name], "values"))
                found[side] = found.get(side, 1) + TIMES * weights[name] * values
        return found

    def with_changes(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The scaled weight and bias."""
        if not (factors := self.factors(weights)):
            return {}
        own = {name: value for name in self.parameter_names if (value := self._own(name)) is not None}
        rows, columns = factors.get("out"), factors.get("in")
        if isinstance(self.base_layer, Conv1D):
            rows, columns = columns, rows
        value = own["weight"] if rows is None else own["weight"] * rows[:, None]
        found = {"weight": value if columns is None else value * columns}
        if "bias" in own and "out" in factors:
            found["bias"] = own["bias"] * factors["out"]
        return {name: value.to(own[name].dtype) for name, value in found.items()}

    def _call_base(self, weights: Mapping[str, float], args: Any, kwargs: Any) -> Tensor:
        factors, (x, *others) = self.factors(weights), args
        if "in" in factors:
            x = (x * factors["in"]).to(x.dtype)
        y = self.base_layer(x, *others, **kwargs)
        return (y * factors["out"]).to(y.dtype) if "out" in factors else y


def _names(model: nn.Module, asked: str) -> dict[str, str]:
    """How the names of each place end. Raises InputError for a type of model whose names are not known."""
    model_type = BaseTuner.get_model_config(model).get("model_type", "")
    if model_type not in NAMES:
        raise InputError(
            f"{asked}: the names of keys, values and MLPs are not known for the model type {model_type!r}: leave "
            f"it out, or take one of {', '.join(sorted(NAMES))}"
        )
    return dict(zip(get_args(Place), NAMES[model_type], strict=True))


def value_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers that compute values alone. Raises InputError where none is known."""
    names = _names(model, "values")
    end = names["values"] if names["values"] != names["keys"] else ""
    found = [name for name, _ in model.named_modules() if end and re.fullmatch(rf"(.*\.)?{end}", name)]
    if not found:
        raise InputError("this model has no values that are linear layers of their own")
    return found


def _among_outputs(config: Any, scaled: Scaled) -> Scaled:
    """Where keys or values are among the outputs of the layer that computes both, as transformers' models split them.

    In each group of the outputs keys are the last part but one, and values the last.
    """
    heads, size, groups = config.num_attention_heads, config.hidden_size, 1  # sizes of all keys
    order = ["keys", "values"]
    match config.model_type:
        case "bloom" | "gpt_neox":
            groups = heads
        case "codegen":
            groups, order = 4, ["values", "keys"]
        case "phi3":
            size = scaled.width // (heads + 2 * config.num_key_value_heads) * config.num_key_value_heads
        case "falcon":
            groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
            size = size // heads * groups
    start = scaled.width // groups - (2 - order.index(scaled.side)) * (size // groups)
    return scaled._replace(size=size, groups=groups, start=start)


def scaled_modules(model: nn.Module, config: LorettaConfig) -> Iterator[Scaled]:
    """What an adapter scales of the linear layers, those of one layer in turn.

    ``exclude_modules`` and ``layers_to_transform`` act on them as on targets. Raises InputError for a type of model
    whose names are not known, where nothing has such a name, and for layers within what is trained whole.
    """
    if not config.train_scales:
        return
    names = _names(model, "train_scales")
    found, modules, alike = dict.fromkeys(config.train_scales, False), outer_modules(model), copy.copy(config)
    whole = tuple(f"{name}." for name in named_whole(modules, config))
    for name, module in modules.items():
        places = [place for place in found if names[place] and re.fullmatch(rf"(.*\.)?{names[place]}", name)]
        size = linear_size(base_of(module))
        alike.target_modules = {name.rpartition(".")[2]}  # type: ignore[assignment]
        if not places or size is None:
            continue
        if f"{name}.".startswith(whole):
            raise InputError(f"train_scales and modules_to_save both name '{name}': leave it out of one of them")
        if not check_target_module_exists(alike, name):
            continue
        for place in places:
            found[place] = True
            width = size[0] if place == "mlp" else size[1]
            is_fused = place != "mlp" and names["keys"] == names["values"]
            side = place if is_fused else "in" if place == "mlp" else "out"
            scaled = Scaled(name, side, width, width)
            yield _among_outputs(model.config, scaled) if is_fused else scaled
    if missing := [place for place, is_there in found.items() if not is_there]:
        raise InputError(f"train_scales: this model has no {' or '.join(missing)} that are outputs of linear layers")


def check_scales_load(model: nn.Module, scaled: Iterable[Scaled], prefix: str) -> None:
    """Refuse scales within layers of other methods in transformers' ``load_adapter``, which finds only what lies alone.

    Its report of missing keys would say so, and the scales stay zero. Raises InputError that names the first.
    """
    for name in (each.name for each in scaled if transformers_loads()):
        layers = layers_from(model.get_submodule(name))
        if any(not isinstance(layer, TrainedScale) and getattr(layer, "prefix", "") != prefix for layer in layers):
            raise InputError(
                f"transformers' load_adapter would not load the scale of '{name}', where another method's layer lies "
                "already: load this adapter first, or with PeftModel.from_pretrained"
            )


def put_scales(tuner: Any, scaled: Iterable[Scaled], adapter_name: str) -> None:
    """Add one adapter's changes to the scales of a tuner's model.

    A scale lies below the layers of all methods. One of the adapter's own method is among them: so the scale's name is
    the same whether or not the adapter trains that layer too.
    """
    for path, sides in groupby(scaled, lambda each: each.name):
        if not any(getattr(part, "prefix", "") == tuner.prefix for part in tuner.model.get_submodule(path).modules()):
            parent, _, child = path.rpartition(".")
            tuner.layer_at(tuner.model.get_submodule(parent), child, path)
        name, module = path, tuner.model.get_submodule(path)
        while hasattr(module, "base_layer") and not isinstance(module, TrainedScale):
            name, module = f"{name}.base_layer", module.base_layer
        put_changes(tuner, TrainedScale, name, adapter_name, *sides)
