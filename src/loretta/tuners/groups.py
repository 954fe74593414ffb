"""Groups of equal pairs of trains, and the contraction of all groups in one call."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from loretta.tuners import calls
from loretta.tuners.calls import Factors, Pair
from loretta.tuners.gathered import whole_stacks
from loretta.tuners.joint import JointLayer, look_up, typed
from loretta.tuners.recorded import Recordings, serves


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

    def contract(self, columns: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Factors]:
        """The factors of each pair, in its order."""
        kind = self.kind
        stacks = kind.stack(columns)
        factors = kind.contract_stacks(self.pairs, stacks, self.scale_of(stacks[0]), dtype)
        return kind.unstack(factors, len(self.pairs))

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

    def __init__(self, groups: Sequence[Group], columns: Sequence[Sequence[Sequence[Tensor]]]) -> None:
        self.groups = tuple(groups)
        gathered = iter(whole_stacks([c for g, own in zip(groups, columns, strict=True) if g.is_sharded for c in own]))
        self.stacks = [
            list(islice(gathered, len(own))) if group.is_sharded else group.kind.stack(own)
            for group, own in zip(groups, columns, strict=True)
        ]
        self.settings = [(g.scale_of(own[0]), g.dtype()) for g, own in zip(groups, self.stacks, strict=True)]
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
