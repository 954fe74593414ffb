"""LoRETTA_rep: a weight update that is a product of two tensor trains."""

from loretta.tuners.register import register
from loretta.tuners.rep.config import COMPACT, LorettaRepConfig
from loretta.tuners.rep.experts import RepExperts
from loretta.tuners.rep.layer import RepLinear
from loretta.tuners.rep.model import LorettaRepModel

__all__ = ["COMPACT", "LorettaRepConfig", "LorettaRepModel", "RepExperts", "RepLinear"]

register("loretta_rep", LorettaRepConfig, LorettaRepModel)
