"""The adp layer: a linear module with a bottleneck adapter on its output or input.

Axes: B batch, H the width the adapter works on, b bottleneck.
"""

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from loretta.errors import InputError
from loretta.layers import fused
from loretta.layers.stacks import bottleneck_of
from loretta.layers.trains import arranged, fold_bias, one_matrix_each
from loretta.tuners.adp.config import LorettaAdpConfig
from loretta.tuners.calls import Factors
from loretta.tuners.joint import Place
from loretta.tuners.layer import BY_ADAPTER, LorettaLayer, is_bare_linear, lies_in_rows, parameter_of, works_in
from loretta.tuners.placement import Halves, Placement

CANNOT_MERGE = (
    "LoRETTA_adp cannot be merged: its adapters have a non-linearity between the two trains, so no change of the base "
    "weights has the same effect; keep the adapter loaded, or train LoRETTA_rep, which merges exactly"
)


class AdpLinear(LorettaLayer):
    """``y + sum of scaling * up(act(down(y)))`` over the active adapters, all on the same y.

    y is the module's output ("after") or its input ("before"); one module may have adapters of both kinds.
    """

    prefix = "loretta_adp_"
    cannot_merge = CANNOT_MERGE
    adapter_layer_names = ("loretta_adp_down", "loretta_adp_up", "loretta_adp_bias")
    other_param_names = (*(f"loretta_adp_{part}" for part in ("start_down", "start_up", "act", "dropout")), *BY_ADAPTER)

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
        if placement.even:
            self._start_larger(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_scaling(self, adapter_name: str, config: LorettaAdpConfig) -> None:
        """The factor on one adapter's output."""
        self.scaling[adapter_name] = config.scaling

    def stacked_parameters(self, adapter_name: str, pair: int) -> tuple[Place, ...]:
        # by the name of the class: what ``super()`` finds is compared in each call of a compiled graph, at great length
        trains, biases = LorettaLayer.stacked_parameters(self, adapter_name, pair), self.loretta_adp_bias
        # beside a start that is subtracted they stay apart: both have to round alike
        folded = adapter_name in biases and self.n_pairs[adapter_name] == 1
        return (*trains, (biases, adapter_name, "down"), (biases, adapter_name, "up")) if folded else trains

    def group_key(self, adapter_name: str, pair: int) -> Hashable:
        if len(self.placements[adapter_name].down.modes) == 1:
            return None  # dense matrices have nothing to contract, and to stack those of all layers would copy them
        return super().group_key(adapter_name, pair), self._is_plain(adapter_name), self.placements[adapter_name].even

    def to_factors(self, adapter_name: str, down: Halves, up: Halves, biases: Sequence[Tensor]) -> Factors:
        """The halves of down (H, C), (C, b) and up (b, D), (D, H); with biases each after a vector, as `fold_bias`.

        Or the three of `one_matrix_each`.
        """
        down, up = self.placements[adapter_name].evened(down, up)
        if self._is_plain(adapter_name) and fused.one_matrix_pays(down[0], self.working_dtype()):
            return one_matrix_each(down, up, *(biases or (None, None)))
        if not biases:
            return (*arranged(*down), *arranged(*up))
        return (*fold_bias(*down, biases[0]), *fold_bias(*up, biases[1]))

    def delta(self, adapter_name: str, y_BH: Tensor) -> Tensor:
        """What one adapter adds to ``y``, whose rows may lie along any number of dimensions."""
        rows_BH = y_BH.reshape(-1, y_BH.shape[-1])
        now, *start = self.contracted(adapter_name)
        biases, own = None, self.loretta_adp_bias
        if start and adapter_name in own:  # folded in otherwise
            biases = {part: parameter_of(own[adapter_name], part) for part in ("down", "up")}
        inner_BD, up_DH = self._inner(adapter_name, rows_BH, now, biases)
        delta_BH = inner_BD @ up_DH
        for factors in start:  # its biases were zero
            inner_BD, up_DH = self._inner(adapter_name, rows_BH, factors, None)
            delta_BH = delta_BH - inner_BD @ up_DH
        if biases is not None:
            scale = self.scaling.of(adapter_name, biases["up"])
            delta_BH = delta_BH + (scale * biases["up"]).to(delta_BH.dtype)
        return delta_BH.view(y_BH.shape)

    def _is_plain(self, adapter_name: str) -> bool:
        """Whether there is but a ReLU between the trains, no dropout, and no start that is subtracted."""
        return self.n_pairs[adapter_name] == 1 and not self.drops[adapter_name] and self._is_relu(adapter_name)

    def _is_relu(self, adapter_name: str) -> bool:
        """Whether the activation is a ReLU that nobody looks into: a hook has to see it called."""
        act = self.loretta_adp_act[adapter_name]
        return type(act) is nn.ReLU and not (act._forward_hooks or act._forward_pre_hooks or act._backward_hooks)

    def _inner(
        self, adapter_name: str, rows_BH: Tensor, factors: Factors, biases: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The adapter up to its last matrix, which is the second value; ``biases`` where they are not folded in."""
        if not works_in(rows_BH, factors[0].dtype):
            factors = tuple(factor.to(rows_BH.dtype) for factor in factors)
        if len(factors) == 3:
            bias_b, down_bH, up_bH = factors
            # a graph then knows the activation; a hook that is added later is not seen, as with every compiled module
            if torch.compiler.is_dynamo_compiling() and self._is_relu(adapter_name) and rows_BH.dtype == down_bH.dtype:
                return bottleneck_of(rows_BH, down_bH, bias_b), up_bH
            return linear(rows_BH, down_bH, bias_b).relu_(), up_bH
        if len(factors) == 6:
            one_C, left_HC, mid_Cb, one_D, mid_bD, up_DH = factors
            hidden_Bb = self._activated(adapter_name, torch.addmm(one_C, rows_BH, left_HC) @ mid_Cb)
            return torch.addmm(one_D, hidden_Bb, mid_bD), up_DH
        left_HC, mid_Cb, mid_bD, up_DH = factors
        hidden_Bb = (rows_BH @ left_HC) @ mid_Cb
        if biases is not None:
            hidden_Bb = hidden_Bb + biases["down"].to(hidden_Bb.dtype)
        return self._activated(adapter_name, hidden_Bb) @ mid_bD, up_DH

    def _activated(self, adapter_name: str, hidden_Bb: Tensor) -> Tensor:
        # in place: nothing else needs what a product has just made
        act = Tensor.relu_ if self._is_relu(adapter_name) else self.loretta_adp_act[adapter_name]
        return self.dropout(adapter_name, act(hidden_Bb))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) -> (..., O): the base's output, with the adapters on its input and on its output.

        ``adapter_names`` (one for each row of the first dimension) replace the active ones, as in PEFT.

        Raises ValueError where they are not as many as the rows.
        """
        base_layer: Any = self.base_layer
        adapter_names = self._take_names(kwargs)
        if self._disable_adapters:
            return base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        elif self.merged_adapters:  # another method's, in the place of all that is active
            return base_layer(x, *args, **kwargs)
        elif not args and not kwargs and is_bare_linear(base_layer) and lies_in_rows(x):
            rows_BI = self._add(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), "before")
            rows_BO = self._add(linear(rows_BI, base_layer.weight, base_layer.bias), "after")
            return rows_BO if x.dim() == 2 else rows_BO.view(*x.shape[:-1], rows_BO.shape[-1])
        result = base_layer(self._adapted(x, "before", adapter_names), *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._adapted(result, "after", adapter_names)

    def _adapted(self, y: Tensor, where: str, adapter_names: list[str] | None) -> Tensor:
        """``y`` plus what the adapters at ``where`` add to it, or those that are named for its rows."""
        if adapter_names is None:
            rows = y.reshape(-1, y.shape[-1])
            out = self._add(rows, where)
            return out.view(y.shape) if out is not rows else y
        here = [n for n, placement in self.placements.items() if placement.where == where and n in adapter_names]
        if not here:
            return y
        if len(set(adapter_names)) == 1:
            return y + self.delta(here[0], y).to(y.dtype)
        acts = [self.loretta_adp_act[name] for name in here]
        alike = len({*map(type, acts)}) == 1 and y.dim() > 1
        by_row = self._factors_by_row(adapter_names, here, y.dtype) if alike else None
        if by_row is not None:
            return self._of_rows(y.reshape(len(y), -1, y.shape[-1]), by_row, acts[0]).view(y.shape)
        mixed = y.clone()
        for name, chosen in self._rows_by_adapter(adapter_names, here):
            mixed[chosen] += self.delta(name, y[chosen]).to(y.dtype)
        return mixed

    @staticmethod
    def _of_rows(rows_NBH: Tensor, by_row: Factors, act: nn.Module) -> Tensor:
        """``rows`` plus what the adapter of each N adds to them."""
        if len(by_row) == 3:
            bias_Nb, down_NbH, up_NbH = by_row
            hidden_NBb = torch.baddbmm(bias_Nb[:, None], rows_NBH, down_NbH.mT).relu_()
            return torch.baddbmm(rows_NBH, hidden_NBb, up_NbH)
        if len(by_row) == 6:
            one_NC, left_NHC, mid_NCb, one_ND, mid_NbD, up_NDH = by_row
            hidden_NBb = act(torch.bmm(torch.baddbmm(one_NC[:, None], rows_NBH, left_NHC), mid_NCb))
            return torch.baddbmm(rows_NBH, torch.baddbmm(one_ND[:, None], hidden_NBb, mid_NbD), up_NDH)
        left_NHC, mid_NCb, mid_NbD, up_NDH = by_row
        hidden_NBb = act(torch.bmm(torch.bmm(rows_NBH, left_NHC), mid_NCb))
        return torch.baddbmm(rows_NBH, torch.bmm(hidden_NBb, mid_NbD), up_NDH)

    def _add(self, rows_BH: Tensor, where: str) -> Tensor:
        """``rows`` plus what the active adapters at ``where`` add to them; each of them sees the same rows."""
        out_BH = rows_BH
        for name in self.active_adapters:
            placement = self.placements.get(name)
            if placement is None or placement.where != where:
                continue
            factors, *start = self.contracted(name)
            if start or rows_BH.dtype != factors[-1].dtype:
                out_BH = out_BH + self.delta(name, rows_BH).to(rows_BH.dtype)
            elif len(factors) == 6 and out_BH is rows_BH and self._is_plain(name) and fused.pays(rows_BH):
                out_BH = cast(Tensor, fused.AddBottleneck.apply(rows_BH, *factors))
            else:
                out_BH = torch.addmm(out_BH, *self._inner(name, rows_BH, factors, None))
        return out_BH

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError for adapters that are here: there is a non-linearity between the trains."""
        if not self.placements.keys().isdisjoint(self.active_adapters if adapter_names is None else adapter_names):
            raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged here. The adapters compute again that fell silent for another method's."""
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT asks right before it converts. Raises InputError: PEFT's own refusal names no reason."""
        raise InputError(
            "LoRETTA_adp cannot become a LoRA: its adapters have a non-linearity between the two trains, so no change "
            "of the base weights has the same effect; keep it as it is, or train LoRETTA_rep, which becomes one exactly"
        )

    def __repr__(self) -> str:
        return "loretta_adp." + super().__repr__()
