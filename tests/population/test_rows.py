"""How batches of many members are padded, and cut into parts."""

import itertools
import math

import pytest

from loretta.population.rows import cut, near


def test_batches_of_many_rows_are_padded_to_near_lengths():
    lengths = [near(length) for length in range(1, 513)]
    assert all(length <= padded <= length + 1 for length, padded in enumerate(lengths[:32], 1))
    assert all(padded <= 1.125 * length for length, padded in enumerate(lengths, 1) if length > 16)
    assert lengths == sorted(lengths)
    assert sorted(set(lengths))[14:26] == [30, 32, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80]


@pytest.mark.parametrize(("fixed", "most"), [(0, 1e9), (30, 1e9), (90, 1e9), (0, 60), (1e9, 60)])
def test_a_batch_is_cut_where_it_costs_least(fixed, most):
    """Against all ways to cut it; pieces of one length are one part unless that is too large."""
    lengths, rows, pieces = [2, 2, 2, 3, 5, 5, 9], 3, [2, 2, 2, 1]

    def cost(sizes):
        ends = list(itertools.accumulate(sizes))
        tokens = [rows * size * lengths[end - 1] for size, end in zip(sizes, ends, strict=True)]
        too_large = any(t > most and size > 2 for t, size in zip(tokens, sizes, strict=True))
        return (math.inf if too_large else sum(tokens) + fixed * len(sizes)), len(sizes)

    every = []
    for joined in itertools.product((False, True), repeat=3):
        sizes = [pieces[0]]
        for size, join in zip(pieces[1:], joined, strict=True):
            sizes[-1:] = [sizes[-1] + size] if join else [sizes[-1], size]
        every.append(sizes)
    assert cut(lengths, rows, count=4, fixed=fixed, most=most) == min(every, key=cost)
