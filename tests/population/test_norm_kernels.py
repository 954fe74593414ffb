"""The norm of all members as a kernel against its plain twin in float64. Without a GPU Triton interprets it."""

import math

import pytest
import torch
from draws import seeded
from tolerances import assert_near
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from interpreted import patch_once

from loretta.population.norm_kernels import MemberLayerNorm

patch_once()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(x_PBH, weight_PH, bias_PH):
    normed = torch.nn.functional.layer_norm(x_PBH, x_PBH.shape[-1:], eps=1e-5)
    return normed * weight_PH[:, None] + bias_PH[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
# members, rows, width: less than a block, and several parts of the sums over rows
@pytest.mark.parametrize("sizes", [(1, 3, 7), (3, 70, 40), (2, 131, 384)])
def test_the_norm_of_all_members_and_its_gradients(sizes, dtype, monkeypatch):
    """Each member has weights of its own; new memory is full of NaN, which spoils what is not written."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(math.nan))
    size, _, width = sizes
    draw = seeded(sum(sizes))
    x = (3 + 2 * torch.randn(sizes, generator=draw)).to(DEVICE, dtype)
    weight, bias, gradient = (
        torch.randn(shape, generator=draw).to(DEVICE) for shape in ((size, width), (size, width), sizes)
    )
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, expected = MemberLayerNorm.apply(*inputs, 1e-5, torch.float32), plain(*exact)
    found = [got, *torch.autograd.grad(got, inputs, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for name, one, other in zip(("y", "x", "weight", "bias"), found, wanted, strict=True):
        assert_near(name, one, other)
