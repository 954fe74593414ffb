"""Layers whose trains are contracted together: what such a layer has to say, and groups of equal ones in one call."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from loretta.layers.stacks import apart, together
from loretta.layers.trains import halves
from loretta.tuners import calls
from loretta.tuners.calls import Factors, Pair
from loretta.tuners.gathered import whole_stacks
from loretta.tuners.placement import Halves, Placement
from loretta.tuners.recorded import Recordings, serves
from loretta.tuners.scales import Scales

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


class Group:
    """Equal pairs of trains. ``scale`` holds those of all pairs, where they are kept as one tensor."""

    def __init__(self, pairs: Sequence[Pair], scale: Tensor | None, *, is_sharded: bool = False) -> None:
        self.is_sharded = is_sharded
        self.pairs, self.joint_scale = tuple(pairs), scale
        places = [layer.stacked_parameters(name, pair) for layer, name, pair in typed(self.pairs)]
        self.columns = tuple(zip(*places, strict=True))  # all of the first parameters, all of the second, ...
        self._scale: tuple[tuple[float, ...], Tensor] | None = None

    def parameters(self) -> list[list[Tensor]]:
        """The columns as they are now. Raises KeyError where an adapter is gone."""
        return [look_up(column) for column in self.columns]

    def contract(self, columns: Sequence[Sequence[Tensor]]) -> list[Factors]:
        """The factors of each pair, in its order."""
        stacks = self.kind.stack(columns)
        factors = self.kind.contract_stacks(self.pairs, stacks, self.scale_of(stacks[0]), self.dtype())
        return self.kind.unstack(factors, len(self.pairs))

    @property
    def kind(self) -> type[JointLayer]:
        return type(next(typed(self.pairs))[0])

    def dtype(self) -> torch.dtype:
        return next(typed(self.pairs))[0].working_dtype()

    def scales(self) -> tuple[float, ...]:
        return tuple(layer.scaling[name] for layer, name, _ in typed(self.pairs))

    def scale_of(self, like: Tensor) -> float | Tensor:
        if calls.is_recorded():
            scale = self.joint_scale
            if scale is None:
                scale = torch.stack([layer.scaling.tensors[name] for layer, name, _ in typed(self.pairs)])
            return scale.to(like.device, like.dtype)[:, None, None]
        scales = self.scales()
        if len(set(scales)) == 1:
            return scales[0]
        known = self._scale
        if known is None or known[0] != scales or (known[1].dtype, known[1].device) != (like.dtype, like.device):
            with torch.inference_mode(False):  # a call with gradients may use it later
                known = scales, torch.tensor(scales, dtype=like.dtype, device=like.device)[:, None, None]
            self._scale = known
        return known[1]


class Joint:
    """What one call contracts: a function from the stacked parameters of some groups to their stacked factors."""

    def __init__(self, groups: Sequence[tuple[Group, Sequence[Sequence[Tensor]]]]) -> None:
        self.groups = tuple(group for group, _ in groups)
        gathered = iter(whole_stacks([column for group, columns in groups if group.is_sharded for column in columns]))
        self.stacks = [
            list(islice(gathered, len(columns))) if group.is_sharded else group.kind.stack(columns)
            for group, columns in groups
        ]
        self.settings = [(g.scale_of(own[0]), g.dtype()) for g, own in zip(self.groups, self.stacks, strict=True)]
        self.counts = [len(own) for own in self.stacks]
        self.sizes: list[int] = []  # how many factors each group has

    def __call__(self, inputs: Sequence[Tensor]) -> Factors:
        left, found = iter(inputs), list[Factors]()
        for group, (scale, dtype), count in zip(self.groups, self.settings, self.counts, strict=True):
            found.append(group.kind.contract_stacks(group.pairs, list(islice(left, count)), scale, dtype))
        self.sizes = [len(factors) for factors in found]
        return tuple(factor for factors in found for factor in factors)

    def contract(self, recordings: Recordings) -> dict[Pair, Factors]:
        """The factors of each pair, by a recording where there is one."""
        inputs = [stack for own in self.stacks for stack in own]
        self.stacks = []  # a recording keeps this object, and is not to keep those
        recording = None
        if inputs and all([serves(each) for each in inputs]):  # noqa: C419
            dtypes = tuple(dtype for _, dtype in self.settings)
            key = self.groups, dtypes, tuple(group.scales() for group in self.groups)
            recording = recordings.of(key, self, inputs)
        if recording is None:
            stacked, sizes = self(inputs), self.sizes
        else:
            stacked, sizes = recording(inputs), recording.function.sizes
        left, found = iter(stacked), dict[Pair, Factors]()
        for group, size in zip(self.groups, sizes, strict=True):
            each = group.kind.unstack(tuple(islice(left, size)), len(group.pairs))
            found.update(zip(group.pairs, each, strict=True))
        return found
