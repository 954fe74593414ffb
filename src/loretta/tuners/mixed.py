"""Batches whose rows have an adapter each: the factors of every row side by side, so that all rows are one product.

The cost of a batch does not grow with the number of adapters in it, beyond that of contracting their trains.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule
from loretta.tuners.calls import Factors


class _Named(threading.local):
    def __init__(self) -> None:
        self.adapters: dict[nn.Module, tuple[str, ...]] = {}


_named = _Named()


@contextmanager
def naming(model: nn.Module, adapter_names: Collection[str]) -> Iterator[None]:
    """In it a call of ``model`` contracts the trains of these adapters, and not of those that are active."""
    before = _named.adapters
    _named.adapters = {**before, model: tuple(sorted({*adapter_names}))}
    try:
        yield
    finally:
        _named.adapters = before


# Models of transformers whose layers get positions (or queries) in the first dimension, by the ends of file names
_POSITIONS_FIRST = {"bridgetower", "bros", "fsmt", "led", "longformer", "mask2former", "mlcd", "oneformer", "xlnet"}


def check_rows_first(model: nn.Module) -> None:
    """Refuse a model whose layers do not get the rows of a batch in the first dimension of their inputs.

    Where there are as many positions as rows, a layer would mistake positions for rows; so would an expert that gets as
    many tokens as there are rows. Raises InputError.
    """
    blocks = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)]
    files = {type(m).__module__.rpartition(".modeling_")[2] for m in model.modules()}
    if files & _POSITIONS_FIRST or any(not block.self_attn.batch_first for block in blocks):
        raise InputError(
            f"adapter_names: the layers of this {type(model).__name__} get positions in the first dimension and rows "
            "in the second, so they cannot have one adapter for each row: call the model once for each adapter"
        )
    for name, module in model.named_modules():
        below = name.split(".")[:-1]
        if "experts" in below and isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), nn.Linear):
            raise InputError(
                f"adapter_names: '{name}' is a part of one expert, which gets tokens of any rows, so it cannot have "
                "one adapter for each row: call the model once for each adapter"
            )


# Models that make one dimension of batch and positions before their feed-forward blocks
_FLATTENS = {"opt"}


@contextmanager
def passing(rows: Mapping[nn.Module, list[str]], model_type: str | None) -> Iterator[None]:
    """In it the layers get the adapter of each of their ``rows``, where this thread calls them."""
    with _hooking:
        handles = [
            layer.register_forward_pre_hook(partial(_pass, names, model_type, threading.get_ident()), with_kwargs=True)
            for layer, names in rows.items()
        ]
        _note(rows)
    try:
        yield
    finally:
        with _hooking:
            for handle in handles:
                handle.remove()
            _note(rows)


def _note(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        if isinstance(layer, AdaptedModule):
            hooks = layer._forward_pre_hooks.values()
            layer.is_mixed = any(getattr(hook, "func", None) is _pass for hook in hooks)


_hooking = threading.Lock()  # torch numbers hooks without one


@torch.compiler.disable  # whose thread it is, no graph can know
def _pass(
    names: list[str], model_type: str | None, thread: int, module: nn.Module, args: Any, kwargs: dict | None = None
) -> tuple[Any, dict] | None:
    if kwargs is None:  # the thread of the hook is just setting or removing it
        return None
    if thread != threading.get_ident():
        return None
    flat = model_type in _FLATTENS and names and args and args[0].dim() == 2
    positions, rest = divmod(len(args[0]), len(names)) if flat else (1, 0)
    return args, {**kwargs, "adapter_names": names if rest else [name for name in names for _ in range(positions)]}


def named(model: nn.Module) -> tuple[str, ...] | None:
    """The adapters that the rows of a call in this thread name; None where they name none. Dynamo does not ask."""
    return None if torch.compiler.is_dynamo_compiling() else _named.adapters.get(model)


def side_by_side(adapter_names: Sequence[str], factors: Mapping[str, Factors], dtype: torch.dtype) -> Factors | None:
    """The factors of every row, (rows, ...) each, zeros for a row whose adapter has none.

    None where they are no stack: of other sizes, of another dtype, or none at all.
    """
    kinds = {tuple(factor.shape for factor in each) for each in factors.values()}
    if len(kinds) != 1 or any(factor.dtype != dtype for each in factors.values() for factor in each):
        return None
    nothing = tuple(torch.zeros_like(factor) for factor in next(iter(factors.values())))
    rows = [factors.get(name, nothing) for name in adapter_names]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def rows_by_adapter(adapter_names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """(adapter, its rows) for every adapter that a mixed batch names."""
    for name in sorted(set(adapter_names)):
        yield name, [row for row, wanted in enumerate(adapter_names) if wanted == name]


def in_turn(adapter_names: Sequence[str], compute: Callable[[str, list[int]], Tensor]) -> Tensor:
    """The outputs of a mixed batch, put together of what ``compute`` returns for an adapter and its rows."""
    result: Tensor | None = None
    for name, rows in rows_by_adapter(adapter_names):
        part = compute(name, rows)
        if result is None:
            result = part.new_empty(len(adapter_names), *part.shape[1:])
        elif result.shape[1:] != part.shape[1:]:  # a single column would be spread over all
            raise InputError(
                f"adapter_names: the heads of a batch give {result.shape[-1]} and {part.shape[-1]} numbers for a row: "
                "call the model once for each adapter"
            )
        result[rows] = part
    return cast(Tensor, result)
