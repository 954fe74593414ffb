"""The pair of trains nearest to an update that is given by two thin matrices, at a rank or within an error."""

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from loretta import tt
from loretta.layers.trains import Cores

Update = tuple[Tensor, Tensor]  # A (I, R) and B (R, O) in float32: the change of a weight is A B, scaling included

EXACT = 1e-6  # an error below this is rounding: cores are kept in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The trains of one module at one rank, and the relative error of their product in the dtype of the cores."""

    rank: int
    down: Cores
    up: Cores
    error: float


def fit_update(update: Update, bottleneck: int, rank: int) -> Fit:
    """The best trains of a constant rank, of the shapes that are planned for the update's size."""
    a_IR, b_RO = update
    down = Cores(tt.plan_shape(a_IR.shape[0], bottleneck, rank=rank))
    up = Cores(tt.plan_shape(bottleneck, b_RO.shape[1], rank=rank))
    for cores, values in zip((down, up), tt.fit_product(a_IR, b_RO, down.shape, up.shape), strict=True):
        cores.assign(values)
    error = tt.product_error(a_IR, b_RO, list(down), list(up), down.shape, up.shape)
    return Fit(rank=rank, down=down, up=up, error=error / norm if (norm := tt.product_norm(a_IR, b_RO)) else 0.0)


def smallest_fit(update: Update, bottleneck: int, error: float) -> Fit:
    """The fit of the smallest rank that keeps ``error``: double the rank until it does, then bisect."""

    @cache
    def fit(rank: int) -> Fit:
        return fit_update(update, bottleneck, rank)

    high = 1
    while fit(high).error > max(error, EXACT):  # the doubling ends: large enough ranks carry every update
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle).error <= max(error, EXACT) else (middle, high)
    return fit(high)
