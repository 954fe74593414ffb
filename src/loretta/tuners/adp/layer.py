"""The adp layer: a linear module with a bottleneck adapter on its output or input.

Axes: B batch, H the width the adapter works on, b bottleneck.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from loretta.layers import Cores
from loretta.placement import Placement
from loretta.tuners.adp.config import LorettaAdpConfig
from loretta.tuners.layer import LorettaLayer


class AdpLinear(LorettaLayer):
    """``y + sum of scaling * up(act(down(y)))`` over the active adapters, all on the same y.

    y is the module's output ("after") or its input ("before"); one module may have adapters of both kinds.
    """

    prefix = "loretta_adp_"
    adapter_layer_names = ("loretta_adp_down", "loretta_adp_up", "loretta_adp_bias")
    other_param_names = (
        "loretta_adp_start_down",
        "loretta_adp_start_up",
        "loretta_adp_act",
        "loretta_adp_dropout",
        "scaling",
        "placements",
    )

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__(base_layer, name=name, **quantization_kwargs)
        self.loretta_adp_bias = nn.ModuleDict()
        self.loretta_adp_act = nn.ModuleDict()

    def update_layer(self, adapter_name: str, placement: Placement, config: LorettaAdpConfig) -> None:
        """Add one adapter, with the starting values that ``config.init_weights`` names; biases start at zero."""
        self.set_scaling(adapter_name, config)
        self.loretta_adp_act[adapter_name] = ACT2FN[config.non_linearity]
        if config.train_bias:
            sizes = {"down": placement.down.out_features, "up": placement.up.out_features}
            self.loretta_adp_bias[adapter_name] = nn.ParameterDict(
                {part: nn.Parameter(torch.zeros(size)) for part, size in sizes.items()}
            )
        self._add_trains(adapter_name, placement, str(config.init_weights), config.adapter_dropout)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_scaling(self, adapter_name: str, config: LorettaAdpConfig) -> None:
        """The factor on one adapter's output."""
        self.scaling[adapter_name] = config.scaling

    def delta(self, adapter_name: str, y_BH: Tensor) -> Tensor:
        """What one adapter adds to ``y``, in its dtype."""
        (down, up), *start = self._trains(adapter_name)
        biases = self.loretta_adp_bias[adapter_name] if adapter_name in self.loretta_adp_bias else None  # noqa: SIM401
        now = self._bottleneck(adapter_name, y_BH, down, up, cast(nn.ParameterDict | None, biases))
        for start_down, start_up in start:  # its biases were zero
            now = now - self._bottleneck(adapter_name, y_BH, start_down, start_up, None)
        return self.scaling[adapter_name] * now

    def _bottleneck(
        self, adapter_name: str, y_BH: Tensor, down: Cores, up: Cores, biases: nn.ParameterDict | None
    ) -> Tensor:
        dtype = y_BH.dtype
        (down_HC, down_Cb), (up_bC, up_CH) = down.halves(), up.halves()
        hidden_Bb = (y_BH @ down_HC.to(dtype)) @ down_Cb.to(dtype)
        if biases is not None:
            hidden_Bb = hidden_Bb + biases["down"].to(hidden_Bb.dtype)
        hidden_Bb = self._part("dropout")[adapter_name](self.loretta_adp_act[adapter_name](hidden_Bb))
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
        here = [name for name, placement in self.placements.items() if placement.where == where]
        if adapter_names is None:
            deltas = [self.delta(name, y).to(y.dtype) for name in self.active_adapters if name in here]
            for delta in deltas:
                y = y + delta
            return y
        mixed = y.clone()
        for name, rows in self._rows_by_adapter(adapter_names, here):
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
