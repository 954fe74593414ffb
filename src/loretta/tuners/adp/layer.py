"""The adp layer: a linear module with a bottleneck adapter on its output or input.

Axes: B batch, H the width the adapter works on, b bottleneck.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from loretta.layers import Cores
from loretta.placement import Placement
from loretta.tuners.adp.config import LorettaAdpConfig
from loretta.tuners.layer import LorettaLayer, starting_cores


class AdpLinear(LorettaLayer):
    """``y + sum of scaling * up(act(down(y)))`` over the active adapters, all on the same y.

    y is the module's output ("after") or its input ("before"); one module may have adapters of both kinds.
    """

    adapter_layer_names = ("loretta_adp_down", "loretta_adp_up", "loretta_adp_bias")
    other_param_names = (
        "loretta_adp_start_down",
        "loretta_adp_start_up",
        "loretta_adp_act",
        "loretta_adp_dropout",
        "where",
        "scaling",
    )

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__(base_layer, name=name, **quantization_kwargs)
        self.loretta_adp_down = nn.ModuleDict()
        self.loretta_adp_up = nn.ModuleDict()
        self.loretta_adp_bias = nn.ModuleDict()
        # the frozen Gaussian start that "denoised" subtracts; its biases are zero
        self.loretta_adp_start_down = nn.ModuleDict()
        self.loretta_adp_start_up = nn.ModuleDict()
        self.loretta_adp_act = nn.ModuleDict()
        self.loretta_adp_dropout = nn.ModuleDict()
        self.where: dict[str, str] = {}
        self.scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, placement: Placement, config: LorettaAdpConfig) -> None:
        """Add one adapter, with the starting values that ``config.init_weights`` names; biases start at zero."""
        self.where[adapter_name] = placement.where
        self.scaling[adapter_name] = config.scaling
        self.loretta_adp_act[adapter_name] = ACT2FN[config.non_linearity]
        self.loretta_adp_dropout[adapter_name] = (
            nn.Dropout(config.adapter_dropout) if config.adapter_dropout else nn.Identity()
        )
        down, up = Cores(placement.down), Cores(placement.up)
        starting_cores(down, up, config.init_weights)
        self.loretta_adp_down[adapter_name], self.loretta_adp_up[adapter_name] = down, up
        if config.train_bias:
            self.loretta_adp_bias[adapter_name] = nn.ParameterDict(
                {
                    "down": nn.Parameter(torch.zeros(placement.down.out_features)),
                    "up": nn.Parameter(torch.zeros(placement.up.out_features)),
                }
            )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.init_weights == "denoised":
            # taken after the move: the start must equal the trained cores to the last bit
            for start, cores in (
                (self.loretta_adp_start_down, self.loretta_adp_down),
                (self.loretta_adp_start_up, self.loretta_adp_up),
            ):
                start[adapter_name] = Cores(cores[adapter_name].shape).to(cores[adapter_name][0])
                start[adapter_name].assign(list(cores[adapter_name]))
                start[adapter_name].requires_grad_(False)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delta(self, adapter_name: str, y_BH: Tensor) -> Tensor:
        """What one adapter adds to ``y``, in its dtype."""
        biases = self.loretta_adp_bias[adapter_name] if adapter_name in self.loretta_adp_bias else None
        down, up = self.loretta_adp_down[adapter_name], self.loretta_adp_up[adapter_name]
        now = self._bottleneck(adapter_name, y_BH, down, up, biases)
        if adapter_name in self.loretta_adp_start_down:
            down, up = self.loretta_adp_start_down[adapter_name], self.loretta_adp_start_up[adapter_name]
            now = now - self._bottleneck(adapter_name, y_BH, down, up, None)
        return self.scaling[adapter_name] * now

    def _bottleneck(
        self, adapter_name: str, y_BH: Tensor, down: Cores, up: Cores, biases: nn.ParameterDict | None
    ) -> Tensor:
        dtype = y_BH.dtype
        (down_HC, down_Cb), (up_bC, up_CH) = down.halves(), up.halves()
        hidden_Bb = (y_BH @ down_HC.to(dtype)) @ down_Cb.to(dtype)
        if biases is not None:
            hidden_Bb = hidden_Bb + biases["down"].to(hidden_Bb.dtype)
        hidden_Bb = self.loretta_adp_dropout[adapter_name](self.loretta_adp_act[adapter_name](hidden_Bb))
        out_BH = (hidden_Bb @ up_bC.to(dtype)) @ up_CH.to(dtype)
        return out_BH if biases is None else out_BH + biases["up"].to(out_BH.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        result = self.base_layer(self._adapted(x, "before", adapter_names), *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._adapted(result, "after", adapter_names)

    def _adapted(self, y: Tensor, where: str, adapter_names: list[str] | None) -> Tensor:
        """``y`` plus what the adapters at ``where`` add to it; each of them sees the same ``y``."""
        here = [name for name, place in self.where.items() if place == where]
        if adapter_names is None:
            deltas = [self.delta(name, y).to(y.dtype) for name in self.active_adapters if name in here]
            return y + sum(deltas) if deltas else y
        mixed = y.clone()
        for name, rows in self._rows_by_adapter(adapter_names, here, y.device):
            mixed[rows] += self.delta(name, y[rows]).to(y.dtype)
        return mixed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged, so there is nothing to undo."""

    def __repr__(self) -> str:
        return "loretta_adp." + super().__repr__()


CANNOT_MERGE = (
    "LoRETTA_adp cannot be merged: its adapters have a non-linearity between the two trains, so no change of the base "
    "weights has the same effect; keep the adapter loaded, or train LoRETTA_rep, which merges exactly"
)
