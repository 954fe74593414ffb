"""The interface of layers whose trains are contracted together, and the contraction of stacked trains."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loretta.layers.stacks import apart, together
from loretta.layers.trains import halves
from loretta.tuners.calls import Factors, Pair
from loretta.tuners.placement import Placement
from loretta.tuners.scales import Scales

Halves = tuple[Tensor, Tensor]
# Where a parameter lies: a dictionary of modules, a key, and the parameter's name in that module. It is looked up in
# every call, because functional_call, FSDP and others replace parameters.
Place = tuple[nn.ModuleDict, str, str]


class JointLayer(nn.Module):
    """A layer whose trains are contracted with those of equal layers.

    A subclass says which trains it has (:meth:`active_pairs`), where their parameters lie
    (:meth:`stacked_parameters`), with whose they may be stacked (:meth:`group_key`), and what it multiplies with
    (:meth:`to_factors`). In its forward it takes the factors from :func:`loretta.tuners.contraction.find_factors`, or
    contracts its own trains where that returns None.
    """

    placements: dict[str, Placement]
    n_pairs: dict[str, int]
    scaling: Scales
    has_own_trains = True  # or shares them with other layers
    depth = 0  # of the frames between a call of the model and this layer, the last time

    def active_pairs(self, adapter_names: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
        """(adapter, number of the pair of trains) for each pair of these, or the active, adapters that is used next."""
        raise NotImplementedError

    def stacked_parameters(self, adapter_name: str, pair: int) -> tuple[Place, ...]:
        """Where the parameters of one pair lie, to be stacked with those of equal layers: down, up, any biases."""
        raise NotImplementedError

    def group_key(self, adapter_name: str, pair: int) -> Hashable:
        """Pairs of layers with equal keys can be contracted together; None is for one that its layer contracts."""
        raise NotImplementedError

    def to_factors(self, adapter_name: str, down: Halves, up: Halves, biases: Sequence[Tensor]) -> Factors:
        """The matrices that the layer multiplies with, from the halves of its trains; the last one gets the scale.

        Dimensions in front of the last two stay in front: those of all layers of a group come at once.
        """
        raise NotImplementedError

    @classmethod
    def stack(cls, columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The parameters of equal pairs, side by side: all of the first of :meth:`stacked_parameters`, and so on."""
        if torch.compiler.is_dynamo_compiling():
            return [together(*column) for column in columns]
        return [torch.stack(list(column)) for column in columns]

    @classmethod
    def contract_stacks(
        cls, pairs: Sequence[Pair], stacks: Sequence[Tensor], scale: float | Tensor, dtype: torch.dtype
    ) -> Factors:
        """The finished factors of equal pairs, of what :meth:`stack` returns; ``scale`` is (M, 1, 1) or for all."""
        layer, name, _ = next(typed(pairs))
        placement = layer.placements[name]
        down, up, *biases = stacks
        factors = layer.to_factors(name, halves(down, placement.down), halves(up, placement.up), biases)
        return finish(factors, scale, dtype)

    @classmethod
    def unstack(cls, stacked: Factors, count: int) -> list[Factors]:
        """The factors of each of ``count`` pairs, in their order."""
        parts = apart if torch.compiler.is_dynamo_compiling() else Tensor.unbind
        return list(zip(*(parts(factor) for factor in stacked), strict=True))

    def working_dtype(self) -> torch.dtype:
        """The dtype of activations here, which the factors get."""
        raise NotImplementedError


def look_up(places: Iterable[Place]) -> list[Any]:
    """The parameters that lie at these places now; None for one that a hook makes when its module is called."""
    found = []
    for modules, name, parameter in places:
        module = modules._modules[name]
        # asked directly, since attributes of modules are slow; FSDP, parametrizations and functional_call replace it
        tensor = module._parameters.get(parameter)
        if tensor is None and not module._forward_pre_hooks:  # pruning and weight_norm have such hooks
            tensor = getattr(module, parameter)
        found.append(tensor)
    return found


def finish(factors: Sequence[Tensor], scale: float | Tensor, dtype: torch.dtype) -> Factors:
    """Scale the last factor, and cast all of them to the dtype in which the layer works."""
    *others, last = factors
    last = last if isinstance(scale, float) and scale == 1 else last * scale
    return tuple(factor.to(dtype) for factor in (*others, last))


def typed(pairs: Sequence[Pair]) -> Iterator[tuple[JointLayer, str, int]]:
    """``pairs``, whose layers are joint ones."""
    return iter(pairs)  # type: ignore[arg-type]
