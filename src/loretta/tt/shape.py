"""One tensor train as plain integers: modes, ranks, and where the matrix's input ends and its output begins.

Nothing here needs torch, a model or a GPU: parameters and FLOPs are known before a tensor exists.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TTShape:
    """A tensor train that spells a matrix of ``in_features`` x ``out_features`` (LoRETTA section 3.1).

    Core ``k`` has shape ``(ranks[k], modes[k], ranks[k + 1])``; the outer ranks are 1. The modes, read left to
    right, spell first the input index and then the output index, both row-major. The boundary between the two
    lies after the first ``n_in`` cores when ``split == 1`` ("aligned"); otherwise core ``n_in`` straddles it, and its
    mode is ``split`` (input) times ``mode / split`` (output).

    ``padded_in`` and ``padded_out`` are the sizes that the modes spell. They may exceed the true sizes (the
    planner pads primes); the surplus rows and columns exist in the cores and are cut off when they are used.

    Raises ValueError for modes or ranks below 1, ranks that do not begin and end with 1, and modes that spell
    less than the matrix.
    """

    in_features: int
    out_features: int
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    n_in: int
    split: int = 1

    def __post_init__(self) -> None:
        sizes = (self.in_features, self.out_features, *self.modes)
        if not self.modes or min(sizes) < 1:
            raise ValueError(
                f"features and modes must be at least 1, got {self.in_features} x {self.out_features}, {self.modes}"
            )
        if min(self.ranks) < 1:
            raise ValueError(f"every rank of a tensor train must be at least 1, got {self.ranks}")
        if len(self.ranks) != len(self.modes) + 1 or {self.ranks[0], self.ranks[-1]} != {1}:
            raise ValueError(
                f"{len(self.modes)} modes need {len(self.modes) + 1} ranks that begin and end with 1, got {self.ranks}"
            )
        inside = 0 <= self.n_in <= len(self.modes) - (self.split != 1) and self.split >= 1
        if not inside or (not self.aligned and self.modes[self.n_in] % self.split):
            raise ValueError(f"the boundary (n_in={self.n_in}, split={self.split}) does not fit the modes {self.modes}")
        if self.padded_in < self.in_features or self.padded_out < self.out_features:
            raise ValueError(
                f"the modes {self.modes} spell {self.padded_in} x {self.padded_out}, "
                f"less than {self.in_features} x {self.out_features}"
            )

    @property
    def aligned(self) -> bool:
        """Whether the boundary between input and output falls between two cores."""
        return self.split == 1

    @property
    def padded_in(self) -> int:
        """How many rows the modes spell: ``in_features``, or more."""
        return math.prod(self.modes[: self.n_in]) * self.split

    @property
    def padded_out(self) -> int:
        """How many columns the modes spell: ``out_features``, or more."""
        return math.prod(self.modes) // self.padded_in

    @property
    def cores(self) -> list[tuple[int, int, int]]:
        """Shapes of the cores, left to right."""
        return list(zip(self.ranks, self.modes, self.ranks[1:], strict=False))

    def out_part(self, core: int) -> int:
        """How much of the mode of one core spells the output: 1 for an input core, the mode for an output core."""
        if core < self.n_in:
            return 1
        return self.modes[core] // (self.split if core == self.n_in else 1)

    @property
    def cut_rank(self) -> int:
        """Inner size of the matrix product L R that the train spells: an upper bound of the matrix's rank.

        A straddling core of ranks (r, s) and parts (a, b) can be folded to the right (inner size r a) or to the
        left (inner size b s); the smaller one counts.
        """
        if self.aligned:
            return self.ranks[self.n_in]
        left, mode, right = self.cores[self.n_in]
        return min(left * self.split, mode // self.split * right)

    @property
    def n_params(self) -> int:
        """How many numbers all cores have."""
        return sum(math.prod(core) for core in self.cores)

    @property
    def fold_flops(self) -> int:
        """FLOPs that multiply the cores into the two halves L and R, once per step, whatever the batch."""
        n, cores = self.n_in, self.cores
        if self.aligned:
            return _chain_flops(cores[:n]) + _chain_flops(cores[n:][::-1])
        left, mode, right = cores[n]
        # the straddling core goes to the side that leaves the smaller inner size
        goes_right = left * self.split <= mode // self.split * right
        neighbours = self.modes[n + 1 :] if goes_right else self.modes[:n]
        straddling = 2 * left * mode * right * math.prod(neighbours)
        return _chain_flops(cores[:n]) + _chain_flops(cores[n + 1 :][::-1]) + straddling

    def apply_flops(self, tokens: int = 1) -> int:
        """FLOPs of (x L) R for ``tokens`` rows of x, forward only."""
        return 2 * tokens * self.cut_rank * (self.in_features + self.out_features)

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features} {list(self.modes)}, ranks {list(self.ranks)}"


def _chain_flops(cores: Sequence[tuple[int, int, int]]) -> int:
    """FLOPs of folding the cores together one after the other; the first one alone costs nothing."""
    flops, size = 0, cores[0][1] if cores else 1
    for left, mode, right in cores[1:]:
        flops, size = flops + 2 * size * left * mode * right, size * mode
    return flops


def constant_ranks(n_modes: int, rank: int) -> tuple[int, ...]:
    """Ranks 1, rank, ..., rank, 1: the paper keeps every inner rank the same, also past what a mode can use."""
    return (1, *([rank] * (n_modes - 1)), 1)


def shape_from_modes(in_features: int, out_features: int, modes: Sequence[int], rank: int) -> TTShape:
    """Check modes that a user or the paper gives, and find the boundary between input and output in them.

    The boundary may cut a mode (the paper's 70B shapes do), as long as each side takes a whole divisor of it.

    Raises ValueError when the product is not ``in_features * out_features``, when a mode or the rank is below 1,
    or when the boundary would cut a mode into parts that are not whole.
    """
    modes = tuple(modes)
    given = f"the shape {list(modes)} for a {in_features} x {out_features} matrix"
    if not modes or min(modes) < 1:
        raise ValueError(f"{given} has no modes or a mode below 1: give whole numbers of at least 1")
    if math.prod(modes) != in_features * out_features:
        raise ValueError(
            f"{given} multiplies to {math.prod(modes):,} instead of {in_features * out_features:,}: "
            "give modes whose product is in x out"
        )
    if rank < 1:
        raise ValueError(f"a tensor-train rank must be at least 1, got {rank}")
    ranks, before = constant_ranks(len(modes), rank), 1
    for n_in, mode in enumerate(modes):
        if before == in_features:
            break
        if before * mode > in_features:
            split, remainder = divmod(in_features, before)
            if remainder or mode % split:
                raise ValueError(
                    f"{given} puts the input|output boundary inside mode {n_in} ({mode}) at {in_features}/{before}, "
                    "which does not divide it: order the modes so that a leading product is a multiple that fits"
                )
            return TTShape(
                in_features=in_features, out_features=out_features, modes=modes, ranks=ranks, n_in=n_in, split=split
            )
        before *= mode
    else:
        n_in = len(modes)
    return TTShape(in_features=in_features, out_features=out_features, modes=modes, ranks=ranks, n_in=n_in)
