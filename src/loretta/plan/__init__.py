"""What a method will do to a model, from sizes alone: ``loretta plan``.

All that other rooms use is named here, and imported at first use: pictures need no torch.
"""

from typing import TYPE_CHECKING

from loretta.lazy import lazy_attributes

if TYPE_CHECKING:
    from loretta.plan.auto import auto_config, choose_form
    from loretta.plan.base_models import FAMILIES, default_task_type, find_config, meta_model
    from loretta.plan.budget import Budget, choose
    from loretta.plan.counts import KINDS, trainable_by_kind
    from loretta.plan.picture import train_svg
    from loretta.plan.plan import Plan, count_baseline, plan_model, read_plan
    from loretta.plan.presets import PRESETS, Preset, find_preset, list_presets, preset_table
    from loretta.plan.request import PlanResult, make_plan
    from loretta.plan.words import Explanation, explain_plan
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            **dict.fromkeys(("auto_config", "choose_form"), "loretta.plan.auto"),
            **dict.fromkeys(("FAMILIES", "default_task_type", "find_config", "meta_model"), "loretta.plan.base_models"),
            **dict.fromkeys(("Budget", "choose"), "loretta.plan.budget"),
            **dict.fromkeys(("KINDS", "trainable_by_kind"), "loretta.plan.counts"),
            "train_svg": "loretta.plan.picture",
            **dict.fromkeys(("Plan", "count_baseline", "plan_model", "read_plan"), "loretta.plan.plan"),
            **dict.fromkeys(
                ("PRESETS", "Preset", "find_preset", "list_presets", "preset_table"), "loretta.plan.presets"
            ),
            **dict.fromkeys(("PlanResult", "make_plan"), "loretta.plan.request"),
            **dict.fromkeys(("Explanation", "explain_plan"), "loretta.plan.words"),
        },
    )

__all__ = [
    "FAMILIES",
    "KINDS",
    "PRESETS",
    "Budget",
    "Explanation",
    "Plan",
    "PlanResult",
    "Preset",
    "auto_config",
    "choose",
    "choose_form",
    "count_baseline",
    "default_task_type",
    "explain_plan",
    "find_config",
    "find_preset",
    "list_presets",
    "make_plan",
    "meta_model",
    "plan_model",
    "preset_table",
    "read_plan",
    "train_svg",
    "trainable_by_kind",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
