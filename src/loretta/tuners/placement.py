"""Where an adapter's trains go and what they cost, decided from names and sizes before any module is replaced."""

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import NoMatchingPeftModuleError
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loretta import tt
from loretta.errors import InputError
from loretta.layers.shared import Seat
from loretta.layers.trains import Cores
from loretta.tuners.bypassed import read_only
from loretta.tuners.config import EVEN_RANK, LorettaConfig
from loretta.tuners.schema import check_expressions, check_size
from loretta.tuners.task_types import HEADS, base_class, named_base
from loretta.wording import distinct, nearest, quoted

Halves = tuple[Tensor, Tensor]


class NothingMatchedError(InputError, NoMatchingPeftModuleError):
    """The targets of an adapter match nothing that it could be put on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Two trains at one module: ``down`` reduces to the bottleneck, ``up`` comes back from it.

    ``where`` is "update" (rep and shared: added to the weight), "after" or "before" (adp: on the module's output or
    input). With a ``seat`` the two trains are sides of one that all modules share, and are counted there. With
    ``experts`` the first mode of ``down`` is the expert, and ``name`` is a parameter that holds the matrices of all.
    ``even`` is adp's `even_rates`: cores start larger (:meth:`larger_starts`), and the trains compute without that.
    """

    name: str
    where: str
    down: tt.TTShape
    up: tt.TTShape
    bias_params: int = 0
    seat: Seat | None = None
    experts: int = 0
    even: bool = False

    def larger_starts(self) -> tuple[list[float], list[float]]:
        """The factors by which the cores of both trains start larger with ``even_rates``; all are 1 at compact's ranks.

        A core's factor is the rank before it over compact's rank, for it sums over that rank. In ``up`` it is also the
        part of the core's mode that spells the bottleneck, over which it sums too.
        """
        down, up = (
            [left / EVEN_RANK if left > 1 else 1.0 for left, _, _ in shape.cores] for shape in (self.down, self.up)
        )
        parts = [mode // self.up.out_part(k) for k, mode in enumerate(self.up.modes)]
        return down, [factor * part for factor, part in zip(up, parts, strict=True)]

    def evened(self, down: Halves, up: Halves) -> tuple[Halves, Halves]:
        """The halves of both trains as they compute: ``even`` takes back by how much their cores started larger."""
        if not self.even:
            return down, up
        by_down, by_up = (1 / prod(larger) for larger in self.larger_starts())
        return (down[0], down[1] * by_down), (up[0] * by_up, up[1])

    @property
    def core_params(self) -> int:
        """Parameters of the trains that are this module's alone."""
        return 0 if self.seat else self.down.n_params + self.up.n_params

    @property
    def n_params(self) -> int:
        return self.core_params + self.bias_params


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, GPT-2's Conv1D or a quantised linear layer; None for anything else."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features) if _trial(module) != "no matrix" else None
    # an embedding may have a weight of torchao's, and PEFT would ask it for what only the model knows
    if not isinstance(module, nn.Embedding | BaseTunerLayer) and resolve_quantization_backend(module) is not None:
        return cast(int, module.in_features), cast(int, module.out_features)
    return None


def is_linear_map(module: nn.Module) -> bool:
    """Whether a linear layer's output is the product with its weight: a class of others may do more in its forward."""
    return not isinstance(module, nn.Linear) or _trial(module) == "linear"


_tried: dict[type, str] = {}  # what classes with a forward of their own turned out to compute


def _trial(module: nn.Linear) -> str:
    """ "linear", "other", or "no matrix" where the output of one row is not one row of ``out_features`` numbers.

    Routers of experts are such classes: some return a tuple. A quantised layer is taken at its word.
    """
    cls, weight = type(module), module.weight
    if cls.forward is nn.Linear.forward or cls in _tried:
        return _tried.get(cls, "linear")
    if not weight.numel() or not weight.is_floating_point() or resolve_quantization_backend(module):
        return "linear"
    if not _keeps_rows(module):
        _tried[cls] = "no matrix"
    if weight.is_meta or cls in _tried:
        return _tried.get(cls, "linear")
    row_1I = torch.linspace(-1, 1, module.in_features).to(weight)[None]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            found = cls.forward(module, row_1I.clone())
        except Exception:  # it wants other inputs; the first call of the model will say so
            return "linear"
        wanted = nn.functional.linear(row_1I, weight, module.bias)
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        _tried[cls] = "no matrix"
    else:
        _tried[cls] = "linear" if (found - wanted).abs().max() <= 0.02 * wanted.abs().max() else "other"
    return _tried[cls]


@torch.no_grad()
def _keeps_rows(module: nn.Linear) -> bool:
    """Whether rows become rows of ``out_features`` numbers, which shapes alone tell, so that plans know it too.

    DeepSeek V4 has layers that take as many rows at once as they have groups, and give shorter ones.
    """
    bare: Any = copy.copy(module)
    for of in ("_parameters", "_buffers"):
        own = getattr(module, of).items()
        setattr(bare, of, {name: None if value is None else value.to("meta") for name, value in own})
    for rows in ((), *((2**k,) for k in range(8))):
        x = torch.empty(1, *rows, module.in_features, dtype=module.weight.dtype, device="meta")
        try:
            found = type(module).forward(bare, x)
        except Exception:  # it wants other inputs
            continue
        return isinstance(found, Tensor) and found.shape == (*x.shape[:-1], module.out_features)
    return True


def rank_for(config: LorettaConfig, name: str) -> int:
    """The tensor-train rank of one module: its ``rank_pattern`` entry, or ``tensor_rank``."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.tensor_rank)


def require_linear(name: str, module: nn.Module) -> tuple[int, int]:
    """(in, out) of the target. Raises InputError that names the module and the reason when it is not linear."""
    size = linear_size(module)
    if size is None:
        raise InputError(
            f"the target '{name}' is a {type(module).__name__}, and tensor trains are put on linear layers only: "
            "name linear layers in target_modules, or leave this one out with exclude_modules"
        )
    return size


def planner(config: LorettaConfig) -> dict[str, Any]:
    """The options of :func:`loretta.tt.plan_shape` that a config sets."""
    return {"overrides": config.shapes, "modes_per_side": config.modes_per_side}


def plan_trains(
    name: str, size: tuple[int, int], width: tuple[int, int], bottleneck: int, **options: Any
) -> tuple[tt.TTShape, tt.TTShape]:
    """The trains down and up of a module of ``size``: ``width[0]`` x bottleneck and bottleneck x ``width[1]``.

    ``options`` are those of :func:`loretta.tt.plan_shape`. Raises InputError for a shape that does not fit, and for
    trains far larger than the module.
    """
    base = size[0] * size[1]
    check_size(name, f"a bottleneck of {quoted(bottleneck)}", max(width) * bottleneck, base)
    if options.get("modes") is None:  # where ranks are cut to what the modes can use, the train stays small
        check_size(name, f"a rank of {quoted(options['rank'])}", min(size) * options["rank"], base)
    try:
        trains = tt.plan_shape(width[0], bottleneck, **options), tt.plan_shape(bottleneck, width[1], **options)
    except ValueError as error:
        raise InputError(f"'{name}': {error}") from None
    for train in trains:
        check_size(name, f"a train of rank {quoted(options['rank'])}", train.n_params, base)
    return trains


def not_adaptable(model: nn.Module) -> dict[str, str]:
    """Class name -> why tensor trains cannot be put on its weights, for modules with matrices that are not linear.

    Embeddings and norms are left out: nobody expects them to be adapted.
    """
    reasons: dict[str, str] = {}
    adapted = {id(module.base_layer) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for module in model.modules():
        dims = {parameter.dim() for parameter in module.parameters(recurse=False) if parameter.dim() >= 2}
        if not dims or id(module) in adapted or linear_size(module) or isinstance(module, nn.Embedding | Cores):
            continue
        name = type(module).__name__
        if "Expert" in name or (max(dims) == 3 and "Conv" not in name):
            reasons[name] = (
                "holds the matrices of all experts in one tensor of three dimensions (rep takes it among "
                "target_parameters)"
            )
        elif "Conv" in name:
            reasons[name] = "is a convolution"
        else:
            reasons[name] = "applies its weights itself instead of through a linear layer"
    return reasons


def layers_asked(config: Any) -> set[int]:
    """The numbers of ``layers_to_transform``; none where every layer is adapted."""
    given = getattr(config, "layers_to_transform", None)
    return {given} if isinstance(given, int) else set(given or ())


def layer_of(name: str, pattern: str | Sequence[str] | None) -> int | None:
    """The number of the layer in which a module lies, as PEFT reads it for ``layers_pattern``; None for none."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    stacks = [rf"(?:^|.*?\.){each}" for each in patterns or ()] or [r".*?\.[^.]*"]
    found = (re.match(rf"{stack}\.(\d+)\.", name) for stack in stacks)
    return next((int(match[1]) for match in found if match), None)


def no_such_layers(config: Any, names: Iterable[str]) -> str | None:
    """A sentence where ``layers_to_transform`` has numbers that no layer among the modules ``names`` has."""
    within = getattr(config, "layers_pattern", None)
    there = {number for name in names if (number := layer_of(name, within)) is not None}
    lost = sorted(layers_asked(config) - there)
    if not lost:
        return None
    mend = f"give some of its {len(there)}, {min(there)} to {max(there)}" if there else "no module has a number there"
    under = f" under layers_pattern={within!r}" if within else ""
    return f"layers_to_transform: this model has no layer {' or '.join(map(str, lost))}{under}: {mend}"


def expand_targets(config: LorettaConfig, model: nn.Module) -> LorettaConfig:
    """``config``, with "all-linear" replaced by the names of those layers, as PEFT does.

    What the code around it reads without calling it is left out: an adapter there would do nothing.
    """
    check_expressions(config, model)
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    with without_copies(model) if everything else nullcontext():
        config = _maybe_include_all_linear_layers(config, model)
    if everything:
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        others = {name for name, module in linear.items() if linear_size(module) is None}
        wanted, within = layers_asked(config), config.layers_pattern
        if wanted:  # whole names, which PEFT takes wherever they lie
            others |= {name for name in config.target_modules or () if layer_of(name, within) not in wanted}
        config.target_modules = sorted(set(config.target_modules or ()) - read_only(model) - others)
    return config


@contextmanager
def without_copies(model: nn.Module) -> Iterator[None]:
    """In it the modules that other adapters have copied stand where they stood: PEFT would find the copies too."""
    copied = {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    try:
        for name, wrapper in copied.items():
            model.set_submodule(name, wrapper.original_module)
        yield
    finally:
        for name, wrapper in copied.items():
            model.set_submodule(name, wrapper)


def matched_modules(
    config: LorettaConfig, model: nn.Module, *, required: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that ``config`` targets, by PEFT's own matcher, before anything is replaced.

    Raises InputError that lists what could be targeted instead when nothing matches and something is ``required``.
    """
    config = expand_targets(config, model)
    if config.target_modules == DUMMY_TARGET_MODULES:  # PEFT's word for "adapt nothing"
        return
    found = False
    for name, module in model.named_modules():
        if name and check_target_module_exists(config, name):
            found = True
            yield name, module
    if required and not found:
        raise NothingMatchedError(_nothing_matched(config, model))


def unused_options(
    config: LorettaConfig, given: Collection[str] | str | None, placements: Sequence[Placement], model: nn.Module
) -> list[str]:
    """What was asked for and has no effect on this model, a sentence each; ``given`` are the user's target_modules."""
    names = [name for name, _ in model.named_modules()]
    found = []
    if given is not None and not isinstance(given, str) and not config.layers_to_transform:
        lost = sorted(t for t in given if not any(name == t or name.endswith(f".{t}") for name in names))
        if lost:
            ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if linear_size(module)})
            guess = nearest((name.rpartition(".")[2] for name in lost), ends)
            found.append(f"target_modules: nothing in this model is called {' or '.join(map(repr, lost))}{guess}")
    # PEFT adds the names of heads, and matches by the ends of names; a saved adapter had its warning once
    whole = [] if config.base_signature else sorted({*(config.modules_to_save or ())} - {*HEADS})
    if lost := [end for end in whole if not any(name.endswith(end) for name in names)]:
        guess = nearest((end.rpartition(".")[2] for end in lost), {name.rpartition(".")[2] for name in names})
        found.append(f"modules_to_save: nothing in this model is called {' or '.join(map(repr, lost))}{guess}")
    if (sentence := no_such_layers(config, names)) is not None:
        found.append(sentence)
    sizes = {f"{s.in_features}x{s.out_features}" for p in placements for s in (p.down, p.up)}
    sizes |= {f"{p.down.in_features // p.experts}x{p.down.out_features}" for p in placements if p.experts}
    # the hidden layer of a head is a train too
    sizes |= {f"{size[0]}x{size[1]}" for module in model.modules() if (size := linear_size(module)) is not None}
    if unused := [size for size in config.shapes if size not in sizes]:
        has = sorted({f"{s.in_features}x{s.out_features}" for p in placements for s in (p.down, p.up)})
        found.append(f"shapes: no matrix of the adapter has the size {', '.join(unused)}; there are {', '.join(has)}")
    return found


def _nothing_matched(config: LorettaConfig, model: nn.Module) -> str:
    wanted = config.target_modules
    given = repr(wanted) if isinstance(wanted, str) else str(sorted(wanted or []))
    # the layer inside an earlier adapter's is no target of its own
    linear = [name for name, module in model.named_modules() if linear_size(module) and ".base_layer" not in name]
    linear += [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not linear:
        kinds = distinct(type(module).__name__ for module in model.modules() if [*module.parameters(recurse=False)])
        return (
            f"the model has no linear layers, at which trains lie (its weights are in {kinds or 'no module'}): give a "
            "method of PEFT that adapts such modules, or train them whole"
        )
    of_whole = {f"{getattr(model, 'base_model_prefix', '')}.{name}" for name in linear}
    if not isinstance(wanted, str) and of_whole & {*(wanted or ())}:
        return (
            f"the adapter was made for a model with its head, and this {type(model).__name__} is loaded without: load "
            f"it as {base_class(config.to_dict()) or 'the class that it had then'}"
        )
    matched = [] if isinstance(wanted, str) else [name for name in linear if name.endswith(tuple(wanted or []))]
    within = [[whole for whole in config.modules_to_save or [] if f".{whole}." in f".{name}."] for name in matched]
    if within and all(within):
        whole = ", ".join(dict.fromkeys(name for names in within for name in names))
        return (
            f"Target modules {given} not found in the base model beside what is trained whole ({whole}): "
            "name other modules"
        )
    names = sorted({name.rpartition(".")[2] for name in linear})
    ends = [] if isinstance(wanted, str) else [name.rpartition(".")[2] for name in sorted(wanted or [])]
    ends = [end for end in ends if end not in names]
    limits = [
        f"{key}={value!r}"
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, key))
    ]
    limited = f" within {', '.join(limits)}" if limits else ""
    if (sentence := no_such_layers(config, [name for name, _ in model.named_modules()])) is not None:
        limited += f" ({sentence})"
    return (
        f"Target modules {given} not found in the base model{limited}{nearest(ends, names)}: "
        f"linear layers here end in {', '.join(names)}"
    )


def sign(config: LorettaConfig, placements: list[Placement]) -> None:
    """Note the adapted modules of the base model in a config that is about to be saved."""
    config._injected_into = _signature(placements)


def _signature(placements: list[Placement]) -> str:
    kinds = Counter((p.name.rpartition(".")[2], p.experts, p.down.in_features, p.up.out_features) for p in placements)
    return ", ".join(
        # of experts their number and the rows of one: 8*4096 x 14336
        f"{count} {name} {f'{experts}*{i // experts}' if experts else i} x {o}"
        for (name, experts, i, o), count in sorted(kinds.items())
    )


def check_signature(config: LorettaConfig, placements: list[Placement]) -> None:
    """Refuse an adapter of another base model."""
    signature = _signature(placements)
    if config.base_signature not in (None, signature):
        raise InputError(
            f"this adapter was trained for another base model: it adapts {config.base_signature}, and this model has "
            f"{signature}; load it with '{named_base(config)}'"
        )
