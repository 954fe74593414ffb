"""Adapters of one model keep apart: what one of them trains whole, or a part of it, none changes in another way."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule
from loretta.tuners.config import LorettaConfig
from loretta.tuners.names import keys_of, name_in_base
from loretta.tuners.norms import named_whole, norms_of, outer_modules
from loretta.tuners.placement import matched_modules, without_copies
from loretta.tuners.rescaled import scaled_modules


def check_apart(model: nn.Module, config: LorettaConfig, adapter_name: str, head: Sequence[str]) -> None:
    """Refuse modules to train whole, the ``head``'s among them, that do not keep apart.

    Within another such module a copy would lie in a copy, where PEFT loads nothing. Where another adapter has trains,
    the copy would hold these, and neither adapter could be saved.

    Raises InputError that names both.
    """
    ends = (*(config.modules_to_save or ()), *head)
    names = [name for name in keys_of(model) if ends and name.endswith(ends)]
    if pair := next(((name, outer) for outer in names for name in names if name.startswith(f"{outer}.")), None):
        raise InputError(
            f"'{pair[0]}' lies within '{pair[1]}', and modules_to_save and train_head name both to be trained whole: "
            "leave one of them out, or give longer names in modules_to_save, which end like no other module's"
        )
    with without_copies(model):
        whole = {*head, *named_whole(outer_modules(model), config)}
    for name, module in model.named_modules():
        others = [n for n in _adapters_of(module) if n != adapter_name]
        is_copy = isinstance(module, ModulesToSaveWrapper)
        if not others or (is_copy and name in whole):
            continue
        plain = name_in_base(name)
        if outer := next((each for each in whole if _is_within(name, each)), None):
            raise InputError(
                f"'{outer}' is to be trained whole, and the adapter {others[0]!r} changes '{plain}': leave one of them "
                "out, or put the adapters on models of their own"
            )
        if is_copy and (inner := next((n for n in _changed(model, config, whole) if _is_within(n, name)), None)):
            raise InputError(
                f"'{inner}' is to be adapted, and the adapter {others[0]!r} trains '{name}' whole: leave one of them "
                "out (exclude_modules, train_norms=False), or put the adapters on models of their own"
            )


def _adapters_of(module: Any) -> Sequence[str]:
    if isinstance(module, AdaptedModule):
        return module.held
    is_adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return sorted(module._get_available_adapters()) if is_adapted else []


def _changed(model: nn.Module, config: LorettaConfig, whole: Collection[str]) -> list[str]:
    """What an adapter changes or trains whole, by the names in a model without copies."""
    targeted = copy.copy(config)
    targeted.modules_to_save = list(whole)
    ends = tuple(config.target_parameters or ())
    with without_copies(model):
        return [
            *whole,
            *(name for name, _ in matched_modules(targeted, model, required=False)),
            *(scaled.name for scaled in scaled_modules(model, config)),
            *(norms_of(model) if config.train_norms else ()),
            *(name for name, _ in model.named_parameters() if name.endswith(ends) and ends),
        ]


def _is_within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")
