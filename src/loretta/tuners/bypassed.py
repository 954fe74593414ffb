"""Modules whose weight a model reads without calling them: an adapter there would do nothing.

Mamba multiplies with ``self.dt_proj.weight``, fused kernels take ``self.out_proj.weight`` as an argument, and torch's
attention passes its weights to a function. The code of a class shows such modules before anything is replaced; cases
that depend on kernels, devices and inputs show when the model first runs (:mod:`loretta.tuners.watch`).
"""

import dis
import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from loretta.errors import InputError

# attributes of a weight that do not depend on its values
_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "element_size"}

_RESCALED = re.compile(r"blocks\.(\d+)\.(attention\.output|feed_forward\.value)$")


def check_called(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse targets whose weight the module around them computes with, and which its code never calls.

    And those whose weight transformers' RWKV divides in evaluation, with what it adds them to: an update beside the
    weight would count 2, 4, ... times as much as in training.

    Raises InputError that names the first one.
    """
    every = getattr(getattr(model, "config", None), "rescale_every", 0)
    for name in targets:
        if every > 0 and (found := _RESCALED.search(name)) and int(found[1]) >= every:
            raise InputError(
                f"the target '{name}' is divided by the model in evaluation (rescale_every={every}), and an adapter of "
                "it would not be: load the base model with rescale_every=0, or leave it out with exclude_modules"
            )
        parts = name.split(".")
        *_, parent = above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        if parts[-1] in read_only_children(type(parent)):  # type: ignore[arg-type]
            raise InputError(
                f"the target '{name}' is a part of a {type(parent).__name__}, which reads its weight without calling "
                "it: an adapter would do nothing; leave it out with exclude_modules"
            )
        in_encoder = any(isinstance(module, nn.TransformerEncoderLayer) for module in above)
        if in_encoder and torch.backends.mha.get_fastpath_enabled():
            raise InputError(
                f"the target '{name}' lies in torch's TransformerEncoderLayer, which in evaluation reads its weights "
                "without calling it: call torch.backends.mha.set_fastpath_enabled(False) first"
            )


def places_by_module(model: nn.Module) -> Counter[nn.Module]:
    """Module of ``model`` -> how many modules have it as a child. An adapter goes to one of these places only."""
    return Counter(part for module in model.modules() for part in module._modules.values() if part is not None)


def under_other_names(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """A sentence on targets that ``model`` has in several places: PEFT replaces a layer in the first place only."""
    places = places_by_module(model)
    if not (found := [name for name in targets if places[model.get_submodule(name)] > 1]):
        return []
    return [
        f"the model has {len(found)} of the adapted modules under other names as well, where it calls them without "
        f"the adapter: {', '.join(found)}; leave them out with exclude_modules where that is not wanted"
    ]


def read_only(model: nn.Module) -> set[str]:
    """Names of all modules of ``model`` that :func:`check_called` refuses for the code around them."""
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        for child in read_only_children(type(module)) & module._modules.keys()  # type: ignore[arg-type]
    }


@functools.cache
def read_only_children(cls: type[nn.Module]) -> frozenset[str]:
    """The attributes of a class that its methods use only to compute with their ``weight``.

    They are found in the bytecode, which classes without a source file have too. An attribute that any branch calls or
    passes to a function is not among them.
    """
    codes = [
        (name, code)
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        for code in _codes_of(value)
    ]
    read = {
        child
        for name, code in codes
        if "weight" in code.co_names and "init" not in name
        for child, attributes in _uses(code)
        if attributes[:1] == ["weight"] and not _ABOUT & set(attributes[1:2])
    }
    used = {
        child
        for _, code in codes
        if read & set(code.co_names)
        for child, attributes in _uses(code)
        if attributes[:1] not in (["weight"], ["bias"])
    }
    return frozenset(read - used)


def _codes_of(value: Any) -> Iterator[CodeType]:
    """The bytecode of a method or property, and that of the functions within it."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
    pending = [] if code is None else [code]
    while pending:
        code = pending.pop()
        pending += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        yield code


def _uses(code: CodeType) -> Iterator[tuple[str, list[str]]]:
    """(name, the chain of attributes read from it) for every ``self.name`` that the code loads."""
    loaded: list[str] | None = None  # the attributes since the last `self`
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and loaded is not None:
            loaded.append(str(instruction.argval))
            continue
        if loaded:
            yield loaded[0], loaded[1:]
        is_name = "LOAD_FAST" in instruction.opname or instruction.opname == "LOAD_DEREF"
        # Python 3.13 loads two names at once, and reads attributes of the second
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        loaded = [] if is_name and names[-1] == "self" else None
