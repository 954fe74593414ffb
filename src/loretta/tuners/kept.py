"""Factors that are kept from call to call, while nobody may write to the cores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loretta.errors import InputError
from loretta.tuners.calls import Factors, Pair
from loretta.tuners.joint import Group


@dataclass(frozen=True, slots=True)
class _Entry:
    pairs: tuple[Pair, ...]
    tensors: Sequence[Tensor]  # kept alive, so that no other tensor gets their id or their memory
    stamp: tuple[Any, ...]
    copies: Sequence[Tensor]
    factors: Sequence[Factors]


class Kept:
    """Contracts each group of trains once, and again when torch counts a write to its cores.

    With ``refuses_writes`` a write is an InputError instead. Torch does not count every write, so :meth:`check` also
    compares the values.
    """

    def __init__(self, *, refuses_writes: bool) -> None:
        self.refuses_writes = refuses_writes
        self._entries: dict[tuple[tuple[Pair, ...], torch.dtype], _Entry] = {}

    def get(self, group: Group, columns: Sequence[Sequence[Tensor]]) -> Sequence[Factors]:
        """The factors of a group's pairs with the parameters ``columns``: those that are kept, or new ones.

        Raises InputError where torch has counted a write and writes are refused.
        """
        pairs, dtype, tensors = group.pairs, group.dtype(), [tensor for column in columns for tensor in column]
        entry = self._entries.get((pairs, dtype))
        stamp = (*group.scales(), *((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))
        if entry is not None:
            if entry.stamp == stamp:
                return entry.factors
            if self.refuses_writes:
                raise InputError(_written_to(pairs))
        factors = group.contract(columns)
        copies = [tensor.detach().clone() for tensor in tensors] if self.refuses_writes else []
        self._entries[pairs, dtype] = _Entry(pairs, tensors, stamp, copies, factors)
        return factors

    def check(self) -> None:
        """Raise InputError if the cores have changed since their factors were kept."""
        for entry in self._entries.values():
            if not all(_same(copy, tensor) for copy, tensor in zip(entry.copies, entry.tensors, strict=True)):
                raise InputError(_written_to(entry.pairs))


def _same(one: Tensor, other: Tensor) -> bool:
    # NaN is equal to NaN here
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _written_to(pairs: tuple[Pair, ...]) -> str:
    names = ", ".join(sorted({repr(adapter) for _, adapter, _ in pairs}))
    return (
        f"the adapter {names} was changed inside loretta.serving(model), whose answers come from the values it began "
        "with: leave the block to change an adapter, and enter it again"
    )
