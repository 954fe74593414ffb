import math

import pytest
import torch
from draws import seed_torch, seeded
from torch import Tensor

from loretta.tt import gaussian, matrix, plan_shape
from tt.trains import SHAPES

DRAWS = {
    "small": (SHAPES["aligned"], 3000),
    "straddling": (SHAPES["straddling, folded left"], 3000),
    "padded": (SHAPES["padded and straddling"], 3000),
    "one core": (SHAPES["one core"], 1000),
    "Table 10": (plan_shape(768, 8, rank=5), 300),
    "70B": (plan_shape(16, 1024, rank=8, modes=(8, 8, 8, 8, 4)), 100),
}


def assert_mean(values: Tensor, expected: float, *, within: float) -> None:
    """The mean is as expected within five standard errors, which are below ``within``, so that a wrong factor shows."""
    allowed = (5 * values.std() / math.sqrt(len(values))).item()
    assert allowed < within
    assert abs(values.mean().item() - expected) <= allowed


@pytest.mark.parametrize(("shape", "draws"), DRAWS.values(), ids=DRAWS)
def test_the_contracted_matrix_has_the_promised_std(shape, draws):
    generator = seeded(0)
    variances, means = [], []
    for _ in range(draws):
        dense = matrix(gaussian(shape, std=0.02, generator=generator, dtype=torch.float64), shape)
        variances.append(dense.square().mean())
        means.append(dense.mean())
    assert_mean(torch.stack(variances) / 0.02**2, 1.0, within=0.2)
    assert_mean(torch.stack(means) / 0.02, 0.0, within=0.05)


def test_all_cores_are_drawn_alike():
    cores = gaussian(plan_shape(768, 64, rank=30), std=0.1, generator=seeded(0))
    spread = torch.cat([core.flatten() for core in cores]).std().item()
    for core in cores:  # the standard error of a spread of n numbers is 1 / sqrt(2 n) of it
        assert core.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * core.numel()))


def test_a_generator_makes_the_draw_reproducible():
    shape = SHAPES["aligned"]
    first, again, other = (gaussian(shape, std=1.0, generator=seeded(s)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    seed_torch(3)
    assert all(torch.equal(a, b) for a, b in zip(gaussian(shape, std=1.0), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cores_have_the_planned_shapes_dtype_and_device(dtype):
    shape = SHAPES["straddling, folded right"]
    cores = gaussian(shape, std=1.0, dtype=dtype)
    assert [tuple(core.shape) for core in cores] == shape.cores
    assert {core.dtype for core in cores} == {dtype}
    assert all(core.is_meta for core in gaussian(shape, std=1.0, device="meta"))


def test_std_zero_is_the_zero_matrix_and_a_negative_std_is_quoted():
    shape = SHAPES["aligned"]
    assert not matrix(gaussian(shape, std=0.0), shape).any()
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.5"):
        gaussian(shape, std=-0.5)


def test_the_std_scales_the_matrix_and_not_each_core():
    shape, factor = SHAPES["aligned"], 16.0
    narrow, wide = (gaussian(shape, std=s, generator=seeded(0)) for s in (1.0, factor))
    ratio = (matrix(wide, shape) / matrix(narrow, shape)).median().item()
    assert math.isclose(ratio, factor, rel_tol=1e-4)
