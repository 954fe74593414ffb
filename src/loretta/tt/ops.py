"""Functions on lists of cores: contract, halve, decompose, balance, and draw at random.

Axes: I input features, O output features, C inner size at the boundary, N features folded so far, R/S
neighbouring ranks, n one mode. Every core has shape (R, n, S).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loretta.tt.shape import TTShape

Cores = Sequence[Tensor]


def contract(cores: Cores) -> Tensor:
    """Multiply all cores together. Returns the full tensor, of shape ``(modes[0], ..., modes[-1])``."""
    modes = [core.shape[1] for core in cores]
    return _fold_right(cores, cores[0]).reshape(modes)


def split_cores(values: Tensor, shape: TTShape) -> list[Tensor]:
    """The cores (R, n, S) of a train as views of one tensor that holds them one after the other.

    Dimensions before the last stay in front of each core: ``values`` of shape (modules, n_params) gives the cores
    of as many trains, stacked.
    """
    parts = values.split_with_sizes([math.prod(core) for core in shape.cores], dim=-1)
    lead = values.shape[:-1]
    return [part.view(*lead, *core) for part, core in zip(parts, shape.cores, strict=True)]


def halves(cores: Cores, shape: TTShape) -> tuple[Tensor, Tensor]:
    """The two factors at the boundary: L of shape (I, C) and R of shape (C, O), with ``L @ R`` the train's matrix.

    C is ``shape.cut_rank``. Rows and columns that only pad the true sizes are cut off. The I x O matrix is never
    built, so this is also how a train is applied: ``(x @ L) @ R``. Dimensions in front of the cores (the same for
    all of them) stay in front of the halves: many trains of one shape are contracted at once.
    """
    n, split = shape.n_in, shape.split
    if shape.aligned:
        left_IC, right_CO = _fold_left(cores[:n], cores[0]), _fold_right(cores[n:], cores[0])
    else:
        core_RnS = cores[n]
        rank, mode, next_rank = core_RnS.shape[-3:]
        left_NR, right_SN = _fold_left(cores[:n], cores[0]), _fold_right(cores[n + 1 :], cores[0])
        core_RabS = core_RnS.unflatten(-2, (split, mode // split))
        if rank * split <= mode // split * next_rank:
            left_IC = _kron(left_NR, _eye(split, core_RnS))
            # (r, a) together index the inner side; the rest of the core goes right
            right_CO = (core_RabS.flatten(-4, -2) @ right_SN).unflatten(-2, (rank * split, -1)).flatten(-2)
        else:
            # the core goes left: its columns are (a, b, s), of which (b, s) index the inner side
            left_IC = (left_NR @ core_RabS.flatten(-3)).unflatten(-1, (split, -1)).flatten(-3, -2)
            right_CO = _kron(_eye(mode // split, core_RnS), right_SN)
    if shape.padded_in > shape.in_features:
        left_IC = left_IC[..., : shape.in_features, :]
    return left_IC, right_CO[..., : shape.out_features] if shape.padded_out > shape.out_features else right_CO


def matrix(cores: Cores, shape: TTShape) -> Tensor:
    """The dense (I, O) matrix that the train spells. For tests, merging and export; training uses :func:`halves`."""
    left_IC, right_CO = halves(cores, shape)
    return left_IC @ right_CO


def matrix_naive(cores: Cores, shape: TTShape) -> Tensor:
    """As :func:`matrix`, by contracting everything and reshaping: the definition, as an oracle."""
    full = contract(cores).reshape(shape.padded_in, shape.padded_out)
    return full[: shape.in_features, : shape.out_features]


def tt_svd(dense_IO: Tensor, shape: TTShape) -> list[Tensor]:
    """Decompose a matrix by successive truncated SVDs (Oseledets 2011, algorithm 1).

    The ranks are the smaller of ``shape.ranks`` and what the modes can carry. Computed in float64, returned in the
    matrix's dtype.

    Raises ValueError when the matrix is not in x out.
    """
    if tuple(dense_IO.shape) != (shape.in_features, shape.out_features):
        raise ValueError(f"a {tuple(dense_IO.shape)} matrix does not fit a train for {shape}")
    rest = torch.nn.functional.pad(
        dense_IO.double(), (0, shape.padded_out - shape.out_features, 0, shape.padded_in - shape.in_features)
    )
    cores, rank = [], 1
    for mode, next_rank in zip(shape.modes[:-1], shape.ranks[1:-1], strict=True):
        u, s, vh = torch.linalg.svd(rest.reshape(rank * mode, -1), full_matrices=False)
        kept = min(next_rank, len(s))
        cores.append(u[:, :kept].reshape(rank, mode, kept))
        rank, rest = kept, s[:kept, None] * vh[:kept]
    cores.append(rest.reshape(rank, shape.modes[-1], 1))
    return [core.to(dense_IO.dtype) for core in cores]


def pad_ranks(cores: Cores, ranks: Sequence[int]) -> list[Tensor]:
    """The same train with its ranks raised to ``ranks`` by zeros. Raises ValueError when a rank would shrink."""
    have = [core.shape[0] for core in cores] + [cores[-1].shape[2]]
    if len(have) != len(ranks) or any(new < old for new, old in zip(ranks, have, strict=False)):
        raise ValueError(f"cannot pad the ranks {have} to {list(ranks)}")
    return [
        torch.nn.functional.pad(core, (0, right - core.shape[2], 0, 0, 0, left - core.shape[0]))
        for core, left, right in zip(cores, ranks[:-1], ranks[1:], strict=True)
    ]


def balance(cores: Cores) -> list[Tensor]:
    """The same train with the same Frobenius norm in every core.

    A TT-SVD leaves all of the norm in the last core; an optimiser whose steps have one size for all entries
    (Adam) needs cores of one size. A train with a zero core is returned as it is.
    """
    norms = torch.stack([core.double().norm() for core in cores])
    if not bool((norms > 0).all()):
        return list(cores)
    mean = norms.log().mean().exp()
    return [core * (mean / norm).to(core.dtype) for core, norm in zip(cores, norms, strict=True)]


def gaussian(
    shape: TTShape,
    *,
    std: float,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Gaussian cores whose *contracted* matrix has entries of mean 0 and standard deviation ``std``.

    Raises ValueError for a negative ``std``.
    """
    if std < 0:
        raise ValueError(f"a standard deviation must not be negative, got {std}")
    # each entry of the matrix sums prod(ranks) independent products of one entry of each core, and variances add
    scale = (std / math.sqrt(math.prod(shape.ranks))) ** (1 / len(shape.modes))
    return [scale * torch.randn(*core, generator=generator, dtype=dtype, device=device) for core in shape.cores]


def _fold_left(cores: Cores, like: Tensor) -> Tensor:
    """(N, S): the first cores multiplied together, their modes as one index. Their first rank is 1."""
    lead = like.shape[:-3]
    if not cores:  # this side of the matrix has size 1
        return like.new_ones(1, 1).expand(*lead, -1, -1)
    out_NR = cores[0].reshape(*lead, -1, cores[0].shape[-1])
    for core_RnS in cores[1:]:
        rank, mode, next_rank = core_RnS.shape[-3:]
        out_NR = product(out_NR, core_RnS.reshape(*lead, rank, mode * next_rank)).reshape(*lead, -1, next_rank)
    return out_NR


def _fold_right(cores: Cores, like: Tensor) -> Tensor:
    """(R, N): the last cores multiplied together, their modes as one index. Their last rank is 1."""
    lead = like.shape[:-3]
    if not cores:  # this side of the matrix has size 1
        return like.new_ones(1, 1).expand(*lead, -1, -1)
    out_SN = cores[-1].reshape(*lead, cores[-1].shape[-3], -1)
    for core_RnS in reversed(cores[:-1]):
        rank, mode, next_rank = core_RnS.shape[-3:]
        out_SN = product(core_RnS.reshape(*lead, rank * mode, next_rank), out_SN).reshape(*lead, rank, -1)
    return out_SN


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``: matmul expands and reshapes stacks that need neither, at four operations and nodes each."""
    return torch.bmm(left, right) if left.dim() == right.dim() == 3 else left @ right


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker product of the last two dimensions; those in front broadcast. ``torch.kron`` refuses some strides."""
    return (left[..., :, None, :, None] * right[..., None, :, None, :]).flatten(-4, -3).flatten(-2)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
