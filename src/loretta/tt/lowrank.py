"""The pair of trains nearest to a given low-rank matrix, without ever building that matrix.

Axes: I input features, O output features, N the features of one side, R rank of the given product, K directions that
pass the bottleneck. Every core has shape (rank, mode, next rank).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loretta.tt.ops import Cores, balance, contract, matrix, pad_ranks, tt_svd
from loretta.tt.shape import TTShape


def fit_product(
    a_IR: Tensor, b_RO: Tensor, down: TTShape, up: TTShape, *, sweeps: int = 2
) -> tuple[list[Tensor], list[Tensor]]:
    """Cores of two trains whose product approximates ``A @ B``, at exactly the ranks of ``down`` and ``up``.

    Each side gets an orthonormal basis in tensor-train form, by a TT-SVD that runs from the outer end of the train to
    its middle: first the input side, then the output side of the product's projection on the input basis. The
    projection on both bases stands between them; it is the least-squares optimum for these bases. The sides are then
    fitted again, each to the other, ``sweeps`` times at most and as long as the error falls (counted on the padded
    sizes, where a plan pads). The bottleneck costs no accuracy: its cores hand on all directions that the ranks carry.

    The result is exact where the ranks carry the product. Trains of a constant rank r carry a product only if its rank
    is at most ``min(bottleneck, r)`` and its factors fold into the modes at rank r. All cores get one norm
    (:func:`loretta.tt.balance`); directions that the product does not need keep a basis on the input side and zeros
    on the output side, so that training can use them. Computed in float64, returned in the dtype of ``a_IR``.

    Raises ValueError when the factors do not fit together or to the trains.
    """
    _check_sizes(a_IR, b_RO, down, up)
    left, right = _aligned(down), _aligned(up)
    width = _width(left, right)
    in_modes, in_ranks = left.modes[: left.n_in], (*left.ranks[: left.n_in], min(width, left.cut_rank))
    # the output side is read backwards, so that both sides begin at their outer end and meet in the middle
    out_modes = right.modes[right.n_in :][::-1]
    out_ranks = (*right.ranks[right.n_in + 1 :][::-1], min(width, right.cut_rank))
    source_IR, target_OR = _principal_factors(a_IR, b_RO, left.padded_in, right.padded_out, width)
    target_OR = _with_digits_reversed(target_OR, out_modes[::-1])

    seen_IK = source_IR  # the product on the output basis; at first all of it, because target_OR is orthonormal
    in_cores, middle_KK, out_cores = [], None, []
    for _ in range(1 + sweeps):
        new_in_cores = _basis(seen_IK, in_modes, in_ranks)
        in_KR = _folded(new_in_cores).T @ source_IR
        new_out_cores = _basis(target_OR @ in_KR.T, out_modes, out_ranks)
        out_RK = target_OR.T @ _folded(new_out_cores)
        # both bases are orthonormal: the larger the projection, the smaller the error
        if middle_KK is not None and (in_KR @ out_RK).norm() <= middle_KK.norm():
            break
        in_cores, middle_KK, out_cores = new_in_cores, in_KR @ out_RK, new_out_cores
        seen_IK = source_IR @ out_RK
    assert middle_KK is not None

    u_KK, s_K, vh_KK = torch.linalg.svd(middle_KK, full_matrices=False)
    backwards = [core.permute(2, 1, 0) for core in reversed(out_cores)]
    down_cores = _linked(in_cores, u_KK, _hand_on(len(s_K), left.modes[left.n_in :]))
    up_cores = _linked(_take_over(len(s_K), right.modes[: right.n_in]), s_K[:, None] * vh_KK, backwards)
    down_cores, up_cores = _joined(down_cores, down), _joined(up_cores, up)
    cores = balance([*pad_ranks(down_cores, down.ranks), *pad_ranks(up_cores, up.ranks)])
    cores = [core.to(a_IR).contiguous() for core in cores]
    return cores[: len(down.modes)], cores[len(down.modes) :]


def discarded_mass(a_IR: Tensor, b_RO: Tensor, trains: Sequence[tuple[TTShape, TTShape]]) -> list[float]:
    """What each pair of trains of one size has no room for of ``A @ B``: squared singular values beyond its ranks.

    They are summed over all cuts of the whole train from input to output: between the modes of one side, and where
    both sides meet. That bounds the squared error of the best fit (Oseledets 2011, theorem 2.2), and is the error
    itself where one cut alone discards. Computed in float64.

    Raises ValueError when the factors do not fit together or to the trains.
    """
    aligned = []
    for down, up in trains:
        _check_sizes(a_IR, b_RO, down, up)
        aligned.append((_aligned(down), _aligned(up)))
    left, right = aligned[0]
    source_IR, target_OR = _principal_factors(a_IR, b_RO, left.padded_in, right.padded_out, 1)
    sizes_R = source_IR.norm(dim=0)  # the columns are orthogonal: the singular values of the product
    tails = [_tails(sizes_R.sort(descending=True).values)]
    ranks = [[_width(*pair) for pair in aligned]]
    for k in range(1, left.n_in):
        unfolded = source_IR.reshape(math.prod(left.modes[:k]), -1)
        tails.append(_tails(torch.linalg.svdvals(unfolded)))
        ranks.append([down.ranks[k] for down, _ in aligned])
    for k in range(right.n_in + 1, len(right.modes)):
        unfolded = (target_OR * sizes_R).T.reshape(-1, math.prod(right.modes[k:]))
        tails.append(_tails(torch.linalg.svdvals(unfolded)))
        ranks.append([up.ranks[k] for _, up in aligned])
    return [
        sum(float(tail[min(rank, len(tail) - 1)]) for tail, rank in zip(tails, at, strict=True))
        for at in zip(*ranks, strict=True)
    ]


def _tails(singular_values: Tensor) -> Tensor:
    """Entry k: the sum of squares from the k-th value on; the last one, behind all values, is zero."""
    squares = torch.nn.functional.pad(singular_values.square(), (0, 1))
    return squares.flip(0).cumsum(0).flip(0)


def product_singular_values(a_IR: Tensor, b_RO: Tensor) -> Tensor:
    """The largest ``min(I, R, O)`` singular values of ``A @ B`` in float64, descending; all others are zero.

    From QR factors of the thin matrices: the squares of a Gram matrix would lose half of the digits.
    """
    return torch.linalg.svdvals(_triangle(a_IR) @ _triangle(b_RO.T).T)


def product_norm(a_IR: Tensor, b_RO: Tensor) -> float:
    """Frobenius norm of ``A @ B``, to rounding in float64."""
    return float(product_singular_values(a_IR, b_RO).norm())


def product_error(a_IR: Tensor, b_RO: Tensor, down_cores: Cores, up_cores: Cores, down: TTShape, up: TTShape) -> float:
    """Frobenius norm of ``TT(down) TT(up) - A B``, as exactly as :func:`product_norm`."""
    got_Ib, got_bO = matrix(_exact(down_cores), down), matrix(_exact(up_cores), up)
    a_IR, b_RO = _exact([a_IR, b_RO])
    return product_norm(torch.cat([a_IR, got_Ib], dim=1), torch.cat([b_RO, -got_bO], dim=0))


def _triangle(matrix_NR: Tensor) -> Tensor:
    return torch.linalg.qr(*_exact([matrix_NR]), mode="r").R


def _exact(tensors: Cores) -> list[Tensor]:
    # on the CPU, because not every accelerator has float64
    return [tensor.detach().cpu().double() for tensor in tensors]


def _check_sizes(a_IR: Tensor, b_RO: Tensor, down: TTShape, up: TTShape) -> None:
    given = f"{tuple(a_IR.shape)} times {tuple(b_RO.shape)}"
    if a_IR.dim() != 2 or b_RO.dim() != 2 or a_IR.shape[1] != b_RO.shape[0]:
        raise ValueError(f"{given} is no product of two matrices")
    if (a_IR.shape[0], b_RO.shape[1]) != (down.in_features, up.out_features) or down.out_features != up.in_features:
        raise ValueError(f"{given} does not fit the trains {down} and {up}")


def _principal_factors(a_IR: Tensor, b_RO: Tensor, n_in: int, n_out: int, width: int) -> tuple[Tensor, Tensor]:
    """U S (I, R) and V (O, R) of the product's SVD, with zero rows up to the padded sizes.

    They have at least ``width`` columns where the sizes allow it: columns of weight zero give directions to train.
    """
    more = max(0, width - a_IR.shape[1])
    a_IR, b_RO = _exact([a_IR, b_RO])
    a_IR = torch.nn.functional.pad(a_IR, (0, more, 0, n_in - a_IR.shape[0]))
    b_OR = torch.nn.functional.pad(b_RO.T, (0, more, 0, n_out - b_RO.shape[1]))
    (q_IR, a_RR), (q_OR, b_RR) = torch.linalg.qr(a_IR), torch.linalg.qr(b_OR)
    u_RR, s_R, vh_RR = torch.linalg.svd(a_RR @ b_RR.T, full_matrices=False)
    return q_IR @ (u_RR * s_R), q_OR @ vh_RR.T


def _basis(target_NK: Tensor, modes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Orthonormal cores over ``modes``, of ranks up to ``ranks``, for the columns of the target.

    They are a TT-SVD without its last core: that core holds the coordinates of the columns in this basis.
    """
    n, k = target_NK.shape
    return tt_svd(
        target_NK, TTShape(in_features=n, out_features=k, modes=(*modes, k), ranks=(*ranks, 1), n_in=len(modes))
    )[:-1]


def _folded(cores: Cores) -> Tensor:
    """(N, K): cores multiplied together, whose last rank is not 1 but K."""
    if not cores:  # this side of the matrix has size 1
        return torch.ones(1, 1, dtype=torch.float64)
    last = cores[-1]
    return contract([*cores[:-1], last.reshape(last.shape[0], -1, 1)]).reshape(-1, last.shape[2])


def _linked(before: list[Tensor], link_KJ: Tensor, after: list[Tensor]) -> list[Tensor]:
    """Join two trains: the matrix ties the last rank of ``before`` to the first of ``after``. One may be empty."""
    if before:
        return [*before[:-1], before[-1] @ link_KJ, *after]
    return [torch.einsum("KJ,JnS->KnS", link_KJ, after[0]), *after[1:]]


def _with_digits_reversed(rows_NR: Tensor, modes: Sequence[int]) -> Tensor:
    """Put the rows in the order of their index over ``modes`` read backwards."""
    order = [*range(len(modes))[::-1], len(modes)]
    return rows_NR.reshape(*modes, -1).permute(order).reshape(rows_NR.shape)


def _aligned(shape: TTShape) -> TTShape:
    """The shape whose straddling core is split in two at the boundary. See :func:`_joined`."""
    if shape.aligned:
        return shape
    n, mode = shape.n_in, shape.modes[shape.n_in]
    return replace(
        shape,
        modes=(*shape.modes[:n], shape.split, mode // shape.split, *shape.modes[n + 1 :]),
        ranks=(*shape.ranks[: n + 1], shape.cut_rank, *shape.ranks[n + 1 :]),
        n_in=n + 1,
        split=1,
    )


def _joined(cores: list[Tensor], shape: TTShape) -> list[Tensor]:
    """Turn cores of the shape that :func:`_aligned` gives back into cores of ``shape``."""
    if shape.aligned:
        return cores
    n = shape.n_in
    both = torch.einsum("iaj,jbk->iabk", cores[n], cores[n + 1]).flatten(1, 2)
    return [*cores[:n], both, *cores[n + 2 :]]


def _width(left: TTShape, right: TTShape) -> int:
    """The largest number of directions that all ranks between the two bases carry."""
    hand_ranks, take_ranks = left.ranks[left.n_in :], right.ranks[: right.n_in + 1]
    for width in range(left.out_features, 1, -1):
        hand_on = _hand_on(width, left.modes[left.n_in :])
        take_over = _take_over(width, right.modes[: right.n_in])
        needed = [core.shape[0] for core in hand_on] + [core.shape[2] for core in take_over]
        if all(need <= rank for need, rank in zip(needed, [*hand_ranks[:-1], *take_ranks[1:]], strict=True)):
            return width
    return 1


def _hand_on(width: int, modes: Sequence[int]) -> list[Tensor]:
    """Cores that spell the matrix [1 0]: its ``width`` rows are the first rank, its columns run over ``modes``."""
    cores: list[Tensor] = []
    rank, size = width, math.prod(modes)
    for mode in modes:
        size //= mode
        kept = min(rank, size)
        eye = torch.eye(rank, mode * size, dtype=torch.float64)
        cores.append(eye.reshape(rank, mode, size)[:, :, :kept])
        rank = kept
    return cores


def _take_over(width: int, modes: Sequence[int]) -> list[Tensor]:
    """Cores that spell [1 0] transposed: its rows run over ``modes``, its ``width`` columns are the last rank."""
    cores: list[Tensor] = []
    rank = width
    for mode in reversed(modes):
        kept = math.ceil(rank / mode)
        cores.insert(0, torch.eye(kept * mode, rank, dtype=torch.float64).reshape(kept, mode, rank))
        rank = kept
    return cores
