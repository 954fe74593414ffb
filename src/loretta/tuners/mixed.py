"""Batches whose rows have an adapter each: the factors of every row side by side, so that all rows are one product.

The cost of a batch does not grow with the number of adapters in it, beyond that of contracting their trains.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

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
