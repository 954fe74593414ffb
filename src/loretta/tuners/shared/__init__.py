"""LoRETTA_shared: weight updates of all layers and projections from one tensor train."""

from loretta.tuners.register import register
from loretta.tuners.shared.config import LorettaSharedConfig
from loretta.tuners.shared.layer import SharedLinear
from loretta.tuners.shared.model import LorettaSharedModel

__all__ = ["LorettaSharedConfig", "LorettaSharedModel", "SharedLinear"]

register("loretta_shared", LorettaSharedConfig, LorettaSharedModel)
