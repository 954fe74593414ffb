"""The rep tuner."""

from torch import nn

from loretta import tt
from loretta.errors import InputError
from loretta.placement import Placement, rank_for, require_linear
from loretta.tuners.model import LorettaModel
from loretta.tuners.rep.config import LorettaRepConfig
from loretta.tuners.rep.layer import RepLinear
from loretta.tuners.targets import REP_TARGETS


class LorettaRepModel(LorettaModel):
    """Adds a weight update of two tensor trains to every target (LoRETTA section 3.3)."""

    prefix = "loretta_rep_"
    tuner_layer_cls = RepLinear
    layer_cls = RepLinear
    target_module_mapping = REP_TARGETS  # type: ignore[assignment]

    @staticmethod
    def place(config: LorettaRepConfig, name: str, module: nn.Module) -> Placement:
        """Plan in x r and r x out. Raises InputError when the target is not linear or a given shape does not fit."""
        in_features, out_features = require_linear(name, module)
        rank = rank_for(config, name)
        try:
            return Placement(
                name=name,
                where="update",
                down=tt.plan(in_features, config.r, rank=rank, overrides=config.shapes),
                up=tt.plan(config.r, out_features, rank=rank, overrides=config.shapes),
            )
        except ValueError as error:
            raise InputError(f"'{name}': {error}") from None
