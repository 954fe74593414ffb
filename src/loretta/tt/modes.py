"""Choose the modes of a train for any matrix size: the paper's where it gives them, balanced ones elsewhere."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

from loretta.tt.shape import TTShape, constant_ranks, shape_from_modes

# (in, out) -> modes: LoRETTA, Table 10. The last row there, [8]*8 for 768 x 768, does not multiply to the matrix.
PAPER_MODES: dict[tuple[int, int], tuple[int, ...]] = {
    (768, 64): (8, 8, 12, 8, 8),
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (64, 768): (8, 8, 12, 8, 8),
    (64, 4096): (4, 4, 4, 16, 16, 16),
    (768, 8): (8, 8, 12, 8),
    (768, 16): (8, 8, 12, 4, 4),
    (768, 32): (8, 8, 12, 8, 4),
    (8, 768): (8, 12, 8, 8),
    (16, 768): (4, 4, 12, 8, 8),
    (32, 768): (4, 8, 12, 8, 8),
    (4096, 8): (8, 8, 8, 8, 8),
    (4096, 16): (8, 8, 8, 8, 4, 4),
    (4096, 32): (8, 8, 8, 8, 8, 4),
    (8, 4096): (8, 8, 8, 8, 8),
    (16, 4096): (4, 4, 8, 8, 8, 8),
    (32, 4096): (4, 8, 8, 8, 8, 8),
    (768, 768): (12, 8, 8, 8, 8, 12),
    # DeBERTa's fused in_proj is not in Table 10; this aligned shape gives the published count of Table 1.
    (8, 2304): (8, 4, 8, 8, 9),
}

TYPICAL_MODE = 8  # Table 10's modes lie between 4 and 16
LARGEST_MODE = 64  # a longer mode makes its core the bulk of the train: pad instead
LONGEST_TO_EVEN = 2  # the longest mode of a side over the modes that would all be equal


def plan_shape(
    in_features: int,
    out_features: int,
    *,
    rank: int,
    modes: Sequence[int] | None = None,
    overrides: Mapping[str, Sequence[int]] | None = None,
    modes_per_side: int | None = None,
) -> TTShape:
    """Plan the train of one in x out matrix with a constant inner rank.

    In order: ``modes`` if given; the entry ``"INxOUT"`` of ``overrides``; ``modes_per_side`` long modes
    (:func:`plan_sides`) if that is given; the paper's Table 10; else each side is
    factored by itself (:func:`balanced_modes`), so that the boundary falls between two cores. Any size works:
    GQA widths (1024 -> 8, 8, 16) and 14336 (4, 7, 8, 8, 8) factor exactly, 11008 = 2^8 x 43 keeps its 43 as one
    outer mode, and a size with a prime factor above 64 (50257 = 29 x 1733, or a prime such as 10007) is padded to
    the next size whose primes are 2, 3, 5 and 7 (50400, 10080); the surplus is cut off when the train is used.

    Raises ValueError for sizes or a rank below 1 and for given modes that do not fit.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"a matrix needs at least one row and one column, got {in_features} x {out_features}")
    if rank < 1:
        raise ValueError(f"a tensor-train rank must be at least 1, got {rank}")
    if modes is None and overrides:
        modes = overrides.get(f"{in_features}x{out_features}")
    if modes is None and modes_per_side is not None:
        return plan_sides(in_features, out_features, rank=rank, count=modes_per_side)
    if modes is None:
        modes = PAPER_MODES.get((in_features, out_features))
    if modes is not None:
        return shape_from_modes(in_features, out_features, modes, rank)
    # The longest modes go to the two ends of the train, where a core has one rank only.
    in_modes, out_modes = balanced_modes(in_features)[::-1], balanced_modes(out_features)
    return TTShape(
        in_features=in_features,
        out_features=out_features,
        modes=in_modes + out_modes,
        ranks=constant_ranks(len(in_modes) + len(out_modes), rank),
        n_in=len(in_modes),
    )


def stacked(shape: TTShape, count: int, rank: int) -> TTShape:
    """The train of ``count`` matrices of ``shape``, one below the other: a first mode says which matrix it is.

    ``in_features`` is ``count`` times the size that the modes spell, which may exceed that of one matrix. A rank is at
    most the product of the modes on either side of it.
    """
    modes = (count, *shape.modes)
    return TTShape(
        in_features=count * shape.padded_in,
        out_features=shape.out_features,
        modes=modes,
        ranks=_usable_ranks(modes, rank),
        n_in=shape.n_in + 1,
        split=shape.split,
    )


def plan_sides(in_features: int, out_features: int, *, rank: int, count: int) -> TTShape:
    """Plan the train of one in x out matrix with ``count`` modes on each side, and ranks that its modes can use.

    The modes of a side are as equal as they can be, the longest at the ends. A side of up to 64 is one mode, and a
    side of 1 is none. A rank is at most the product of the modes on either side of it: what lies above adds
    parameters and no matrix. A size whose factors differ by more than :data:`LONGEST_TO_EVEN` is padded.

    Raises ValueError for a count below 1, and for one at which a side above 64 would be padded beyond its double.
    """
    if count < 1:
        raise ValueError(f"each side of a matrix needs at least one mode, got {count}")
    for size in (in_features, out_features):
        if size > LARGEST_MODE and count > (most := (size - 1).bit_length()):
            raise ValueError(f"a side of {size:,} takes at most {most} modes of 2 or more, got {count}: give fewer")
    in_modes, out_modes = _side(in_features, count)[::-1], _side(out_features, count)
    modes = in_modes + out_modes or (1,)
    ranks = _usable_ranks(modes, rank)
    return TTShape(in_features=in_features, out_features=out_features, modes=modes, ranks=ranks, n_in=len(in_modes))


def _usable_ranks(modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Ranks of at most ``rank``, each no larger than the product of the modes on either side of it."""
    cuts = [min(rank, math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]
    return (1, *cuts, 1)


def _side(size: int, count: int) -> tuple[int, ...]:
    """Ascending modes of one side of a matrix."""
    if size <= LARGEST_MODE or count == 1:
        return (size,) if size > 1 else ()
    modes = most_balanced(size, count, 2)
    while modes is None or modes[-1] > LONGEST_TO_EVEN * size ** (1 / count):
        size += 1
        modes = most_balanced(size, count, 2) if _has_only_small_primes(size) else None
    return modes


def balanced_modes(size: int) -> tuple[int, ...]:
    """Ascending modes near 8 whose product is ``size``, or the next larger size with primes up to 7 alone."""
    n_modes = max(1, round(math.log(size, TYPICAL_MODE)))
    for count in range(n_modes, 0, -1):
        modes = most_balanced(size, count, 2)
        if modes is not None and modes[-1] <= LARGEST_MODE:
            return modes
    size += 1
    while not _has_only_small_primes(size):
        size += 1
    return balanced_modes(size)


@cache
def most_balanced(size: int, count: int, least: int) -> tuple[int, ...] | None:
    """The ``count`` ascending factors of ``size``, none below ``least``, with the smallest sum; or None."""
    if count == 1:
        return (size,) if size >= least or size == 1 else None
    best: tuple[int, ...] | None = None
    for factor in range(least, math.floor(size ** (1 / count) + 1e-9) + 1):
        if size % factor:
            continue
        rest = most_balanced(size // factor, count - 1, factor)
        if rest is not None and (best is None or factor + sum(rest) < sum(best)):
            best = (factor, *rest)
    return best


def _has_only_small_primes(size: int) -> bool:
    for prime in (2, 3, 5, 7):
        while size % prime == 0:
            size //= prime
    return size == 1
