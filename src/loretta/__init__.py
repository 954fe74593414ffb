"""LoRETTA: tensor-train fine-tuning as PEFT methods. Importing this package registers them with PEFT.

The names below are imported at first use: torch takes seconds, and ``loretta --help`` does not need it.
"""

from typing import TYPE_CHECKING

from loretta import quantizer_logs
from loretta.lazy import lazy_names
from loretta.registration import register_with_peft
from loretta.version import __version__ as __version__

if TYPE_CHECKING:
    from peft import PeftModel as PeftModel
    from peft import TaskType as TaskType
    from peft import get_peft_model as get_peft_model

    from loretta.convert.compress import compress as compress
    from loretta.convert.lora import export_lora as export_lora
    from loretta.convert.merged import export_merged as export_merged
    from loretta.errors import InputError as InputError
    from loretta.plan.auto import auto_config as auto_config
    from loretta.plan.plan import plan_model as plan_model
    from loretta.training.adaptive_ranks import AdaptiveRanks as AdaptiveRanks
    from loretta.training.graphs import CudaGraphTrainer as CudaGraphTrainer
    from loretta.tuners.adp import LorettaAdpConfig as LorettaAdpConfig
    from loretta.tuners.adp import LorettaAdpModel as LorettaAdpModel
    from loretta.tuners.contraction import serving as serving
    from loretta.tuners.in_place import hotswap_adapter as hotswap_adapter
    from loretta.tuners.in_place import rename_adapter as rename_adapter
    from loretta.tuners.rep import LorettaRepConfig as LorettaRepConfig
    from loretta.tuners.rep import LorettaRepModel as LorettaRepModel
    from loretta.tuners.shared import LorettaSharedConfig as LorettaSharedConfig
    from loretta.tuners.shared import LorettaSharedModel as LorettaSharedModel
else:  # a type checker would accept any name
    __getattr__, __dir__, __all__ = lazy_names(__name__, "explain")


def explain(model: "PeftModel", adapter_name: str = "default") -> str:
    """One page on a wrapped model: where adapters sit, what is trained, and why the counts are what they are.

    A notebook shows it with pictures of the trains.

    Raises InputError when the adapter is not a LoRETTA adapter.
    """
    from loretta.plan import Explanation, read_plan

    return Explanation.of(read_plan(model, adapter_name))


quantizer_logs.hold()
register_with_peft()
