"""Random trains of awkward sizes, and the definition of a tensor train as an oracle.

Axes: I input features, O output features, R/S neighbouring ranks, n one mode.
"""

import math
from dataclasses import replace

import pytest
import torch
from draws import seeded
from hypothesis import assume
from hypothesis import strategies as st
from tolerances import RTOL, assert_gradients_near
from torch import Tensor

from loretta.tt import TTShape, plan_shape

seeds = st.integers(0, 2**31 - 1)

# One shape of every kind, for tests that have dtypes or draws to go through as well.
SHAPES = {
    "aligned": plan_shape(24, 10, rank=3, modes=(4, 6, 5, 2)),
    "paper": plan_shape(768, 64, rank=5),
    "straddling, folded right": plan_shape(8, 30, rank=2, modes=(4, 6, 2, 5)),
    "straddling, folded left": plan_shape(12, 14, rank=4, modes=(3, 8, 7)),
    "straddling first core": plan_shape(2, 21, rank=3, modes=(6, 7)),
    "straddling last core": plan_shape(6, 4, rank=3, modes=(3, 8)),
    "one core": plan_shape(5, 7, rank=3, modes=(35,)),
    "one row": plan_shape(1, 12, rank=3, modes=(3, 4)),
    "one column": plan_shape(12, 1, rank=3, modes=(3, 4)),
    "padded": plan_shape(67, 131, rank=3),
    "padded and straddling": TTShape(
        in_features=11, out_features=13, modes=(2, 12, 7), ranks=(1, 2, 5, 1), n_in=1, split=6
    ),
    "ranks past what the modes carry": plan_shape(6, 4, rank=9, modes=(2, 3, 2, 2)),
    "modes of 1": plan_shape(6, 6, rank=2, modes=(1, 6, 1, 6, 1)),
}


@st.composite
def shapes(draw: st.DrawFn, *, padded: bool = True, max_rank: int = 9) -> TTShape:
    """Up to five cores, with sizes of 1 and primes, ranks of their own, and any boundary between or inside cores."""
    size = st.sampled_from([1, 2, 3, 4, 5, 7])
    in_modes, out_modes = draw(st.lists(size, max_size=2)), draw(st.lists(size, max_size=2))
    split, beside = draw(st.sampled_from([(1, 0), (1, 0), (2, 1), (2, 3), (3, 2), (5, 4)]))
    middle = [split * beside] if beside else []
    modes = (*in_modes, *middle, *out_modes)
    assume(modes and math.prod(modes) <= 3000)
    padded_in = math.prod(in_modes) * split
    padded_out = math.prod(modes) // padded_in
    rank = st.integers(1, max_rank)
    return TTShape(
        in_features=padded_in - draw(st.integers(0, min(2, padded_in - 1) if padded else 0)),
        out_features=padded_out - draw(st.integers(0, min(2, padded_out - 1) if padded else 0)),
        modes=modes,
        ranks=(1, *(draw(rank) for _ in modes[1:]), 1),
        n_in=len(in_modes),
        split=split,
    )


def randn(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=seeded(seed), dtype=torch.float64).to(dtype)


def random_cores(shape: TTShape, *, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Cores of leaves that want gradients."""
    generator = seeded(seed)
    cores = [torch.randn(*core, generator=generator, dtype=torch.float64).to(dtype) for core in shape.cores]
    return [core.requires_grad_() for core in cores]


def oracle(cores: list[Tensor], shape: TTShape) -> Tensor:
    """The (I, O) matrix of a train entry by entry in float64, each a product of one slice per core (paper, eq. 1)."""
    in_parts, out_parts = list(shape.modes[: shape.n_in]), list(shape.modes[shape.n_in :])
    if not shape.aligned:
        in_parts, out_parts[0] = [*in_parts, shape.split], out_parts[0] // shape.split
    rows_I1 = torch.arange(shape.in_features)[:, None]
    columns_1O = torch.arange(shape.out_features)[None, :]
    digits = _digits(rows_I1, in_parts) + _digits(columns_1O, out_parts)
    if not shape.aligned:
        digits[shape.n_in : shape.n_in + 2] = [digits[shape.n_in] * out_parts[0] + digits[shape.n_in + 1]]
    product_IORS = torch.ones(shape.in_features, shape.out_features, 1, 1, dtype=torch.float64)
    for core_RnS, digit in zip(cores, digits, strict=True):
        slice_IORS = core_RnS.double()[:, digit.expand(shape.in_features, shape.out_features), :].permute(1, 2, 0, 3)
        product_IORS = product_IORS @ slice_IORS
    return product_IORS[..., 0, 0]


def _digits(index: Tensor, parts: list[int]) -> list[Tensor]:
    """Row-major digits: the last part runs fastest."""
    digits = []
    for part in reversed(parts):
        digits.insert(0, index % part)
        index = index // part
    return digits


def frozen(cores: list[Tensor]) -> list[Tensor]:
    return [core.detach() for core in cores]


def assert_same_gradients(got, ref, wanted):
    """Compare d(sum(weights * y)) for fixed random weights. The reference is float64, ``got`` in any dtype."""
    weights = randn(*ref.shape, seed=7)
    got_grads = torch.autograd.grad((got * weights.to(got.dtype)).sum(), wanted)
    ref_grads = torch.autograd.grad((ref * weights).sum(), wanted, retain_graph=True)
    assert_gradients_near(dict(enumerate(got_grads)), dict(enumerate(ref_grads)))


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


every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


every_dtype = pytest.mark.parametrize("dtype", RTOL)


def einsum(cores):
    """The full tensor in one call of torch.einsum."""
    operands = []
    for k, core in enumerate(cores):  # labels: ranks are even, modes odd
        operands += [core.double(), [2 * k, 2 * k + 1, 2 * k + 2]]
    full = torch.einsum(*operands, [0, *range(1, 2 * len(cores), 2), 2 * len(cores)])
    return full[0, ..., 0]
