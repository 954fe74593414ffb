"""LoRETTA: tensor-train fine-tuning as PEFT methods. Importing this package registers both with PEFT."""

from peft import PeftModel, TaskType, get_peft_model

from loretta.errors import InputError
from loretta.tuners.adp import LorettaAdpConfig, LorettaAdpModel
from loretta.tuners.rep import LorettaRepConfig, LorettaRepModel

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "LorettaAdpConfig",
    "LorettaAdpModel",
    "LorettaRepConfig",
    "LorettaRepModel",
    "PeftModel",
    "TaskType",
    "get_peft_model",
]
