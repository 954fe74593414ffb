"""Rounding a train, and what moves norms and ranks about within one: orthogonalise, add, balance, pad_ranks."""

import math
from dataclasses import replace

import pytest
import torch
from draws import examples
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_near

from loretta import tt
from loretta.tt import TTShape, plan_shape
from tt.trains import (
    SHAPES,
    assert_same_gradients,
    einsum,
    every_dtype,
    frozen,
    inner_ranks,
    oracle,
    randn,
    random_cores,
    seeds,
    shapes,
    tails,
)


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


def test_rounding_a_zero_train():
    cores = [torch.zeros(core) for core in SHAPES["aligned"].cores]
    for rounded in (tt.round_ranks(cores, rank=1), tt.round_ranks(cores, error=0.5)):
        assert_near("tensor", tt.contract(rounded), tt.contract(cores))


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
