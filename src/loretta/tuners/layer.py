"""What the layers of both methods share: the calling rules of a PEFT layer."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from loretta import tt
from loretta.layers import Cores
from loretta.placement import Placement, require_linear


class LorettaLayer(nn.Module, BaseTunerLayer):
    """A module wrapped by pairs of tensor trains, one pair per adapter.

    The trains lie in dictionaries by adapter, whose names begin with the method's ``prefix`` as PEFT demands:
    ``down`` and ``up``, and ``start_down`` and ``start_up`` for the frozen start that "denoised" subtracts.
    """

    prefix: str

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = require_linear(name, self.get_base_layer())
        keep_differentiable(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        for part in ("down", "up", "start_down", "start_up", "dropout"):
            self.add_module(self.prefix + part, nn.ModuleDict())
        self.scaling: dict[str, float] = {}
        self.placements: dict[str, Placement] = {}

    def _part(self, part: str) -> nn.ModuleDict:
        return getattr(self, self.prefix + part)

    def _trains(self, adapter_name: str) -> list[tuple[Cores, Cores]]:
        """(down, up) of one adapter, and after it the frozen start that is subtracted, if the adapter has one."""
        pairs = [("down", "up"), ("start_down", "start_up")]
        return [
            (cast(Cores, self._part(down)[adapter_name]), cast(Cores, self._part(up)[adapter_name]))
            for down, up in pairs
            if adapter_name in self._part(down)
        ]

    def _add_trains(self, adapter_name: str, placement: Placement, init_weights: str, dropout: float) -> None:
        """New trains with their starting values, on the device and in the dtype of the base layer."""
        self.placements[adapter_name] = placement
        down, up = Cores(placement.down), Cores(placement.up)
        starting_cores(down, up, init_weights)
        self._part("down")[adapter_name], self._part("up")[adapter_name] = down, up
        self._part("dropout")[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if init_weights == "denoised":
            # after the move: the start has to equal the trained cores to the last bit
            for part in ("down", "up"):
                self._part("start_" + part)[adapter_name] = copy.deepcopy(self._part(part)[adapter_name])
                self._part("start_" + part)[adapter_name].requires_grad_(False)

    def set_scaling(self, adapter_name: str, config: Any) -> None:
        """Take over the factor on one adapter's effect from its config."""
        raise NotImplementedError

    def rename_adapter(self, old: str, new: str) -> None:
        """Give one adapter another name; nothing happens when this layer does not have it."""
        for part in (*self.adapter_layer_names, *self.other_param_names):
            by_adapter = getattr(self, part)
            if old in by_adapter:
                by_adapter[new] = by_adapter.pop(old)
        self.merged_adapters = [new if name == old else name for name in self.merged_adapters]
        self._active_adapter = [new if name == old else name for name in self.active_adapters]

    def _check_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    @staticmethod
    def _rows_by_adapter(adapter_names: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        """(adapter, row indices) for every adapter of a mixed batch that this layer has; "__base__" has none."""
        for name in sorted(set(adapter_names) & set(known)):
            yield name, [row for row, wanted in enumerate(adapter_names) if wanted == name]


def keep_differentiable(model: nn.Module) -> None:
    """Hold bitsandbytes' 4-bit weights within ``model`` in the layout that backward passes and merging read.

    On a CPU with bf16 instructions the first evaluation packs them into another one. From then on no gradient passes
    the layer, without an error, and dequantising it gives noise (bitsandbytes 0.50).
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()  # unpacks what an earlier evaluation has packed


def starting_cores(down: Cores, up: Cores, init_weights: str) -> None:
    """Assign starting values to a pair of trains; ``init_weights`` as in the config.

    "zero": the last core of ``up`` is zero. The others are random orthonormal maps scaled so that an input with
    entries of variance 1 keeps that variance through the train: a core that sums over a piece of the input is
    orthonormal, one that spells a piece of the output is sqrt(its mode) times that. The zero core then meets
    inputs of size 1, as LoRA's B does, and the same learning rates suit it and the layer norms.
    Otherwise Gaussian, with entries of standard deviation sqrt(1 / (in + out)) in each contracted matrix
    (LoRETTA section 3.3).
    """
    for cores in (down, up):
        shape = cores.shape
        if init_weights == "zero":
            values = [_variance_keeping(core, shape.out_part(k)) for k, core in enumerate(shape.cores)]
        else:
            values = tt.gaussian(shape, std=(shape.in_features + shape.out_features) ** -0.5)
        if cores is up and init_weights == "zero":
            values[-1] = torch.zeros_like(values[-1])
        cores.assign(values)


def _variance_keeping(core: tuple[int, int, int], out_part: int) -> Tensor:
    left, mode, right = core
    return math.sqrt(out_part) * nn.init.orthogonal_(torch.empty(left * mode, right)).reshape(core)
