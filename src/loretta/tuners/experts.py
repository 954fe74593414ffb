"""Matrices of experts that lie in one parameter of three dimensions: finding them, and planning trains for them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from loretta import tt
from loretta.errors import InputError
from loretta.tuners.config import LorettaConfig
from loretta.tuners.placement import NothingMatchedError, Placement, plan_trains, planner, rank_for

# modules of transformers that do not say themselves whether a matrix is (in, out), by class name
_TRANSPOSED = {"Llama4TextExperts": True}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSize:
    """``count`` matrices of ``in_features`` to ``out_features``; ``transposed``: each lies as (in, out)."""

    count: int
    in_features: int
    out_features: int
    transposed: bool


def experts_size(name: str, module: nn.Module, parameter: str) -> ExpertsSize:
    """The sizes of one parameter of a module of experts.

    Raises InputError with the reason where the parameter does not hold one matrix for each expert, is quantised, or
    nobody says which of its dimensions is the input.
    """
    weight = getattr(module, parameter)
    if weight.dim() != 3:
        raise InputError(
            f"the target parameter '{name}' has {weight.dim()} dimensions, and target_parameters is for those of 3, "
            "which hold one matrix for each expert: name linear layers in target_modules"
        )
    if weight.dtype not in _DTYPES:
        raise InputError(
            f"the target parameter '{name}' is quantised ({weight.dtype}): load the model in bfloat16 to adapt its "
            "experts, or leave them out of target_parameters"
        )
    # transformers writes this on the experts of Mixtral, Qwen-MoE, DeepSeek, gpt-oss and most others
    transposed = getattr(module, "is_transposed", _TRANSPOSED.get(type(module).__name__))
    if transposed is None:
        raise InputError(
            f"the target parameter '{name}' is one of a {type(module).__name__}, whose matrices may lie as (in, out) "
            "or as (out, in): known are experts that transformers marks with is_transposed (Mixtral, Qwen-MoE, "
            f"DeepSeek, gpt-oss, ...), and {', '.join(_TRANSPOSED)}; leave it out of target_parameters"
        )
    count, rows, columns = weight.shape
    sizes = (rows, columns) if transposed else (columns, rows)
    return ExpertsSize(count=count, in_features=sizes[0], out_features=sizes[1], transposed=transposed)


def matched_parameters(config: LorettaConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, the module that holds it, its name there) of what ``target_parameters`` names, by their ends.

    Names are those of the model without adapters. Raises InputError for a target that matches nothing.
    """
    found: set[str] = set()
    three: set[str] = set()
    for at, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        at = at.replace(".base_layer", "")
        for parameter, value in sorted(module.named_parameters(recurse=False)):
            name = f"{at}.{parameter}"
            if value.dim() == 3:
                three.add(".".join(name.split(".")[-2:]))
            matched = [t for t in config.target_parameters or () if name == t or name.endswith(f".{t}")]
            if matched:
                found.update(matched)
                yield name, module, parameter
    if lost := [target for target in config.target_parameters or () if target not in found]:
        has = f"there are {', '.join(sorted(three))}" if three else "its experts, if any, are linear layers"
        raise NothingMatchedError(
            f"target_parameters: no parameter of this model is called {' or '.join(map(repr, lost))}; of those that "
            f"hold the matrices of experts {has}"
        )


def plan_experts(config: LorettaConfig, name: str, module: nn.Module, parameter: str, bottleneck: int) -> Placement:
    """Two trains for all matrices of one parameter; the first mode of ``down`` is the expert.

    Raises InputError as :func:`experts_size` does, and where a given shape does not fit.
    """
    size, rank = experts_size(name, module, parameter), rank_for(config, name)
    matrix = size.in_features, size.out_features
    down, up = plan_trains(name, matrix, matrix, bottleneck, rank=rank, **planner(config))
    return Placement(name=name, where="update", down=tt.stacked(down, size.count, rank), up=up, experts=size.count)
