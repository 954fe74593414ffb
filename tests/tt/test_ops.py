"""Axes: I input features, O output features, C inner size at the boundary, R/S neighbouring ranks, n one mode."""

import math
from dataclasses import replace

import pytest
import torch
from draws import examples
from hypothesis import given
from hypothesis import strategies as st
from tolerances import RTOL, assert_gradients_near, assert_near

from loretta import tt
from loretta.tt import TTShape, plan_shape
from tt.trains import SHAPES, frozen, oracle, randn, random_cores, seeds, shapes

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", RTOL)


def einsum(cores):
    """The full tensor in one call of torch.einsum."""
    operands = []
    for k, core in enumerate(cores):  # labels: ranks are even, modes odd
        operands += [core.double(), [2 * k, 2 * k + 1, 2 * k + 2]]
    full = torch.einsum(*operands, [0, *range(1, 2 * len(cores), 2), 2 * len(cores)])
    return full[0, ..., 0]


def assert_same_gradients(got, ref, wanted):
    """Compare d(sum(weights * y)) for fixed random weights. The reference is float64, ``got`` in any dtype."""
    weights = randn(*ref.shape, seed=7)
    got_grads = torch.autograd.grad((got * weights.to(got.dtype)).sum(), wanted)
    ref_grads = torch.autograd.grad((ref * weights).sum(), wanted, retain_graph=True)
    assert_gradients_near(dict(enumerate(got_grads)), dict(enumerate(ref_grads)))


# contract, halves, matrix


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


# tt_svd


def unbounded(shape):
    return replace(shape, ranks=(1, *[10**6] * (len(shape.modes) - 1), 1))


def padded_tensor(dense_IO, shape):
    full = dense_IO.new_zeros(shape.padded_in, shape.padded_out)
    full[: shape.in_features, : shape.out_features] = dense_IO
    return full.reshape(shape.modes)


def tails(tensor, ranks):
    """Per cut, the norm of the singular values of the unfolding that a rank leaves out."""
    for cut in range(1, tensor.dim()):
        unfolding = tensor.reshape(math.prod(tensor.shape[:cut]), -1)
        yield torch.linalg.svdvals(unfolding)[ranks[cut] :].norm().item()


def inner_ranks(cores):
    return [core.shape[2] for core in cores[:-1]]


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


@examples
@given(shapes(), seeds, st.floats(0.01, 1.0))
def test_tt_svd_stays_within_the_error(shape, seed, error):
    dense = randn(shape.in_features, shape.out_features, seed=seed)
    cores = tt.tt_svd(dense, unbounded(shape), error=error)
    lost = (tt.contract(cores) - padded_tensor(dense, shape)).norm()
    assert lost <= error * (1 + 1e-12) * dense.norm()


def test_the_cuts_share_the_error():
    shape = plan_shape(64, 64, rank=10**6, modes=(4,) * 6)
    # terms of rank 1 that fade slowly, so that every cut has something to lose at every error
    terms = [frozen(random_cores(replace(shape, ranks=(1,) * 7), seed=k)) for k in range(60)]
    dense = sum(0.85**k * tt.matrix(term, shape) for k, term in enumerate(terms))
    for error in torch.linspace(0.05, 0.9, 30).tolist():
        for cores in (
            tt.tt_svd(dense, shape, error=error),
            tt.round_ranks(tt.tt_svd(dense, shape), error=error),
        ):
            lost = ((tt.matrix(cores, shape) - dense).norm() / dense.norm()).item()
            assert 0.5 * error <= lost <= error


@pytest.mark.parametrize("error", [0.001, 0.1, 0.3, 0.7, 0.99])
def test_an_error_finds_the_least_rank_of_one_cut(error):
    shape = plan_shape(12, 20, rank=10**6, modes=(12, 20))
    dense = randn(12, 20, seed=0)
    values = torch.linalg.svdvals(dense)
    least = next(rank for rank in range(1, 13) if values[rank:].norm() <= error * dense.norm())
    assert inner_ranks(tt.tt_svd(dense, shape, error=error)) == [least]
    assert inner_ranks(tt.round_ranks(tt.tt_svd(dense, shape), error=error)) == [least]


def test_ranks_win_over_an_error_that_they_cannot_meet():
    shape = plan_shape(12, 20, rank=3, modes=(12, 20))
    dense = randn(12, 20, seed=0)
    assert inner_ranks(tt.tt_svd(dense, shape, error=1e-6)) == [3]
    assert inner_ranks(tt.tt_svd(dense, shape, error=0.9)) < [3]


def test_an_error_recovers_the_ranks_of_a_train():
    shape = TTShape(in_features=12, out_features=20, modes=(4, 3, 5, 4), ranks=(1, 3, 4, 2, 1), n_in=2)
    dense = tt.matrix(frozen(random_cores(shape, seed=0)), shape)
    cores = tt.tt_svd(dense, unbounded(shape), error=1e-10)
    assert inner_ranks(cores) == [3, 4, 2]
    assert_near("matrix", tt.matrix(cores, shape), dense)


@pytest.mark.parametrize("error", [None, 0.0, 0.1])
@every_shape
def test_tt_svd_of_the_zero_matrix(shape, error):
    dense = torch.zeros(shape.in_features, shape.out_features)
    cores = tt.tt_svd(dense, shape, error=error)
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


# round_ranks


@examples
@given(shapes(), seeds, st.integers(1, 4))
def test_rounding_respects_the_rank_and_is_quasi_optimal(shape, seed, rank):
    cores = frozen(random_cores(shape, seed=seed))
    rounded = tt.round_ranks(cores, rank=rank)
    assert all(got <= min(rank, had) for got, had in zip(inner_ranks(rounded), shape.ranks[1:-1], strict=True))
    tensor = tt.contract(cores)
    error = (tt.contract(rounded) - tensor).norm().item()
    lost = list(tails(tensor, [rank] * len(shape.ranks)))
    slack = 1e-12 * tensor.norm().item()
    assert max(lost, default=0.0) - slack <= error <= math.hypot(*lost) + slack


@examples
@given(shapes(), seeds, st.floats(0.01, 1.0))
def test_rounding_stays_within_the_error(shape, seed, error):
    cores = frozen(random_cores(shape, seed=seed))
    rounded = tt.round_ranks(cores, error=error)
    tensor = tt.contract(cores)
    assert (tt.contract(rounded) - tensor).norm() <= error * (1 + 1e-12) * tensor.norm()


def test_rank_and_error_together_bound_the_rank_first():
    shape = plan_shape(12, 20, rank=10**6, modes=(4, 3, 5, 4))
    cores = tt.tt_svd(randn(12, 20, seed=0), shape)
    assert inner_ranks(tt.round_ranks(cores, rank=3, error=1e-6)) == [3, 3, 3]
    assert inner_ranks(tt.round_ranks(cores, rank=10, error=1e-6)) == [4, 10, 4]
    assert inner_ranks(tt.round_ranks(cores, rank=10, error=2.0)) == [1, 1, 1]


INFLATED = {
    "added": lambda cores: tt.add(cores, cores),
    "padded": lambda cores: tt.pad_ranks([2 * cores[0], *cores[1:]], (1, 9, 6, 7, 1)),
}


@pytest.mark.parametrize("inflate", INFLATED.values(), ids=INFLATED)
def test_rounding_undoes_inflated_ranks(inflate):
    shape = TTShape(in_features=12, out_features=20, modes=(4, 3, 5, 4), ranks=(1, 3, 4, 2, 1), n_in=2)
    cores = frozen(random_cores(shape, seed=0))
    inflated = inflate(cores)
    assert all(rank > had for rank, had in zip(inner_ranks(inflated), shape.ranks[1:-1], strict=True))
    rounded = tt.round_ranks(inflated, error=1e-10)
    assert inner_ranks(rounded) == [3, 4, 2]
    assert_near("matrix", tt.matrix(rounded, shape), 2 * oracle(cores, shape))


def test_rounding_never_builds_the_full_tensor():
    shape = plan_shape(8**10, 8**10, rank=3, modes=(8,) * 20)  # 10^18 entries
    cores = [core / core.norm() for core in frozen(random_cores(shape, seed=0))]
    rounded = tt.round_ranks(tt.add(cores, cores), error=1e-10)
    assert set(inner_ranks(rounded)) == {3}
    difference = tt.add(rounded, [-2 * cores[0], *cores[1:]])
    assert tt.orthogonalise(difference)[-1].norm() <= 1e-9 * tt.orthogonalise(cores)[-1].norm()


@every_dtype
def test_rounding_answers_in_the_dtype_of_the_cores(dtype):
    shape = plan_shape(12, 20, rank=3, modes=(4, 3, 5, 4))
    cores = frozen(random_cores(shape, seed=0, dtype=dtype))
    rounded = tt.round_ranks(tt.pad_ranks(cores, (1, 4, 5, 4, 1)), rank=3)
    assert {core.dtype for core in rounded} == {dtype}
    assert_near("matrix", tt.matrix(rounded, shape), oracle(cores, shape))


@pytest.mark.parametrize(
    ("budget", "quoted"),
    [
        ({}, "give rank=, error= or both"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": -2, "error": 0.1}, "at least 1, got -2"),
        ({"error": -0.25}, "must not be negative, got -0.25"),
    ],
)
def test_rounding_refuses_and_quotes(budget, quoted):
    cores = frozen(random_cores(SHAPES["aligned"], seed=0))
    with pytest.raises(ValueError, match=quoted):
        tt.round_ranks(cores, **budget)


def test_tt_svd_refuses_a_negative_error():
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.25"):
        tt.tt_svd(torch.ones(24, 10), SHAPES["aligned"], error=-0.25)


def test_rounding_a_zero_train():
    cores = [torch.zeros(core) for core in SHAPES["aligned"].cores]
    for rounded in (tt.round_ranks(cores, rank=1), tt.round_ranks(cores, error=0.5)):
        assert_near("tensor", tt.contract(rounded), tt.contract(cores))


# orthogonalise


@examples
@given(shapes(), seeds, st.data())
def test_orthogonalise_moves_the_norm_into_one_core(shape, seed, data):
    cores = frozen(random_cores(shape, seed=seed))
    centre = data.draw(st.integers(-len(cores), len(cores) - 1))
    turned, tensor = tt.orthogonalise(cores, centre), tt.contract(cores)
    assert_near("tensor", tt.contract(turned), tensor)
    assert_near("norm", turned[centre].norm(), tensor.norm())
    position = centre % len(cores)
    for core_RnS in turned[:position]:
        tall = core_RnS.flatten(0, 1)
        assert_near("left of the centre", tall.T @ tall, torch.eye(tall.shape[1]))
    for core_RnS in turned[position + 1 :]:
        wide = core_RnS.flatten(1)
        assert_near("right of the centre", wide @ wide.T, torch.eye(wide.shape[0]))
    for cut, rank in enumerate(inner_ranks(turned), start=1):
        side = shape.modes[:cut] if cut <= position else shape.modes[cut:]
        assert rank <= min(shape.ranks[cut], math.prod(side))


def test_the_centre_is_the_last_core_unless_asked_and_must_exist():
    cores = frozen(random_cores(SHAPES["aligned"], seed=0))
    for got, ref in zip(tt.orthogonalise(cores), tt.orthogonalise(cores, 3), strict=True):
        assert torch.equal(got, ref)
    for centre in (4, -5):
        with pytest.raises(IndexError):
            tt.orthogonalise(cores, centre)


@pytest.mark.parametrize(
    "function",
    [tt.orthogonalise, tt.balance, lambda cores: tt.round_ranks(cores, rank=1), lambda cores: tt.add(cores, cores)],
)
def test_the_given_cores_are_left_alone(function):
    cores = frozen(random_cores(SHAPES["aligned"], seed=0))
    before = [core.clone() for core in cores]
    function(cores)
    assert all(torch.equal(core, copy) for core, copy in zip(cores, before, strict=True))


# add, balance, pad_ranks


@examples
@given(shapes(), seeds, st.data())
def test_add_is_the_sum_of_matrices(shape, seed, data):
    ranks = (1, *(data.draw(st.integers(1, 5)) for _ in shape.modes[1:]), 1)
    left, right = random_cores(shape, seed=seed), random_cores(replace(shape, ranks=ranks), seed=seed + 1)
    total = tt.add(left, right)
    added = [a + b for a, b in zip(shape.ranks[1:-1], ranks[1:-1], strict=True)]
    assert inner_ranks(total) == added
    ref = oracle(left, shape) + oracle(right, shape)
    got = tt.matrix(total, replace(shape, ranks=(1, *added, 1)))
    assert_near("sum", got, ref)
    assert_same_gradients(got, ref, [*left, *right])


@pytest.mark.parametrize("modes", [(4, 6, 10), (4, 6, 2, 5), (24, 10), (240,)])
def test_add_refuses_other_modes(modes):
    other = plan_shape(24, 10, rank=2, modes=modes)
    left, right = frozen(random_cores(SHAPES["aligned"], seed=0)), frozen(random_cores(other, seed=0))
    with pytest.raises(ValueError) as refused:
        tt.add(left, right)
    assert "[4, 6, 5, 2]" in str(refused.value)
    assert str(list(modes)) in str(refused.value)


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
