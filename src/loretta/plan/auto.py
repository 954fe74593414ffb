"""The form of an adapter that measured best among those that fit a budget."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from loretta.errors import InputError
from loretta.plan.base_models import default_task_type, find_config, meta_model
from loretta.plan.budget import Budget, highest_rank, with_rank
from loretta.plan.front import ATTENTION, VALUES_AND_MLPS, Form, Kind, read_front, short
from loretta.plan.plan import Plan, plan_model
from loretta.plan.presets import loretta_configs
from loretta.tuners.bypassed import read_only
from loretta.tuners.config import LorettaConfig
from loretta.tuners.placement import linear_size
from loretta.tuners.rep import LorettaRepConfig
from loretta.tuners.rescaled import value_layers
from loretta.wording import quoted

# the form decides these options; the other shared ones may be given beside a budget
_OF_FORMS = {"tensor_rank", "modes_per_side", "shapes", "rank_pattern"}
AUTO_OPTIONS = {field.name for field in dataclasses.fields(LorettaConfig)} - _OF_FORMS
# beside a form, these make an adapter that was not measured
_OF_THE_MEASUREMENT = {
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "init_weights",
    "bias", "modules_to_save", "train_scales", "trainable_token_indices",
}  # fmt: skip
_ATTENTION = re.compile(r"attn|attention|(^|_)att$", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"(Attention|Attn)(?!.*(Layer|Block|Stage|Encoder|Decoder|Model)$)")
# lie within attention in some families, and are none of its projections of tokens; what the indexers of DeepSeek choose
# has no gradient
_BESIDE_ATTENTION = re.compile(r"mlp|feed_?forward|ffn|^fc\d|expert|router|indexer|(^|_)pos(_|$)|position")
NO_BUDGET = "compact is the form that measured best for its size; with a budget the form follows from that"


def auto_config(
    model: nn.Module | str, budget: str | int | None = None, *, task_type: str | None = None, **options: Any
) -> LorettaConfig:
    """The config of the form that measured best (docs/choosing.md) among those that fit ``budget`` on ``model``.

    It is an ordinary config for ``get_peft_model``; its ``why`` names the measurement behind the choice. Of the forms
    that were run on the measured model most like this one in kind and width, and whose measured rank fits, the best one
    gets the highest rank that fits. Below them all the smallest one gets a lower rank than was measured. All that is
    trained counts: cores, norms, and what is trained of a head.

    Args:
        model: a model that is not wrapped yet, or the name of one (a Hub id, a folder, or one of
            ``loretta.plan.FAMILIES``), of which only the configuration is read.
        budget: "100k" (parameters), "400kB" (bytes of the saved adapter in float32), or a number of parameters. Without
            one it is ``LorettaRepConfig.compact``.
        task_type: as PEFT's. For a name, the default is that of ``loretta plan``.
        options: of :class:`LorettaConfig`. ``train_norms`` limits the choice; False is for adapters that are to be a
            LoRA elsewhere, without scales too.

    Raises InputError when no form fits, or for an option that is the choice itself.
    """
    if isinstance(model, str):
        found = find_config(model)
        task_type = task_type or default_task_type(found)
        model = meta_model(found, task_type)
        task_type = None if task_type == "IMAGE_CLS" else task_type  # PEFT has no such type
    if isinstance(model, PeftModel):
        raise InputError("auto_config: the model has an adapter already, so give the base model without one")
    if budget is None:
        return without_budget(task_type, options)
    return choose_form(model, Budget.parse(budget), task_type, options)[0]


def without_budget(task_type: str | None, options: Mapping[str, Any]) -> LorettaRepConfig:
    """Compact, which is what "auto" is where no budget says how large it may be."""
    config = LorettaRepConfig.compact(task_type=task_type, **options)
    config.__dict__["_why"] = NO_BUDGET
    return config


def choose_form(
    model: nn.Module, budget: Budget, task_type: str | None, options: Mapping[str, Any]
) -> tuple[LorettaConfig, Plan, list[str]]:
    """What :func:`auto_config` chooses on a model that is not wrapped (the meta device is enough), planned, and why.

    Raises InputError as that does.
    """
    if wrong := sorted(options.keys() - AUTO_OPTIONS):
        raise InputError(
            f"a budget chooses the form, so {', '.join(map(repr, wrong))} cannot be given beside it: name a method "
            "too, or leave that out"
        )
    front = read_front()
    nearest = front.nearest(*_kind_and_width(model))
    asked = options.get("train_norms")
    forms = [form for form in front.ranked(nearest) if asked in (None, form.options["train_norms"])]
    if asked is False and not options.get("train_scales"):  # it is to be a LoRA
        forms = [form for form in forms if not form.options.get("train_scales")]
    smallest: Plan | None = None
    refusal: InputError | None = None
    # what has to be cut the least is the most like what was measured
    smallest_first = sorted(forms, key=lambda form: form.scores[nearest].count)
    for at_rank_1 in (False, True):
        for form in smallest_first if at_rank_1 else forms:
            try:
                config = loretta_configs()[form.method](task_type=task_type, **{**options_on(model, form), **options})
                config = with_rank(config, 1) if at_rank_1 else config
                plan = plan_model(model, config)
            except InputError as error:  # a model without default targets, or one that the form does not fit
                refusal = error
                continue
            if smallest is None or budget.used(plan) < budget.used(smallest):
                smallest = plan
            if not budget.fits(plan):
                continue
            best, best_plan, words = highest_rank(config, plan, model, budget)
            why = front.why(form, nearest)
            changed = [n for n in _OF_THE_MEASUREMENT & options.keys() if options[n] != form.options.get(n)]
            if changed:
                own = ", ".join(f"{name}={quoted(options[name])}" for name in sorted(changed))
                why += f"; here it has {own} instead, which was not measured"
            if (rank := best.tensor_rank) != form.options["tensor_rank"]:
                same = [f for f in forms if f.but_rank == form.but_rank and f.options["tensor_rank"] == rank]
                had = f"has {short(same[0].scores[nearest].mean)} there" if same else "was not measured"
                only = "only " if rank < form.options["tensor_rank"] else ""
                why += f"; {only}rank {rank} of it fits here, which {had}"
            best.__dict__["_why"] = "; ".join([why, words[0]])
            return best, best_plan, [why, *words]
    if smallest is None:
        raise refusal or InputError("no measured form has the options that were given: leave train_norms out")
    raise InputError(
        f"no adapter fits {budget}: the smallest takes {budget.used(smallest):,} {budget.unit}; raise the budget, or "
        "train less of the head with train_head=frozen"
    )


def _kind_and_width(model: nn.Module) -> tuple[Kind, int | None]:
    """Whether a model reads or writes text, and its width where its configuration says so."""
    config = getattr(model, "config", None)
    sizes = BaseTuner.get_model_config(model)
    width = sizes.get("hidden_size") or sizes.get("d_model") or sizes.get("n_embd")
    reads = config is None or default_task_type(config) in ("SEQ_CLS", "IMAGE_CLS")
    return "encoder" if reads else "decoder", width


def options_on(model: nn.Module, form: Form) -> dict[str, Any]:
    """The options of a form, with what its places are called in ``model``. Raises InputError where it has none."""
    finders = {ATTENTION: attention_layers, VALUES_AND_MLPS: values_and_mlps}
    find = finders.get(form.options.get("target_modules", ""))
    return {**form.options, **({"target_modules": find(model)} if find else {})}


def attention_layers(model: nn.Module) -> list[str]:
    """The linear layers of attention that an adapter can be put on, by the shortest ends that name no other module."""
    return _by_ends(model, {name for name, beside in _within_attention(model) if not beside})


def values_and_mlps(model: nn.Module) -> list[str]:
    """The values' layers and all linear ones of MLPs, as :func:`attention_layers`.

    Raises InputError for a type of model whose values are unknown, or computed by a layer with the keys.
    """
    values, attention = set(value_layers(model)), {name for name, _ in _within_attention(model)}
    numbered = {name for name, module in model.named_modules() if re.search(r"\.\d+\.", name)}
    mlps = {name for name in numbered - attention if linear_size(model.get_submodule(name)) is not None}
    return _by_ends(model, (values | mlps) - read_only(model))


def _within_attention(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """(name, whether it is no projection of tokens) of the linear layers within attention."""
    left_out, modules = read_only(model), dict(model.named_modules())
    for name, module in modules.items():
        parts = name.split(".")
        kinds = [type(modules[".".join(parts[:depth])]).__name__ for depth in range(1, len(parts))]
        within = [k for k, kind in enumerate(kinds) if _ATTENTION.search(parts[k]) or _ATTENTION_CLASS.search(kind)]
        if within and name not in left_out and linear_size(module) is not None:
            yield name, any(map(_BESIDE_ATTENTION.search, parts[within[0] + 1 :]))


def _by_ends(model: nn.Module, chosen: Set[str]) -> list[str]:
    """The shortest ends of names that name these modules and no other."""
    others: set[str] = set()
    for name in dict(model.named_modules()).keys() - chosen:
        others |= set(_ends(name))
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in chosen})


def _ends(name: str) -> list[str]:
    """The ends of a name at its dots, from the shortest."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
