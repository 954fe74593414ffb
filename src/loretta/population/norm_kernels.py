"""Triton kernels of a layer norm with a weight and a bias for each member. Each pass reads the activations once.

The plain twin is in :class:`~loretta.population.members.MemberNorm`. Sums are taken in float32 and in a fixed order:
the programs of a member write their parts of a sum over rows side by side.

Axes: P members, B rows of one member, H width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS_OF_A_PART = 64  # that one program sums up
NUMBERS_AT_ONCE = 2048  # that one program holds


@triton.jit
def _norm(
    x, weight, bias, y, mean_out, scale_out, n_rows, width, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    member, column = tl.program_id(1), tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < n_rows)[:, None] & (column < width)[None, :]
    first = member.to(tl.int64) * n_rows
    at = (first + row)[:, None] * width + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / width
    centred = tl.where(inside, values - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    own = member * width + column
    w = tl.load(weight + own, mask=column < width, other=0.0).to(tl.float32)
    b = tl.load(bias + own, mask=column < width, other=0.0).to(tl.float32)
    result = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean_out + first + row, mean, mask=row < n_rows)
    tl.store(scale_out + first + row, scale, mask=row < n_rows)


@triton.jit
def _norm_back(
    g, x, weight, mean_in, scale_in, x_grad, weight_parts, bias_parts, n_rows, width, n_parts, tiles,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    part, member, column = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    first = member.to(tl.int64) * n_rows
    w = tl.load(weight + member * width + column, mask=column < width, other=0.0).to(tl.float32)
    of_weight, of_bias = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for tile in range(part * tiles, (part + 1) * tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < n_rows)[:, None] & (column < width)[None, :]
        at = (first + row)[:, None] * width + column[None, :]
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_in + first + row, mask=row < n_rows, other=0.0)
        scale = tl.load(scale_in + first + row, mask=row < n_rows, other=0.0)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
        normed = tl.where(inside, normed * scale[:, None], 0.0)
        of_weight += tl.sum(grad * normed, axis=0)
        of_bias += tl.sum(grad, axis=0)
        weighted = grad * w[None, :]
        along = tl.sum(weighted * normed, axis=1) / width
        level = tl.sum(weighted, axis=1) / width
        result = (weighted - normed * along[:, None] - level[:, None]) * scale[:, None]
        tl.store(x_grad + at, result.to(x_grad.dtype.element_ty), mask=inside)
    to = (member * n_parts + part).to(tl.int64) * width + column
    tl.store(weight_parts + to, of_weight, mask=column < width)
    tl.store(bias_parts + to, of_bias, mask=column < width)


class MemberLayerNorm(torch.autograd.Function):
    """(P, B, H) rows, (P, H) weights and biases -> (P, B, H) in ``dtype``. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x_PBH: Tensor, weight_PH: Tensor, bias_PH: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_PBH, weight_PH, bias_PH = x_PBH.contiguous(), weight_PH.contiguous(), bias_PH.contiguous()
        size, n_rows, width = x_PBH.shape
        y_PBH = x_PBH.new_empty(x_PBH.shape, dtype=dtype)
        mean, scale = (x_PBH.new_empty(size, n_rows, dtype=torch.float32) for _ in range(2))
        rows, columns = _block(width)
        _norm[(triton.cdiv(n_rows, rows), size)](
            x_PBH, weight_PH, bias_PH, y_PBH, mean, scale, n_rows, width, eps, ROWS=rows, WIDTH=columns, num_warps=4
        )
        ctx.save_for_backward(x_PBH, weight_PH, mean, scale)
        return y_PBH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PBH: Tensor) -> tuple[Tensor | None, ...]:
        x_PBH, weight_PH, mean, scale = ctx.saved_tensors
        size, n_rows, width = x_PBH.shape
        rows, columns = _block(width)
        parts = triton.cdiv(n_rows, ROWS_OF_A_PART)
        x_grad = torch.empty_like(x_PBH)
        sums = x_PBH.new_empty(2, size, parts, width, dtype=torch.float32)
        _norm_back[(parts, size)](
            grad_PBH.contiguous(), x_PBH, weight_PH, mean, scale, x_grad, *sums,
            n_rows, width, parts, ROWS_OF_A_PART // rows, ROWS=rows, WIDTH=columns, num_warps=4,
        )  # fmt: skip
        return x_grad, *sums.sum(2).to(weight_PH.dtype), None, None


def _block(width: int) -> tuple[int, int]:
    """Rows and columns that a program holds at once."""
    columns = triton.next_power_of_2(width)
    return max(1, min(16, NUMBERS_AT_ONCE // columns)), columns
