"""LoRETTA_adp: a bottleneck adapter whose two matrices are tensor trains."""

from loretta.tuners.adp.config import LorettaAdpConfig
from loretta.tuners.adp.layer import AdpLinear
from loretta.tuners.adp.model import LorettaAdpModel
from loretta.tuners.register import register

__all__ = ["AdpLinear", "LorettaAdpConfig", "LorettaAdpModel"]

register("loretta_adp", LorettaAdpConfig, LorettaAdpModel)
