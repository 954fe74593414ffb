"""The trains nearest to an update: their error against dense matrices, and the smallest rank against all ranks."""

import pytest
import torch
from draws import seeded

from loretta import tt
from loretta.layers.fit import EXACT, fit_update, smallest_fit

IN, OUT, BOTTLENECK = 64, 48, 8


def update(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = seeded(seed)
    return torch.randn(IN, rank, generator=draw), torch.randn(rank, OUT, generator=draw)


def error_of(fit, given) -> float:
    """Relative error of the product, from matrices that are built whole, in float64."""
    a, b = (part.double() for part in given)
    down, up = ([core.detach().double() for core in cores] for cores in (fit.down, fit.up))
    got = tt.matrix_naive(down, fit.down.shape) @ tt.matrix_naive(up, fit.up.shape)
    return float((got - a @ b).norm() / (a @ b).norm())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_that_of_the_whole_matrices(rank):
    given = update(4)
    fit = fit_update(given, BOTTLENECK, rank)
    assert fit.rank == rank == max(fit.down.shape.ranks)
    assert fit.error == pytest.approx(error_of(fit, given), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("error", [0.7, 0.3, 0.05, 0.0])
def test_the_smallest_rank_is_the_first_that_keeps_the_error(seed, error):
    given = update(6, seed)
    errors = [max(EXACT, fit_update(given, BOTTLENECK, rank).error) for rank in range(1, 17)]
    assert errors == sorted(errors, reverse=True), "bisection needs errors that fall"
    least = next(rank for rank, got in enumerate(errors, start=1) if got <= max(error, EXACT))
    fit = smallest_fit(given, BOTTLENECK, error)
    assert fit.rank == least
    assert error_of(fit, given) <= max(error, EXACT) * 1.0001


def test_an_update_of_zeros_is_exact_at_rank_1():
    fit = smallest_fit((torch.zeros(IN, 2), torch.zeros(2, OUT)), BOTTLENECK, 0.1)
    assert (fit.rank, fit.error) == (1, 0.0)
