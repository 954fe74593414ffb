import math

import pytest
from draws import examples
from hypothesis import given
from hypothesis import strategies as st

from loretta.tt import PAPER_MODES, balanced_modes, plan_shape, plan_sides
from loretta.tt.modes import LARGEST_MODE

# LoRETTA, Table 10, row by row, without its last row: [8] * 8 for 768 x 768 is a misprint.
TABLE_10 = {
    (768, 64): [8, 8, 12, 8, 8],
    (4096, 64): [16, 16, 16, 4, 4, 4],
    (64, 768): [8, 8, 12, 8, 8],
    (64, 4096): [4, 4, 4, 16, 16, 16],
    (768, 8): [8, 8, 12, 8],
    (768, 16): [8, 8, 12, 4, 4],
    (768, 32): [8, 8, 12, 8, 4],
    (8, 768): [8, 12, 8, 8],
    (16, 768): [4, 4, 12, 8, 8],
    (32, 768): [4, 8, 12, 8, 8],
    (4096, 8): [8, 8, 8, 8, 8],
    (4096, 16): [8, 8, 8, 8, 4, 4],
    (4096, 32): [8, 8, 8, 8, 8, 4],
    (8, 4096): [8, 8, 8, 8, 8],
    (16, 4096): [4, 4, 8, 8, 8, 8],
    (32, 4096): [4, 8, 8, 8, 8, 8],
    (768, 768): [12, 8, 8, 8, 8, 12],
}
FUSED_IN_PROJ = (8, 2304)  # DeBERTa's, not printed

sizes = st.integers(1, 20_000)


@pytest.mark.parametrize("size", TABLE_10)
def test_the_modes_of_table_10_are_planned(size):
    shape = plan_shape(*size, rank=5)
    assert list(shape.modes) == TABLE_10[size]
    assert shape.aligned
    assert shape.ranks == (1, *[5] * (len(shape.modes) - 1), 1)


def test_paper_modes_hold_table_10_and_one_shape_more():
    assert PAPER_MODES.keys() == TABLE_10.keys() | {FUSED_IN_PROJ}


def test_given_modes_win_over_overrides_and_these_over_the_paper():
    overrides = {"768x64": [16, 3, 16, 64], "100x10": [10, 10, 10], "64x768": [1]}
    assert plan_shape(768, 64, rank=2, modes=[64, 12, 64], overrides=overrides).modes == (64, 12, 64)
    assert plan_shape(768, 64, rank=2, overrides=overrides).modes == (16, 3, 16, 64)
    assert plan_shape(100, 10, rank=2, overrides=overrides).modes == (10, 10, 10)
    assert plan_shape(4096, 64, rank=2, overrides=overrides).modes == (16, 16, 16, 4, 4, 4)
    assert plan_shape(100, 11, rank=2, overrides=overrides).modes == (10, 10, 11)


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        ({"in_features": 0, "out_features": 8, "rank": 2}, "got 0 x 8"),
        ({"in_features": 8, "out_features": -8, "rank": 2}, "got 8 x -8"),
        ({"in_features": 8, "out_features": 8, "rank": 0}, "rank must be at least 1, got 0"),
        ({"in_features": 8, "out_features": 8, "rank": -1, "modes": (8, 8)}, "rank must be at least 1, got -1"),
        ({"in_features": 768, "out_features": 768, "rank": 5, "modes": [8] * 8}, "16,777,216 instead of 589,824"),
        ({"in_features": 8, "out_features": 4, "rank": 2, "overrides": {"8x4": (8, 8)}}, r"\[8, 8\] for a 8 x 4"),
        ({"in_features": 8, "out_features": 4, "rank": 2, "overrides": {"8x4": ()}}, r"\[\] for a 8 x 4"),
    ],
)
def test_a_plan_refuses_and_quotes(call, quoted):
    with pytest.raises(ValueError, match=quoted):
        plan_shape(**call)


@pytest.mark.parametrize(
    ("size", "modes", "padded"),
    [
        (1, (1,), 1),
        (7, (7,), 7),
        (61, (61,), 61),
        (67, (7, 10), 70),
        (1024, (8, 8, 16), 1024),
        (11008, (4, 8, 8, 43), 11008),
        (14336, (4, 7, 8, 8, 8), 14336),
        (10007, (7, 10, 12, 12), 10080),
        (50257, (7, 8, 9, 10, 10), 50400),
    ],
)
def test_balanced_modes_by_name(size, modes, padded):
    assert balanced_modes(size) == modes
    assert math.prod(modes) == padded


def largest_prime_factor(size):
    largest, prime = 1, 2
    while prime * prime <= size:
        while size % prime == 0:
            largest, size = prime, size // prime
        prime += 1
    return max(largest, size)


def test_every_size_to_20000_is_padded_only_for_a_long_prime_and_then_little():
    for size in range(1, 20_001):
        modes = balanced_modes(size)
        padded = math.prod(modes)
        assert list(modes) == sorted(modes), size
        assert modes[-1] <= LARGEST_MODE == 64, size
        assert 1 not in modes or modes == (1,), size
        if largest_prime_factor(size) <= 64:
            assert padded == size
        else:
            assert size < padded <= 1.1 * size, size


@examples
@given(sizes, sizes, st.integers(1, 100))
def test_any_matrix_plans_aligned_with_long_modes_at_the_ends(in_features, out_features, rank):
    shape = plan_shape(in_features, out_features, rank=rank)
    assert (shape.in_features, shape.out_features, shape.aligned) == (in_features, out_features, True)
    assert shape.padded_in == math.prod(balanced_modes(in_features))
    assert shape.padded_out == math.prod(balanced_modes(out_features))
    assert set(shape.ranks[1:-1]) <= {rank}
    if (in_features, out_features) not in PAPER_MODES:
        in_modes, out_modes = shape.modes[: shape.n_in], shape.modes[shape.n_in :]
        assert list(in_modes) == sorted(in_modes, reverse=True)
        assert list(out_modes) == sorted(out_modes)


@pytest.mark.parametrize(
    ("sizes", "rank", "modes", "ranks"),
    [
        ((384, 1), 4, (24, 16), (1, 4, 1)),
        ((1, 384), 4, (16, 24), (1, 4, 1)),
        ((4096, 1), 100, (64, 64), (1, 64, 1)),  # no rank above what two modes of 64 can use
        ((11008, 1), 4, (128, 86), (1, 4, 1)),
        ((384, 8), 5, (24, 16, 8), (1, 5, 5, 1)),
        ((384, 3), 5, (24, 16, 3), (1, 5, 3, 1)),
        ((64, 64), 9, (64, 64), (1, 9, 1)),  # a side of up to 64 is one mode
        ((1, 1), 4, (1,), (1, 1)),
        ((10007, 1), 4, (105, 96), (1, 4, 1)),  # a prime, padded
    ],
)
def test_two_modes_a_side(sizes, rank, modes, ranks):
    shape = plan_sides(*sizes, rank=rank, count=2)
    assert (shape.modes, shape.ranks) == (modes, ranks)
    assert plan_shape(*sizes, rank=rank, modes_per_side=2) == shape


def test_given_modes_win_over_a_number_of_modes():
    options = {"rank": 2, "modes_per_side": 2}
    assert plan_shape(384, 1, overrides={"384x1": [4, 96]}, **options).modes == (4, 96)
    assert plan_shape(384, 1, modes=[2, 192], **options).modes == (2, 192)
    with pytest.raises(ValueError, match="at least one mode, got 0"):
        plan_shape(384, 1, rank=2, modes_per_side=0)


def test_a_side_has_no_more_modes_than_it_has_factors():
    assert plan_sides(768, 1, rank=2, count=10).modes == (2,) * 10
    for sizes in ((768, 1), (1, 768)):
        with pytest.raises(
            ValueError, match="a side of 768 takes at most 10 modes of 2 or more, got 99999: give fewer"
        ):
            plan_sides(*sizes, rank=2, count=99_999)


@examples
@given(st.integers(1, 20_000), st.integers(1, 300), st.integers(1, 40), st.integers(1, 3))
def test_sides_spell_any_matrix_with_ranks_that_its_modes_can_use(in_features, out_features, rank, count):
    shape = plan_sides(in_features, out_features, rank=rank, count=count)
    assert shape.aligned
    assert shape.padded_in <= 1.25 * in_features
    assert shape.padded_out <= 1.25 * out_features
    for k in range(1, len(shape.modes)):
        assert shape.ranks[k] == min(rank, math.prod(shape.modes[:k]), math.prod(shape.modes[k:]))
