"""Axes: I input features, O output features, C inner size at the boundary, R/S neighbouring ranks, n one mode."""

import math
from dataclasses import replace

import pytest
import torch
from draws import examples
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_gradients_near, assert_near

from loretta import tt
from loretta.tt import plan_shape
from tt.trains import (
    SHAPES,
    assert_same_gradients,
    einsum,
    every_dtype,
    every_shape,
    frozen,
    inner_ranks,
    oracle,
    padded_tensor,
    randn,
    random_cores,
    seeds,
    shapes,
    tails,
    unbounded,
)


@examples
@given(shapes(), seeds)
def test_the_matrix_is_a_product_of_slices(shape, seed):
    cores = random_cores(shape, seed=seed)
    ref = oracle(cores, shape)
    left_IC, right_CO = tt.halves(cores, shape)
    assert left_IC.shape == (shape.in_features, shape.cut_rank)
    assert right_CO.shape == (shape.cut_rank, shape.out_features)
    for name, got in [
        ("matrix", tt.matrix(cores, shape)),
        ("naive", tt.matrix_naive(cores, shape)),
        ("halves", left_IC @ right_CO),
    ]:
        assert_near(name, got, ref)
        assert_same_gradients(got, ref, cores)


@examples
@given(shapes(), seeds)
def test_applying_the_halves_is_applying_the_matrix(shape, seed):
    cores, x_BI = random_cores(shape, seed=seed), randn(3, shape.in_features, seed=seed + 1).requires_grad_()
    left_IC, right_CO = tt.halves(cores, shape)
    got, ref = (x_BI @ left_IC) @ right_CO, x_BI @ oracle(cores, shape)
    assert_near("y", got, ref)
    assert_same_gradients(got, ref, [x_BI, *cores])


@examples
@given(shapes(), seeds)
def test_stacked_trains_halve_as_each_alone(shape, seed):
    trains = [random_cores(shape, seed=seed + k) for k in range(2)]
    left_MIC, right_MCO = tt.halves([torch.stack(cores) for cores in zip(*trains, strict=True)], shape)
    assert len(left_MIC) == len(right_MCO) == 2  # also of a side of size 1, which has no core
    for cores, left_IC, right_CO in zip(trains, left_MIC, right_MCO, strict=True):
        assert_near("halves", left_IC @ right_CO, oracle(cores, shape))


@every_dtype
@every_shape
def test_the_matrix_and_its_gradients_in_every_dtype(shape, dtype):
    cores = random_cores(shape, seed=3, dtype=dtype)
    # the float64 oracle sees the same rounded cores; its gradients arrive in their dtype
    exact = [core.detach().double().requires_grad_() for core in cores]
    ref, weights = oracle(exact, shape), randn(shape.in_features, shape.out_features, seed=7).to(dtype)
    ref_grads = torch.autograd.grad((ref * weights.double()).sum(), exact)
    for name, function in [("matrix", tt.matrix), ("naive", tt.matrix_naive)]:
        got = function(cores, shape)
        assert got.dtype == dtype
        assert_near(name, got, ref)
        got_grads = torch.autograd.grad(got, cores, weights)
        assert_gradients_near(dict(enumerate(got_grads)), dict(enumerate(ref_grads)))


@examples
@given(shapes(), seeds)
def test_contract_is_one_einsum(shape, seed):
    cores = random_cores(shape, seed=seed)
    got, ref = tt.contract(cores), einsum(cores)
    assert got.shape == shape.modes
    assert_near("tensor", got, ref)
    assert_same_gradients(got, ref, cores)


def test_a_train_of_ranks_1_is_a_kronecker_product():
    shape = plan_shape(6, 20, rank=1, modes=(2, 3, 4, 5))
    cores = frozen(random_cores(shape, seed=0))
    u, v, w, z = (core.flatten() for core in cores)
    assert_near("matrix", tt.matrix(cores, shape), torch.outer(torch.kron(u, v), torch.kron(w, z)))


def test_halves_by_hand_with_a_boundary_inside_a_core():
    # one core that spells a 2 x 3 matrix row by row
    shape = plan_shape(2, 3, rank=1, modes=(6,))
    core = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(1, 6, 1)
    expected = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    assert torch.equal(tt.matrix([core], shape), expected)
    assert [tuple(half.shape) for half in tt.halves([core], shape)] == [(2, 2), (2, 3)]


@examples
@given(shapes(), seeds)
def test_turning_an_inner_basis_changes_nothing(shape, seed):
    cores = frozen(random_cores(shape, seed=seed))
    ref = tt.matrix(cores, shape)
    for cut in range(1, len(cores)):
        rank = shape.ranks[cut]
        turn = torch.linalg.qr(randn(rank, rank, seed=seed)).Q * torch.linspace(0.5, 2, rank, dtype=torch.float64)
        turned = list(cores)
        turned[cut - 1] = cores[cut - 1] @ turn
        turned[cut] = torch.einsum("RS,SnT->RnT", torch.linalg.inv(turn), cores[cut])
        assert_near(f"cut {cut}", tt.matrix(turned, shape), ref)


@examples
@given(shapes(), seeds)
def test_the_matrix_is_linear_in_each_core(shape, seed):
    cores, others = frozen(random_cores(shape, seed=seed)), frozen(random_cores(shape, seed=seed + 1))
    for k in range(len(cores)):
        other = [*cores[:k], others[k], *cores[k + 1 :]]
        mixed = [*cores[:k], 2 * cores[k] - 3 * others[k], *cores[k + 1 :]]
        expected = 2 * tt.matrix(cores, shape) - 3 * tt.matrix(other, shape)
        assert_near(f"core {k}", tt.matrix(mixed, shape), expected)


def carried(modes):
    """The largest rank that each cut of a tensor of these modes can have."""
    return [min(math.prod(modes[:cut]), math.prod(modes[cut:])) for cut in range(1, len(modes))]


@examples
@given(shapes(), seeds)
def test_tt_svd_is_exact_at_full_rank(shape, seed):
    dense = randn(shape.in_features, shape.out_features, seed=seed)
    cores = tt.tt_svd(dense, unbounded(shape))
    assert_near("matrix", tt.matrix(cores, shape), dense)
    assert_near("padding too", tt.contract(cores), padded_tensor(dense, shape))
    assert all(rank <= bound for rank, bound in zip(inner_ranks(cores), carried(shape.modes), strict=True))


@examples
@given(shapes(max_rank=4), seeds)
def test_tt_svd_respects_the_ranks_and_is_quasi_optimal(shape, seed):
    dense = randn(shape.in_features, shape.out_features, seed=seed)
    cores = tt.tt_svd(dense, shape)
    assert [core.shape[1] for core in cores] == list(shape.modes)
    assert all(rank <= asked for rank, asked in zip(inner_ranks(cores), shape.ranks[1:-1], strict=True))
    tensor = padded_tensor(dense, shape)
    error = (tt.contract(cores) - tensor).norm().item()
    lost = list(tails(tensor, shape.ranks))
    slack = 1e-12 * dense.norm().item()
    assert max(lost, default=0.0) - slack <= error <= math.hypot(*lost) + slack


@pytest.mark.parametrize("modes", [(12, 20), (4, 60), (24, 10)])  # the boundary at the cut, right and left of it
def test_tt_svd_of_one_cut_loses_exactly_the_tail(modes):
    shape = plan_shape(12, 20, rank=3, modes=modes)
    dense = randn(shape.in_features, shape.out_features, seed=0)
    cores = tt.tt_svd(dense, shape)
    (tail,) = tails(padded_tensor(dense, shape), shape.ranks)
    assert (tt.matrix(cores, shape) - dense).norm().item() == pytest.approx(tail, rel=1e-12)


@every_shape
def test_tt_svd_of_the_zero_matrix(shape):
    dense = torch.zeros(shape.in_features, shape.out_features)
    cores = tt.tt_svd(dense, shape)
    assert_near("matrix", tt.matrix(cores, shape), dense)
    assert all(core.isfinite().all() for core in cores)


@every_dtype
def test_tt_svd_answers_in_the_dtype_of_the_matrix(dtype):
    shape = plan_shape(12, 20, rank=10**6, modes=(4, 3, 5, 4))
    dense = randn(12, 20, seed=0, dtype=dtype)
    cores = tt.tt_svd(dense, shape)
    assert {core.dtype for core in cores} == {dtype}
    assert_near("matrix", tt.matrix(cores, shape), dense)


@pytest.mark.parametrize("size", [(20, 12), (12, 21), (11, 20), (240,)])
def test_tt_svd_refuses_a_matrix_of_another_size(size):
    shape = plan_shape(12, 20, rank=2, modes=(4, 3, 5, 4))
    with pytest.raises(ValueError, match=rf"\({size[0]}.*\) matrix does not fit a train for 12 x 20 \[4, 3, 5, 4\]"):
        tt.tt_svd(torch.zeros(size), shape)


@examples
@given(shapes(), seeds)
def test_balance_gives_every_core_the_same_norm(shape, seed):
    scales = [10.0 ** (3 * (-1) ** k) for k in range(len(shape.modes))]
    cores = [scale * core for scale, core in zip(scales, frozen(random_cores(shape, seed=seed)), strict=True)]
    balanced = tt.balance(cores)
    assert_near("tensor", tt.contract(balanced), tt.contract(cores))
    for core in balanced:
        assert_near("norm", core.norm(), balanced[0].norm())


@every_dtype
def test_balance_keeps_the_dtype(dtype):
    shape = SHAPES["straddling, folded right"]
    cores = frozen(random_cores(shape, seed=0, dtype=dtype))
    balanced = tt.balance([8 * cores[0], *cores[1:]])
    assert {core.dtype for core in balanced} == {dtype}
    assert_near("tensor", tt.contract(balanced), 8 * einsum(cores))


def test_balance_leaves_a_train_with_a_zero_core_alone():
    cores = frozen(random_cores(SHAPES["aligned"], seed=0))
    cores[2] = torch.zeros_like(cores[2])
    for got, ref in zip(tt.balance(cores), cores, strict=True):
        assert torch.equal(got, ref)


@examples
@given(shapes(), seeds, st.data())
def test_padded_ranks_spell_the_same_train(shape, seed, data):
    ranks = (1, *(rank + data.draw(st.integers(0, 3)) for rank in shape.ranks[1:-1]), 1)
    cores = frozen(random_cores(shape, seed=seed))
    padded = tt.pad_ranks(cores, ranks)
    assert [tuple(core.shape) for core in padded] == replace(shape, ranks=ranks).cores
    assert_near("tensor", tt.contract(padded), tt.contract(cores))
    for core, (left, mode, right) in zip(padded, shape.cores, strict=True):
        assert core[left:].count_nonzero() == core[:, :, right:].count_nonzero() == 0
        assert core[:left, :, :right].shape[1] == mode


@pytest.mark.parametrize("ranks", [(1, 3, 2, 3, 1), (1, 3, 3, 1), (1, 3, 3, 3, 3, 1)])
def test_padding_refuses_to_shrink(ranks):
    cores = frozen(random_cores(SHAPES["aligned"], seed=0))
    with pytest.raises(ValueError) as refused:
        tt.pad_ranks(cores, ranks)
    assert f"[1, 3, 3, 3, 1] to {list(ranks)}" in str(refused.value)
