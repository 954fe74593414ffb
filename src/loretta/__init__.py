"""LoRETTA: tensor-train fine-tuning as PEFT methods. Importing this package registers both with PEFT."""

# ruff: noqa: E402 (PEFT is imported after the lines that its imports log are kept back)
from loretta import quantizer_logs

quantizer_logs.hold()

from peft import PeftModel, TaskType, get_peft_model

from loretta.convert.export import export_lora
from loretta.errors import InputError
from loretta.tuners.adp import LorettaAdpConfig, LorettaAdpModel
from loretta.tuners.in_place import hotswap_adapter, rename_adapter
from loretta.tuners.rep import LorettaRepConfig, LorettaRepModel

__version__ = "0.1.0"


def explain(model: PeftModel, adapter_name: str = "default") -> str:
    """One page on a wrapped model: where adapters sit, what is trained, and why the counts are what they are.

    Raises InputError when the adapter is not a LoRETTA adapter.
    """
    from loretta.plan.plan import read_plan
    from loretta.plan.words import explain_plan  # only here: what it draws tables with is not needed to train

    return explain_plan(read_plan(model, adapter_name))


__all__ = [
    "InputError",
    "LorettaAdpConfig",
    "LorettaAdpModel",
    "LorettaRepConfig",
    "LorettaRepModel",
    "PeftModel",
    "TaskType",
    "explain",
    "export_lora",
    "get_peft_model",
    "hotswap_adapter",
    "rename_adapter",
]
