"""LoRETTA: tensor-train fine-tuning as PEFT methods. Importing this package registers them with PEFT.

The names below are imported at first use: torch takes seconds, and ``loretta --help`` does not need it.
"""

from typing import TYPE_CHECKING

from loretta import quantizer_logs
from loretta.lazy import lazy_attributes
from loretta.registration import register_with_peft
from loretta.version import __version__ as __version__

if TYPE_CHECKING:
    from peft import PeftModel, TaskType, get_peft_model

    from loretta.convert.compress import compress
    from loretta.convert.lora import export_lora
    from loretta.convert.merged import export_merged
    from loretta.errors import InputError
    from loretta.plan.auto import auto_config
    from loretta.plan.plan import plan_model
    from loretta.training.adaptive_ranks import AdaptiveRanks
    from loretta.training.graphs import CudaGraphTrainer
    from loretta.tuners.adp import LorettaAdpConfig, LorettaAdpModel
    from loretta.tuners.contraction import serving
    from loretta.tuners.in_place import hotswap_adapter, rename_adapter
    from loretta.tuners.rep import LorettaRepConfig, LorettaRepModel
    from loretta.tuners.shared import LorettaSharedConfig, LorettaSharedModel

# the imports above once more, for programs: those serve type checkers alone
_HOMES = {
    "AdaptiveRanks": "loretta.training.adaptive_ranks",
    "CudaGraphTrainer": "loretta.training.graphs",
    "InputError": "loretta.errors",
    "LorettaAdpConfig": "loretta.tuners.adp",
    "LorettaAdpModel": "loretta.tuners.adp",
    "LorettaRepConfig": "loretta.tuners.rep",
    "LorettaRepModel": "loretta.tuners.rep",
    "LorettaSharedConfig": "loretta.tuners.shared",
    "LorettaSharedModel": "loretta.tuners.shared",
    "PeftModel": "peft",
    "TaskType": "peft",
    "auto_config": "loretta.plan.auto",
    "compress": "loretta.convert.compress",
    "export_lora": "loretta.convert.lora",
    "export_merged": "loretta.convert.merged",
    "get_peft_model": "peft",
    "hotswap_adapter": "loretta.tuners.in_place",
    "plan_model": "loretta.plan.plan",
    "rename_adapter": "loretta.tuners.in_place",
    "serving": "loretta.tuners.contraction",
}

__all__ = [
    "AdaptiveRanks",
    "CudaGraphTrainer",
    "InputError",
    "LorettaAdpConfig",
    "LorettaAdpModel",
    "LorettaRepConfig",
    "LorettaRepModel",
    "LorettaSharedConfig",
    "LorettaSharedModel",
    "PeftModel",
    "TaskType",
    "auto_config",
    "compress",
    "explain",
    "export_lora",
    "export_merged",
    "get_peft_model",
    "hotswap_adapter",
    "plan_model",
    "rename_adapter",
    "serving",
]

if not TYPE_CHECKING:  # a type checker would accept any name
    __getattr__ = lazy_attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def explain(model: "PeftModel", adapter_name: str = "default") -> str:
    """One page on a wrapped model: where adapters sit, what is trained, and why the counts are what they are.

    A notebook shows it with pictures of the trains.

    Raises InputError when the adapter is not a LoRETTA adapter.
    """
    from loretta.plan import Explanation, read_plan

    return Explanation.of(read_plan(model, adapter_name))


quantizer_logs.hold()
register_with_peft()
