"""One tensor train for all adapted modules of a model: its modes include the layer and the projection.

The update of projection m in layer l is ``L G_layer[l] G_projection[m] R``. L is shared by all modules of one input
width, R by all of one output width. It is a train, so it is in the cut form, and an update has at most its rank.

Axes: I input features, O output features, R and S the rank, N layers or projections, M modules of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loretta import tt
from loretta.layers.trains import Cores, halves, own_precision
from loretta.tt.ops import product


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedShape:
    """The plan of a shared train: a side for each width, and a rank x rank core for each layer and each projection.

    ``left`` has an in x rank matrix for each input width, ``right`` a rank x out one for each output width; each is a
    train of its own, by default of one core, which is the matrix itself.
    """

    rank: int
    layers: int
    projections: int
    left: tuple[tt.TTShape, ...]
    right: tuple[tt.TTShape, ...]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each part has, in the order of :func:`split_parts`."""
        square = self.rank**2
        sides = [side.n_params for side in (*self.left, *self.right)]
        return [*sides[: len(self.left)], self.layers * square, self.projections * square, *sides[len(self.left) :]]

    @property
    def n_params(self) -> int:
        return sum(self.sizes)

    @property
    def counts(self) -> list[tuple[str, int, int]]:
        """(kind, how many, parameters of each) for all parts."""
        square = self.rank**2
        return [
            *((f"left side, {side.in_features} wide", 1, side.n_params) for side in self.left),
            ("core of a layer", self.layers, square),
            ("core of a projection", self.projections, square),
            *((f"right side, {side.out_features} wide", 1, side.n_params) for side in self.right),
        ]

    @property
    def fold_flops(self) -> int:
        """FLOPs that contract the sides, once per step; :attr:`Seat.fold_flops` come on top for each module."""
        return sum(side.fold_flops for side in (*self.left, *self.right) if len(side.modes) > 1)

    def __str__(self) -> str:
        widths = [", ".join(str(w) for w in ws) for ws in ([s.in_features for s in self.left],
                                                           [s.out_features for s in self.right])]  # fmt: skip
        return f"{self.layers} layers x {self.projections} projections, {widths[0]} -> {widths[1]}, rank {self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which parts of a shared train one module uses: the numbers of its two sides, its layer and its projection."""

    train: SharedShape
    left: int
    layer: int
    projection: int
    right: int

    @property
    def fold_flops(self) -> int:
        """FLOPs that contract this module's own factor, once per step."""
        rank = self.train.rank
        return 2 * rank**2 * (rank + self.train.right[self.right].out_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A shared train, taken apart: the sides as matrices, (I, R) and (R, O), and the small cores, (N, R, R) each."""

    left: tuple[Tensor, ...]
    layers: Tensor
    projections: Tensor
    right: tuple[Tensor, ...]


class SharedCores(Cores):
    """The cores of a shared train, in the single parameter ``values``. The modules that use them hold this one module.

    The cores start as zeros: call :meth:`start`.
    """

    shape: SharedShape  # type: ignore[assignment]

    def __init__(
        self, shape: SharedShape, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__(shape, dtype=dtype, device=device)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.shape.sizes)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Flat: the left sides, the cores of the layers, those of the projections, the right sides."""
        return values.split(self.shape.sizes, dim=-1)

    def forward(self) -> Parts:  # type: ignore[override]
        """The parts, contracted in the dtype of the cores whatever autocast says."""
        return take_apart(self.values, self.shape)

    def start(self, *, zero: bool) -> None:
        """Random maps that keep the variance of their input; the last core of each right side is zero, or small.

        As in rep, the zero core then meets inputs of size 1 at any width and rank, and one learning rate suits all.
        The small cores are the identity, as they were where the form was measured (docs/choosing.md): all modules
        begin as one and come apart as they learn.
        """
        shape = self.shape
        left = [_start_of_side(side) for side in shape.left]
        # not zero: as rep's Gaussian start, sqrt(1 / (in + out)) (LoRETTA section 3.3)
        last = [0.0 if zero else math.sqrt(shape.rank / (shape.rank + side.out_features)) for side in shape.right]
        right = [_start_of_side(side, last=scale) for side, scale in zip(shape.right, last, strict=True)]
        squares = [torch.eye(shape.rank).expand(count, -1, -1) for count in (shape.layers, shape.projections)]
        self.assign([part.flatten() for part in (*left, *squares, *right)])


def take_apart(values: Tensor, shape: SharedShape) -> Parts:
    """The parts of a shared train that lies in ``values`` (..., n_params). Dimensions in front stay in front."""
    n, square = len(shape.left), (shape.rank, shape.rank)
    parts = values.split(shape.sizes, dim=-1)
    with own_precision(values):
        return Parts(
            left=tuple(_side(part, side) for part, side in zip(parts[:n], shape.left, strict=True)),
            layers=parts[n].unflatten(-1, (shape.layers, *square)),
            projections=parts[n + 1].unflatten(-1, (shape.projections, *square)),
            right=tuple(_side(part, side) for part, side in zip(parts[n + 2 :], shape.right, strict=True)),
        )


def shared_factors(parts: Parts, seats: Sequence[Seat]) -> tuple[Tensor, Tensor]:
    """A (..., I, R) and B (..., M, R, O) of modules that have both sides in common: update m is ``A @ B[m]``."""
    right_RO = parts.right[seats[0].right]
    with own_precision(right_RO):
        layers_MRR = _chosen(parts.layers, [seat.layer for seat in seats])
        inner_MRR = product(layers_MRR, _chosen(parts.projections, [seat.projection for seat in seats]))
        # one product for all modules: their right side is the same
        b_MRO = (inner_MRR.flatten(-3, -2) @ right_RO).unflatten(-2, (len(seats), -1))
    return parts.left[seats[0].left], b_MRO


def _chosen(cores_NRS: Tensor, numbers: Sequence[int]) -> Tensor:
    if len(numbers) == 1:  # of a layer on its own, as within a checkpoint: torch compiles none with an unbind in it
        return cores_NRS.narrow(-3, numbers[0], 1)
    # unbind and stack, because an index tensor would have to be copied to the device in every call
    cores = cores_NRS.unbind(-3)
    return torch.stack([cores[number] for number in numbers], dim=-3)


def _side(values: Tensor, side: tt.TTShape) -> Tensor:
    if len(side.modes) == 1:
        return values.unflatten(-1, (side.in_features, side.out_features))
    left_IC, right_CO = halves(values, side)
    return left_IC @ right_CO


def _start_of_side(side: tt.TTShape, *, last: float = 1.0) -> Tensor:
    """The cores of a side, one after the other; the last one is multiplied with ``last``."""
    cores = []
    for k, (left, mode, right) in enumerate(side.cores):
        spelled = side.out_part(k)
        rows, columns = left * mode // spelled, spelled * right
        core = nn.init.orthogonal_(torch.empty(rows, columns)) * math.sqrt(max(1.0, columns / rows))
        # its rows are the indices it sums over: the rank before it and the input's part of the mode
        cores.append(core.reshape(left, mode // spelled, spelled, right).flatten())
    cores[-1] *= last
    return torch.cat(cores)
