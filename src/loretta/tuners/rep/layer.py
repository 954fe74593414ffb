"""The rep layer: a linear module whose weight gets an update of two trains.

Axes: B batch, I input features, O output features, R rank of the update.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from loretta.errors import InputError
from loretta.layers import fused
from loretta.layers.trains import add_update, arranged, update_factors
from loretta.tuners.adapted import is_finite, merge_below
from loretta.tuners.calls import Factors
from loretta.tuners.contraction import note_change
from loretta.tuners.layer import BY_ADAPTER, LorettaLayer, fitting, is_bare_linear, lies_in_rows, works_in
from loretta.tuners.placement import Halves, Placement, rank_for
from loretta.tuners.rep.config import LorettaRepConfig


class RepLinear(LorettaLayer):
    """``base(x) + scaling * (x A) B`` summed over the active adapters; A and B come from the two trains."""

    prefix = "loretta_rep_"
    adapter_layer_names: tuple[str, ...] = ("loretta_rep_down", "loretta_rep_up")
    other_param_names: tuple[str, ...] = (
        *(f"loretta_rep_{part}" for part in ("start_down", "start_up", "dropout")),
        *("beside", *BY_ADAPTER),
    )

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__(base_layer, name=name, **quantization_kwargs)
        self.beside: dict[str, tuple[str, ...]] = {}  # names of what each adapter trains besides linear layers

    def update_layer(self, adapter_name: str, placement: Placement, config: LorettaRepConfig) -> None:
        """Add one adapter's trains, with the starting values that ``config.init_weights`` names."""
        self._add_trains(adapter_name, placement, str(config.init_weights), config.lora_dropout)
        if config.even_rates:
            self._start_larger(adapter_name)
        self.set_scaling(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_scaling(self, adapter_name: str, config: Any) -> None:
        """The factor on one adapter's update: ``lora_alpha / tensor_rank``, with the patterns of ``config``.

        With ``even_rates`` the cores are larger, and it is smaller by as much.
        """
        placement = self.placements[adapter_name]
        name = placement.name
        rank = rank_for(config, name)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        even = isinstance(config, LorettaRepConfig) and config.even_rates  # a shared train has no such option
        larger = math.prod(chain(*placement.larger_starts())) if even else 1.0
        self.scaling[adapter_name] = alpha / (math.sqrt(rank) if config.use_rslora else rank) / larger

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (I, R) and B (R, O): the adapter's update before scaling is exactly ``A @ B``."""
        (a_IR, b_RO), *start = self._updates(adapter_name)
        for start_a_IR, start_b_RO in start:
            a_IR, b_RO = torch.cat([a_IR, start_a_IR], dim=1), torch.cat([b_RO, -start_b_RO], dim=0)
        return a_IR, b_RO

    def _updates(self, adapter_name: str) -> list[tuple[Tensor, Tensor]]:
        """The factors from the trains, and those from a start that is subtracted."""
        return [update_factors(down(), up()) for down, up in self._trains(adapter_name)]

    def to_factors(self, adapter_name: str, down: Halves, up: Halves, biases: Sequence[Tensor]) -> Factors:
        """A (I, R) and B (R, O) of the update."""
        return arranged(*update_factors(down, up))

    def delta(self, adapter_name: str, x_BI: Tensor) -> Tensor:
        """What one adapter adds to the output. The I x O matrix is never built."""
        x_BI = self.dropout(adapter_name, x_BI)
        now, *start = [
            (x_BI @ fitting(a_IR, x_BI)) @ fitting(b_RO, x_BI) for a_IR, b_RO in self.contracted(adapter_name)
        ]
        # subtracted as outputs, not as factors: an untrained adapter then cancels to the last bit
        return now - start[0] if start else now

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) -> (..., O): the base's output, and what the active adapters add to it.

        ``adapter_names`` (one for each row of the first dimension) replace the active ones, as in PEFT.

        Raises ValueError where they are not as many as the rows, or an adapter is merged.
        """
        adapter_names, base_layer = self._take_names(kwargs), self.base_layer
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if adapter_names is not None and not self._disable_adapters:
            return self._add_mixed(base_layer(x, *args, **kwargs), x, adapter_names)
        names = self._running()
        if names and not args and not kwargs and is_bare_linear(base_layer) and lies_in_rows(x):
            return self._linear_with_updates(base_layer, x, names)
        result = base_layer(x, *args, **kwargs)
        if names and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in names:
            result = result + self.delta(name, x).to(result.dtype)
        return result

    def _running(self) -> list[str]:
        """The adapters that add an update now."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self.active_adapters if name in self.n_pairs]

    def _linear_with_updates(self, base_layer: Any, x: Tensor, names: Sequence[str]) -> Tensor:
        """The output of a bare linear layer: a new matrix that nobody else has seen, so updates are added into it."""
        rows_BI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        result_BO = self._fused(base_layer, rows_BI, names) if fused.pays(rows_BI) else None
        if result_BO is None:
            result_BO = linear(rows_BI, base_layer.weight, base_layer.bias)
            for name in names:
                (a_IR, b_RO), *start = self.contracted(name)
                dtype = result_BO.dtype
                if not start and dtype == b_RO.dtype and works_in(rows_BI, dtype):
                    dropped_BI = self.dropout(name, rows_BI) if self.drops[name] else rows_BI
                    result_BO = add_update(result_BO, dropped_BI, a_IR, b_RO)
                else:
                    result_BO = result_BO + self.delta(name, rows_BI).to(dtype)
        return result_BO if x.dim() == 2 else result_BO.view(*x.shape[:-1], result_BO.shape[-1])

    def _fused(self, base_layer: Any, rows_BI: Tensor, names: Sequence[str]) -> Tensor | None:
        """The output by one autograd function; None where that function does not serve the adapters."""
        if len(names) != 1 or self.n_pairs[names[0]] != 1 or self.drops[names[0]]:
            return None
        weight, bias = base_layer.weight, base_layer.bias
        (a_IR, b_RO), *_ = self.contracted(names[0])
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or not rows_BI.dtype == weight.dtype == a_IR.dtype:
            return None
        return cast(Tensor, fused.LinearWithUpdate.apply(rows_BI, weight, bias, a_IR, b_RO))

    def _add_mixed(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        self._check_mixed_batch(x, adapter_names)
        if len(set(adapter_names)) == 1:
            name = adapter_names[0]
            return result + self.delta(name, x).to(result.dtype) if name in self.n_pairs else result
        by_row = self._factors_by_row(adapter_names, list(self.n_pairs), result.dtype) if x.dim() > 1 else None
        if by_row is not None and x.dtype == result.dtype:
            a_NIR, b_NRO = by_row
            rows_NBI = x.reshape(len(x), -1, self.in_features)
            result_NBO = result.reshape(len(x), -1, self.out_features)
            return torch.baddbmm(result_NBO, torch.bmm(rows_NBI, a_NIR), b_NRO).view(result.shape)
        result = result.clone()
        for name, rows in self._rows_by_adapter(adapter_names, list(self.n_pairs)):
            result[rows] += self.delta(name, x[rows]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's scaled update in the layout of the base weight: (O, I), or (I, O) for Conv1D."""
        a_IR, b_RO = self.factors(adapter_name)
        delta_IO = self.scaling[adapter_name] * (a_IR @ b_RO)
        return delta_IO if isinstance(self.get_base_layer(), Conv1D) else delta_IO.T

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of ``adapter_names`` (default: the active ones) to the base weight.

        A quantised weight is rounded again by each merge and each unmerge, so it does not come back to the last bit.

        Raises ValueError when ``safe_merge`` finds a value that is not finite.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.n_pairs]
        with self.merged_before_others():
            if new:
                self.check_around()
            merge_below(self, safe_merge, adapter_names)
            for name in new:
                self._add_to_base(self.get_delta_weight(name), name, safe=safe_merge)
                self.merged_adapters.append(name)
                note_change(activity_alone=True)

    def unmerge(self) -> None:
        """Subtract the merged updates again, the last one first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self.merged_before_others():
            while self.merged_adapters:
                name = self.merged_adapters.pop()
                note_change(activity_alone=True)
                if name in self.n_pairs:
                    self._add_to_base(-self.get_delta_weight(name), name, safe=False)

    def _add_to_base(self, delta: Tensor, adapter_name: str, *, safe: bool) -> None:
        weight = self.get_base_weight()
        merged = weight + delta.to(weight.dtype).to(weight.device)
        if safe and not is_finite(merged):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        self.set_base_weight(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True. PEFT asks right before it converts.

        Raises InputError where PEFT would drop parts that the adapter trains besides: PEFT's refusal names no reason.
        """
        if beside := self.beside.get(adapter_name):
            raise InputError(
                f"the adapter {adapter_name!r} also trains {len(beside)} norms or whole modules (such as "
                f"'{beside[0]}'), which PEFT's conversion to LoRA would lose: call loretta.export_lora, which writes "
                "whole modules, train with train_norms=False, or export with --to merged"
            )
        return True

    def __repr__(self) -> str:
        return "loretta_rep." + super().__repr__()
