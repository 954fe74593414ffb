"""The adp tuner."""

from typing import Any, cast

import torch
from torch import nn

from loretta.errors import InputError
from loretta.tuners.adp.config import LorettaAdpConfig
from loretta.tuners.adp.layer import AdpLinear
from loretta.tuners.config import LorettaConfig
from loretta.tuners.model import LorettaModel
from loretta.tuners.placement import Placement, plan_trains, planner, rank_for, require_linear
from loretta.tuners.targets import ADP_TARGETS


class LorettaAdpModel(LorettaModel):
    """Puts a tensor-train bottleneck adapter at every target (LoRETTA section 3.2)."""

    prefix = "loretta_adp_"
    layer_cls = AdpLinear
    target_module_mapping = ADP_TARGETS  # type: ignore[assignment]

    @staticmethod
    def place(config: LorettaAdpConfig, name: str, module: nn.Module) -> Placement:
        """Plan width x b and b x width. Raises InputError when the target is not linear or a shape does not fit."""
        in_features, out_features = require_linear(name, module)
        if torch.is_tensor(weight := getattr(module, "weight", None)) and weight.is_complex():
            raise InputError(
                f"'{name}' gives complex numbers, and adp's bottleneck has a non-linearity for real ones alone: leave "
                "it out with exclude_modules, or take rep"
            )
        before = name.endswith(tuple(config.insert_before))
        width, bottleneck = in_features if before else out_features, config.bottleneck_size
        rank = rank_for(config, name)
        # a train of a single core is the matrix itself
        modes = [width * bottleneck] if config.dense else None
        size = in_features, out_features
        down, up = plan_trains(name, size, (width, width), bottleneck, rank=rank, modes=modes, **planner(config))
        return Placement(
            name=name,
            where="before" if before else "after",
            bias_params=width + bottleneck if config.train_bias else 0,
            down=down,
            up=up,
            even=config.even_rates,
        )

    @classmethod
    def default_targets(cls, config: LorettaConfig, model_config: dict) -> Any:
        """As for every method, but ``placement="mlp"`` means the gate, up and down projections."""
        if config.target_modules is None and cast(LorettaAdpConfig, config).placement == "mlp":
            return {"gate_proj", "up_proj", "down_proj"}
        return super().default_targets(config, model_config)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: no change of the base weights has the effect of an adapter with a non-linearity."""
        return False

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for adapters with a non-linearity. Raises InputError that says what to do instead."""
        raise InputError(
            "adp's adapters are not added up, for each has a non-linearity: activate several at once with "
            "model.base_model.set_adapter([...])"
        )
