"""What the layers of both methods share: the calling rules of a PEFT layer."""

import math
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from loretta import tt
from loretta.layers import Cores
from loretta.placement import require_linear


class LorettaLayer(nn.Module, BaseTunerLayer):
    """A module wrapped by tensor trains, one pair per adapter. Axes: B batch, I input, O output features."""

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = require_linear(name, self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []

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
    def _rows_by_adapter(adapter_names: Sequence[str], known: Sequence[str], device: torch.device):
        """(adapter, row indices) for every adapter of a mixed batch that this layer has; "__base__" has none."""
        for name in sorted(set(adapter_names) & set(known)):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            yield name, torch.tensor(rows, device=device)


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
        cores.assign(values)
    if init_weights == "zero":
        nn.init.zeros_(up[-1])


def _variance_keeping(core: tuple[int, int, int], out_part: int) -> Tensor:
    left, mode, right = core
    return math.sqrt(out_part) * nn.init.orthogonal_(torch.empty(left * mode, right)).reshape(core)
