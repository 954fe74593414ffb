"""Axes: I input features, O output features, b bottleneck, R rank of the given product."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from draws import examples, seeded
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerances import assert_near

from loretta import tt
from loretta.tt import TTShape, fit_product, plan_shape, product_error, product_norm, product_singular_values
from tt.trains import oracle, randn, seeds, shapes


@st.composite
def pairs(draw: st.DrawFn) -> tuple[TTShape, TTShape]:
    """Two trains that share a bottleneck: ranks of their own, padded sizes, boundaries between and inside cores."""
    down, up = draw(shapes()), draw(shapes())
    bottleneck = min(down.out_features, up.in_features)
    return replace(down, out_features=bottleneck), replace(up, in_features=bottleneck)


def with_ranks(shape: TTShape, rank: int) -> TTShape:
    return replace(shape, ranks=tt.constant_ranks(len(shape.modes), rank))


def product(n_in: int, rank: int, n_out: int, *, seed: int):
    return randn(n_in, rank, seed=seed), randn(rank, n_out, seed=seed + 1)


def dense(down_cores, up_cores, down, up):
    return oracle(down_cores, down) @ oracle(up_cores, up)


def relative_error(a_IR, b_RO, down, up, **options) -> float:
    cores = fit_product(a_IR, b_RO, down, up, **options)
    return product_error(a_IR, b_RO, *cores, down, up) / product_norm(a_IR, b_RO)


@examples
@given(pairs(), st.integers(1, 6), seeds)
def test_the_error_is_that_of_the_dense_matrices_and_below_one(pair, rank, seed):
    down, up = pair
    a_IR, b_RO = product(down.in_features, rank, up.out_features, seed=seed)
    down_cores, up_cores = fit_product(a_IR, b_RO, down, up)
    assert [tuple(core.shape) for core in (*down_cores, *up_cores)] == down.cores + up.cores
    ref_IO = a_IR @ b_RO
    error = (dense(down_cores, up_cores, down, up) - ref_IO).norm()
    singular = torch.linalg.svdvals(ref_IO)
    got_singular = product_singular_values(a_IR, b_RO)
    assert_near("singular values", got_singular, singular[: len(got_singular)])
    assert product_norm(a_IR, b_RO) == pytest.approx(ref_IO.norm().item(), rel=1e-12)
    got = product_error(a_IR, b_RO, down_cores, up_cores, down, up)
    assert got == pytest.approx(error.item(), rel=1e-9, abs=1e-12 * ref_IO.norm().item())
    # a projection never leaves more than there was
    assert got <= product_norm(a_IR, b_RO) * (1 + 1e-12)


@examples
@given(pairs(), st.integers(1, 6), seeds)
def test_ranks_that_carry_the_product_give_it_exactly(pair, rank, seed):
    down, up = (with_ranks(shape, 60) for shape in pair)
    rank = min(rank, down.out_features)
    a_IR, b_RO = product(down.in_features, rank, up.out_features, seed=seed)
    assert_near("product", dense(*fit_product(a_IR, b_RO, down, up), down, up), a_IR @ b_RO)


@examples
@given(pairs(), seeds)
def test_a_product_of_trains_is_found_again(pair, seed):
    """What two trains of these ranks spell is within reach, so a fit must reach it (a rank-1 start has no noise)."""
    down, up = (with_ranks(shape, 3) for shape in pair)
    generator = seeded(seed)
    down_cores, up_cores = (
        tt.gaussian(with_ranks(shape, 1), std=1.0, generator=generator, dtype=torch.float64) for shape in (down, up)
    )
    a_Ib, b_bO = tt.matrix(down_cores, with_ranks(down, 1)), tt.matrix(up_cores, with_ranks(up, 1))
    ref_IO = a_Ib @ b_bO
    # a sum over the bottleneck may cancel
    assume(ref_IO.norm() > 1e-3 * a_Ib.norm() * b_bO.norm())
    # a boundary inside a core gives trains of rank 1 a product of more directions than rank 3 lets through
    assume(torch.linalg.matrix_rank(ref_IO) <= 3)
    got_IO = dense(*fit_product(a_Ib, b_bO, down, up), down, up)
    assert (got_IO - ref_IO).norm() <= 1e-9 * ref_IO.norm()


@examples
@given(pairs(), st.integers(1, 6), seeds)
def test_sweeps_only_help(pair, rank, seed):
    down, up = (replace(shape, in_features=shape.padded_in, out_features=shape.padded_out) for shape in pair)
    bottleneck = min(down.out_features, up.in_features)
    down, up = replace(down, out_features=bottleneck), replace(up, in_features=bottleneck)
    a_IR, b_RO = product(down.in_features, rank, up.out_features, seed=seed)
    errors = [relative_error(a_IR, b_RO, down, up, sweeps=sweeps) for sweeps in (0, 1, 4)]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))


@pytest.mark.parametrize("sizes", [(24, 4, 30), (67, 5, 131), (64, 3, 64)])
def test_the_error_falls_with_the_rank_down_to_nothing(sizes):
    n_in, rank, n_out = sizes
    a_IR, b_RO = product(n_in, rank, n_out, seed=0)
    ranks = (1, 2, 3, 5, 80)
    errors = [
        relative_error(a_IR, b_RO, plan_shape(n_in, rank, rank=r), plan_shape(rank, n_out, rank=r)) for r in ranks
    ]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[0] > 0.5
    assert errors[-1] < 1e-12


def test_the_best_approximation_where_it_is_known():
    """With one mode a side nothing folds: the fit is then the truncated SVD of the product."""
    a_IR, b_RO = product(20, 5, 30, seed=0)
    singular = torch.linalg.svdvals(a_IR @ b_RO)
    for rank in (1, 2, 4):
        down, up = plan_shape(20, 5, rank=rank, modes=(20, 5)), plan_shape(5, 30, rank=rank, modes=(5, 30))
        best = (singular[rank:].norm() / singular.norm()).item()
        assert relative_error(a_IR, b_RO, down, up) == pytest.approx(best, rel=1e-9)


def test_the_rank_of_the_update_is_bounded_by_the_train_rank():
    a_IR, b_RO = product(24, 4, 30, seed=0)
    down, up = plan_shape(24, 4, rank=3), plan_shape(4, 30, rank=3)
    got_IO = dense(*fit_product(a_IR, b_RO, down, up), down, up)
    assert torch.linalg.matrix_rank(got_IO) == 3


def test_cores_have_one_norm_and_the_dtype_of_the_factors():
    a_IR, b_RO = product(24, 4, 30, seed=0)
    down, up = plan_shape(24, 4, rank=3), plan_shape(4, 30, rank=3)
    cores = [core for train in fit_product(a_IR.float(), b_RO.float(), down, up) for core in train]
    assert {core.dtype for core in cores} == {torch.float32}
    assert all(core.norm().item() == pytest.approx(cores[0].norm().item(), rel=1e-5) for core in cores)


@pytest.mark.parametrize("given_rank", [0, 2])
def test_directions_that_the_product_does_not_need_can_be_trained(given_rank):
    """A product of rank 0 or 2 in trains that carry 4: every direction gets a gradient on one side at least."""
    a_IR, b_RO = product(24, 2, 30, seed=0)
    a_IR = a_IR * (given_rank > 0)
    down, up = plan_shape(24, 4, rank=4, modes=(24, 4)), plan_shape(4, 30, rank=4, modes=(4, 30))
    down_cores, up_cores = fit_product(a_IR, b_RO, down, up)
    assert_near("product", dense(down_cores, up_cores, down, up), a_IR @ b_RO)
    assert torch.linalg.matrix_rank(tt.matrix(down_cores, down)) == 4
    up_cores = [core.requires_grad_() for core in up_cores]
    change_IO = tt.matrix(down_cores, down) @ tt.matrix(up_cores, up)
    grads = torch.autograd.grad((change_IO * randn(24, 30, seed=5)).sum(), up_cores)
    stepped = [core.detach() + grad for core, grad in zip(up_cores, grads, strict=True)]
    assert torch.linalg.matrix_rank(tt.matrix(down_cores, down) @ tt.matrix(stepped, up), rtol=1e-9) > given_rank


@pytest.mark.parametrize(
    "sizes",
    [((24, 4), (3, 30)), ((23, 4), (4, 30)), ((24, 4), (4, 31)), ((24, 4, 1), (4, 30))],
    ids=["rank", "input", "output", "dimensions"],
)
def test_factors_of_other_sizes_are_refused(sizes):
    left, right = (torch.zeros(size) for size in sizes)
    with pytest.raises(ValueError, match=r"is no product|does not fit the trains"):
        fit_product(left, right, plan_shape(24, 4, rank=2), plan_shape(4, 30, rank=2))
