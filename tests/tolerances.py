"""The one tolerance table of the tests. An exception is a new row with its reason, never a branch in a test.

A whole model multiplies rounding, and by how much depends on its random numbers. In the gradients of the tiny models it
is at most 220 times over twelve seeds, because their updates are as large as their weights (``trained``) and their
attention is scaled (``build``). Compare in float64 where float32 is not what a test is about: its tolerance is 4,500
roundings, that of float32 84. Compare all rows of a batch at once: the two logits of one may both be nearly zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Relative Frobenius error. Measured for planned matrices of five and six cores: 0.8 % in bfloat16, 0.09 % in float16.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def assert_near(name: str, got: Tensor, ref: Tensor, *, terms: Tensor | None = None) -> None:
    """Fail unless ``got`` has the shape of ``ref`` and differs from it by rounding in the dtype of ``got``.

    ``terms`` is for sums of few numbers in low precision: the same sums over the magnitudes of their terms. Where terms
    cancel, the result is small and their rounding is not. A reference of zeros must be met exactly. NaN and infinity
    fail on either side.
    """
    size = ref if terms is None else terms
    _assert_within(name, got, ref, size.detach().double().norm(), RTOL[got.dtype])


def assert_gradients_near(got: Mapping[Any, Tensor], ref: Mapping[Any, Tensor], rtol: float | None = None) -> None:
    """As :func:`assert_near` for all gradients of one backward pass: each may err by rounding in the norm of them all.

    Some gradients are zero in exact arithmetic and rounding in every program: a key's bias cancels in the softmax. Of
    the size of what cancels there, its own norm says nothing; the other gradients of the same pass do. ``rtol`` stands
    in for the row of the table where both sides are of other precision than their dtype.
    """
    assert got.keys() == ref.keys()
    size = torch.stack([value.detach().double().norm() for value in ref.values()]).norm()
    for name, value in ref.items():
        _assert_within(f"gradient of {name}", got[name], value, size, rtol or RTOL[got[name].dtype])


def assert_as_near(name: str, got: Tensor, ref: Tensor, *, beside: tuple[Tensor, Tensor]) -> None:
    """As :func:`assert_near` for a whole model in low precision, which may also err twice as far as another one does.

    ``beside`` holds what that model gives, such as the same one without its adapter, and the reference of that.
    """
    others, others_ref = (value.detach().double() for value in beside)
    assert beside[0].dtype == got.dtype
    rtol = RTOL[got.dtype] + 2 * ((others - others_ref).norm() / others_ref.norm()).item()
    _assert_within(name, got, ref, ref.detach().double().norm(), rtol)


def _assert_within(name: str, got: Tensor, ref: Tensor, size: Tensor, rtol: float) -> None:
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(ref.shape)}"
    difference = (got.detach().double() - ref.detach().double()).norm()
    error = (difference / size).item()
    # `<=` so that NaN fails; the quotient is NaN for a zero reference
    assert difference == 0 or error <= rtol, f"{name}: relative error {error:.1e} for {got.dtype}"
