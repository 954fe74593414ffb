"""``loretta plan``: from a model's name, a preset, options and a budget to a plan that can be shown."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loretta.errors import InputError
from loretta.options import parse_option, with_lists
from loretta.plan.auto import NO_BUDGET, choose_form
from loretta.plan.base_models import WITH_LABELS, default_task_type, find_config, meta_model
from loretta.plan.budget import Budget, choose
from loretta.plan.plan import Plan, count_baseline, plan_model
from loretta.plan.presets import Preset, find_preset, loretta_configs
from loretta.plan.words import explain_plan, tables
from loretta.tuners.config import LorettaConfig
from loretta.tuners.rep import COMPACT


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A plan with where it came from. ``plan`` is None for a baseline of the paper, which is only counted."""

    model: str
    task_type: str
    trainable: int
    plan: Plan | None
    options: Mapping[str, Any]
    preset: Preset | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        content: dict[str, Any] = {"model": self.model, "task_type": self.task_type, "trainable": self.trainable}
        if self.preset is not None:
            content["paper"] = {
                "table": self.preset.table,
                "method": self.preset.method,
                "count": self.preset.count,
                "printed": self.preset.printed,
                "note": self.preset.note,
                "protocol": dict(self.preset.protocol),
            }
        content |= {"options": dict(self.options), "notes": list(self.notes)}
        return content if self.plan is None else content | self.plan.as_dict()

    def table(self) -> str:
        """The tables for a person."""
        head = f"{self.model}, {self.task_type}: {self.trainable:,} trained parameters"
        body = [] if self.plan is None else [tables(self.plan)]
        unused = () if self.plan is None else (f"without effect: {sentence}" for sentence in self.plan.unused)
        return "\n".join([head, *body, *unused, *self.notes])

    def explanation(self) -> str:
        """The page in words."""
        return self.table() if self.plan is None else explain_plan(self.plan, self.notes)


def make_plan(
    *,
    model: str | None = None,
    method: str | None = None,
    preset: str | None = None,
    task_type: str | None = None,
    num_labels: int | None = None,
    budget: str | None = None,
    sets: Sequence[str] = (),
) -> PlanResult:
    """Plan a method, or a preset, on a model that exists as a configuration alone.

    A preset brings its own model, method and options; ``model`` and ``sets`` change them. The preset "auto", which is
    what a budget without a method takes, is the form that measured best among those that fit. Raises InputError for
    everything that a user can mend.
    """
    name, method, found = _asked(model, method, preset, budget)
    config = find_config(name)
    task_type = task_type or (found.task_type if found else default_task_type(config))
    if num_labels is not None and task_type not in WITH_LABELS:
        raise InputError(f"--num-labels {num_labels} is for a head of labels, which {task_type} has not: leave it out")
    base = meta_model(config, task_type, num_labels=2 if num_labels is None else num_labels)
    notes = _preset_notes(found, name)
    given = dict(parse_option(word) for word in sets)
    if method == "auto" and budget is None:
        method, notes = "compact", (*notes, NO_BUDGET)
    if method == "compact":
        method, given = "rep", {**COMPACT, **given}
    if method not in {"auto", *(configs := loretta_configs())}:
        if found is None:
            raise InputError(f"unknown method {method!r}: choose one of auto, compact, {', '.join(configs)}")
        if sets or budget:
            raise InputError(f"the preset {preset!r} is a baseline that is only counted: leave --set and --budget out")
        count = count_baseline(base, found)
        return PlanResult(
            model=name, task_type=task_type, trainable=count, plan=None, options=found.options, preset=found,
            notes=notes,
        )  # fmt: skip
    options = {**(found.options if found else {}), **given}
    peft_task = None if task_type == "IMAGE_CLS" else task_type
    loretta_config, plan, reasons = _planned(base, method, options, peft_task, budget)
    shown = {option: getattr(loretta_config, option) for option in _options_of(plan.method)}
    return PlanResult(
        model=name,
        task_type=task_type,
        trainable=plan.trainable,
        plan=plan,
        options={key: sorted(value) if isinstance(value, set) else value for key, value in shown.items()},
        preset=found,
        notes=(*notes, *reasons),
    )


def _asked(
    model: str | None, method: str | None, preset: str | None, budget: str | None
) -> tuple[str, str, Preset | None]:
    """The names of the model and the method, and the preset that brings them."""
    if preset == "auto" or (budget is not None and method is None and preset is None):
        if method not in (None, "auto"):
            raise InputError(f"the preset 'auto' chooses the method, so leave out {method!r}, or the preset")
        preset, method = None, "auto"
    found = find_preset(preset) if preset is not None else None
    if found is not None and method not in (None, found.method):
        raise InputError(f"the preset {preset!r} is of method {found.method!r}, not {method!r}: leave one of them out")
    name = model or (found.model if found else None)
    if name is None:
        raise InputError("give --model (a Hub id, a folder, or a name such as llama-2-7b) or --preset")
    method = method or (found.method if found else "compact")
    return name, method.removeprefix("loretta_"), found  # `loretta train` has names with the prefix, too


def _planned(
    base: nn.Module, method: str, options: Mapping[str, Any], task_type: str | None, budget: str | None
) -> tuple[LorettaConfig, Plan, Sequence[str]]:
    """The config of a method, or of the one that a budget chooses, its plan, and the reasons for a choice."""
    if method == "auto":
        assert budget is not None
        return choose_form(base, Budget.parse(budget), task_type, with_lists(options, LorettaConfig))
    cls, known = loretta_configs()[method], sorted(_options_of(method))
    if unknown := sorted(options.keys() - known):
        raise InputError(f"unknown option {', '.join(map(repr, unknown))}: the method takes {', '.join(known)}")
    config = cls(task_type=task_type, **with_lists(options, cls))
    return (config, plan_model(base, config), ()) if budget is None else choose(base, config, Budget.parse(budget))


def _options_of(method: str) -> list[str]:
    inherited = {field.name for field in dataclasses.fields(LorettaConfig.__mro__[1])}
    return [field.name for field in dataclasses.fields(loretta_configs()[method]) if field.name not in inherited]


def _preset_notes(preset: Preset | None, model: str) -> tuple[str, ...]:
    if preset is None:
        return ()
    words = f"table {preset.table} of the paper prints {preset.printed}"
    if model != preset.model:
        words += f" for {preset.model}"
    return (words, *([preset.note] if preset.note else []))
