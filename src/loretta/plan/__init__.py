"""What a method will do to a model, from sizes alone: ``loretta plan``.

All that other rooms use is named here, and imported at first use: pictures need no torch.
"""

from typing import TYPE_CHECKING

from loretta.lazy import lazy_names

if TYPE_CHECKING:
    from loretta.plan.auto import auto_config, choose_form
    from loretta.plan.base_models import FAMILIES, default_task_type, find_config, meta_model
    from loretta.plan.budget import Budget, choose
    from loretta.plan.counts import trainable_by_kind
    from loretta.plan.picture import train_svg
    from loretta.plan.plan import Plan, count_baseline, plan_model, read_plan
    from loretta.plan.presets import PRESETS, Preset, find_preset, list_presets, preset_table
    from loretta.plan.request import PlanResult, make_plan
    from loretta.plan.words import Explanation, explain_plan
else:  # a type checker would accept any name
    __getattr__, __dir__, __all__ = lazy_names(__name__)
