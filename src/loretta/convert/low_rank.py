"""The updates that a saved adapter makes to linear layers, as products of two thin matrices.

Axes: I input features, O output features, R rank of an update.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from loretta.convert.load import WEIGHTS, SavedAdapter, base_name, is_trained_whole, readable_weights
from loretta.errors import InputError
from loretta.layers.fit import Update
from loretta.tuners.adapted import is_finite
from loretta.tuners.adapter_file import PREFIX, check_finite
from loretta.wording import quoted

# With one of these options LoRA does not just add the product of A and B
_NOT_PLAIN = (
    "use_dora", "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "use_bdlora", "use_qalora",
)  # fmt: skip
# These starts of LoRA change the base weights too, whenever an adapter is made or loaded
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# Singular values of a dense update below this part of the largest are rounding in float32
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """All that an adapter holds."""

    by_module: dict[str, Update]
    beside: dict[str, Tensor]  # heads, biases and the like, by their names in the file
    n_trained: int


def read_updates(saved: SavedAdapter) -> Updates:
    """Read a LoRA from its files alone, and any other method with low-rank updates through its base model.

    Raises InputError when there are no such updates, they are not all that the method does, or the base model is
    needed and cannot be loaded.
    """
    if saved.method.startswith("LORETTA"):
        raise InputError(f"'{saved.folder}' is a LoRETTA adapter already: use it as it is")
    tensors = load_file(readable_weights(saved.folder))
    by_module = _lora_updates(saved, tensors) if saved.method == "LORA" else _dense_updates(saved)
    if not by_module:
        raise InputError(f"the adapter in '{saved.folder}' changes no linear layer: there is nothing to compress")
    for name, factors in by_module.items():
        if not all(map(is_finite, factors)):
            raise InputError(f"the update of '{name}' in '{saved.folder}' holds values that are not finite")
    check_finite(tensors.items(), f"'{saved.folder / WEIGHTS}'")
    # VeRA's projections lie outside the base model: all modules share them, and nobody trains them
    inside = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    own = "." + PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(saved.method)]
    beside = {key: tensor for key, tensor in inside.items() if own not in key}
    for key in beside:
        name = base_name(key)
        # PEFT saves embeddings beside an adapted lm_head, or because the vocabulary grew
        is_embedding = name.split(".")[-2:-1] in ([each] for each in EMBEDDING_LAYER_NAMES)
        is_rows = saved.config.get("trainable_token_indices") and name.endswith(".trainable_tokens_delta")
        if not (is_rows or is_trained_whole(name, saved.config) or is_base_weight(key) or is_embedding):
            raise InputError(
                f"the adapter in '{saved.folder}' also holds {quoted(key)}, which its config does not name as trained "
                "and which would overwrite the base model: remove that tensor"
            )
    return Updates(
        by_module=by_module,
        beside=beside,
        n_trained=sum(tensor.numel() for key, tensor in inside.items() if not is_base_weight(key)),
    )


def is_base_weight(key: str) -> bool:
    """Whether a tensor in an adapter's file is one of the base model's, which PEFT saves beside an adapted lm_head."""
    return key.endswith(".base_layer.weight")


def _lora_updates(saved: SavedAdapter, tensors: dict[str, Tensor]) -> dict[str, Update]:
    config = saved.config
    start = str(config.get("init_lora_weights")).partition("_niter")[0]
    if start in _CHANGES_BASE:
        raise InputError(
            f"the LoRA in '{saved.folder}' was started with init_lora_weights={start!r}, which changes the base "
            "weights too: save it with path_initial_model_for_weight_conversion first, which makes a plain LoRA of it"
        )
    if unusual := [option for option in _NOT_PLAIN if config.get(option)]:
        what = "DoRA" if "use_dora" in unusual else f"LoRA with {unusual[0]}={config[unusual[0]]!r}"
        raise InputError(
            f"'{saved.folder}' is a {what}, whose effect is more than a low-rank update: only a plain LoRA can be "
            "compressed"
        )
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if found := re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key):
            factors[found[1]][found[2]] = tensor.float()
        elif ".lora_" in key:
            raise InputError(f"'{saved.folder}' holds '{key}': only a LoRA of linear layers can be compressed")
    updates = {}
    for name, pair in factors.items():
        if pair.keys() != {"A", "B"} or {tensor.dim() for tensor in pair.values()} != {2}:
            raise InputError(f"the LoRA of '{name}' in '{saved.folder}' is not that of a linear layer")
        rank, alphas = pair["A"].shape[0], config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", LoraConfig.lora_alpha))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[name] = (pair["A"].T, scaling * pair["B"].T)
    return updates


@torch.no_grad()
def _dense_updates(saved: SavedAdapter) -> dict[str, Update]:
    layers = {
        name: cast(Any, module)
        for name, module in saved.load().get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    updates = {}
    for name, layer in layers.items():
        # PEFT's way to say that a method adds a matrix to the weight
        delta = layer.get_delta_weight("default") if layer.supports_lora_conversion() else None
        if delta is None or delta.dim() != 2:
            raise InputError(
                f"'{saved.folder}' is a {saved.method} adapter, which does not add a matrix to the weights of linear "
                "layers: only methods that do, with a low rank, can be compressed"
            )
        delta_IO = delta.double() if isinstance(layer.get_base_layer(), Conv1D) else delta.double().T
        u_IR, s_R, vh_RO = torch.linalg.svd(delta_IO, full_matrices=False)
        rank = max(1, int((s_R > _ROUNDING * s_R[0]).sum()))
        if rank * sum(delta_IO.shape) >= delta_IO.numel():
            raise InputError(
                f"the {saved.method} adapter in '{saved.folder}' changes '{name}' by a matrix of rank {rank} of "
                f"{len(s_R)}: only updates of a low rank can be compressed"
            )
        updates[name] = (u_IR[:, :rank].float(), (s_R[:rank, None] * vh_RO[:rank]).float())
    return updates
