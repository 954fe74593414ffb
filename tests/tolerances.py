"""The one tolerance table of the tests. An exception is a new row with its reason, never a branch in a test."""

import torch
from torch import Tensor

# Relative Frobenius error. Measured for planned matrices of five and six cores: 0.8 % in bfloat16, 0.09 % in float16.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def assert_near(name: str, got: Tensor, ref: Tensor) -> None:
    """Fail unless ``got`` has the shape of ``ref`` and differs from it by rounding in the dtype of ``got``.

    A reference of zeros must be met exactly. NaN and infinity fail on either side.
    """
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(ref.shape)}"
    difference, size = (got.detach().double() - ref.detach().double()).norm(), ref.detach().double().norm()
    error = (difference / size).item()
    # `<=` so that NaN fails; the quotient is NaN for a zero reference
    assert difference == 0 or error <= RTOL[got.dtype], f"{name}: relative error {error:.1e} for {got.dtype}"
