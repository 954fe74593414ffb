"""Attention among few tokens as Triton kernels: one block holds all tokens of a row, or of several short rows.

Nothing of a block leaves the chip but its output and its gradients. What the softmax was is computed again in the
backward pass, dropout by its seed. The plain twin is :func:`torch.nn.functional.scaled_dot_product_attention`.

Axes: B rows, H heads, T tokens, D width of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEAST = 64  # tokens of a block, from one row or from several
# of which each value that divides by 16, or is 1, would be compiled for itself
_ANY = ["call", "mask_row", "mask_query", "rows_at_once", "n_rows", "n_tokens"]


@triton.jit
def _places(rows_at_once, n_rows, n_tokens, BLOCK: tl.constexpr):
    """The row and the token of each line of a block, and whether there is one; a block has rows of one member."""
    line, blocks = tl.arange(0, BLOCK), tl.cdiv(n_rows, rows_at_once)
    row = tl.program_id(0) % blocks * rows_at_once + line // n_tokens
    inside = (line < rows_at_once * n_tokens) & (row < n_rows)
    return tl.program_id(0) // blocks * n_rows + row, line % n_tokens, inside


@triton.jit
def _softmax(
    q, k, mask, row, token, inside, mask_row, mask_query, mask_key, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) float32: how much each line takes of each other line; of lines that are none it is anything."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    open_to = (row[:, None] == row[None, :]) & inside[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * mask_row + token[:, None] * mask_query + token[None, :] * mask_key
    seen = open_to & (tl.load(mask + at, mask=open_to, other=0) != 0)
    scores = tl.where(seen, scores, -float("inf"))
    highest = tl.max(scores, axis=1)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    powers = tl.exp(scores - highest[:, None])
    total = tl.sum(powers, axis=1)
    return powers / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _kept(seed, call, dropout, n_heads, BLOCK: tl.constexpr):
    """(BLOCK, BLOCK): the factors of dropout, the same in both passes."""
    line = tl.arange(0, BLOCK)
    block = tl.program_id(0) * n_heads + tl.program_id(1)
    at = (block * BLOCK + line)[:, None] * BLOCK + line[None, :]
    drawn = tl.rand(tl.load(seed) + call, at)
    return tl.where(drawn >= dropout, 1 / (1 - dropout), 0.0)


@triton.jit(do_not_specialize=_ANY)
def _attend(
    q_in, k_in, v_in, mask, out, seed, call,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, o_row, o_head, o_token,
    mask_row, mask_query, mask_key, scale, dropout, rows_at_once, n_rows, n_heads, n_tokens, width,
    DROPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, column = tl.program_id(1), tl.arange(0, WIDTH)
    row, token, inside = _places(rows_at_once, n_rows, n_tokens, BLOCK)
    there = inside[:, None] & (column < width)[None, :]
    far = row.to(tl.int64)
    q = tl.load(
        q_in + (far * q_row + head * q_head + token * q_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    k = tl.load(
        k_in + (far * k_row + head * k_head + token * k_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    v = tl.load(
        v_in + (far * v_row + head * v_head + token * v_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    shares = _softmax(q, k, mask, row, token, inside, mask_row, mask_query, mask_key, scale, PRECISION)
    if DROPS:
        shares *= _kept(seed, call, dropout, n_heads, BLOCK)
    result = tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
    to = out + (far * o_row + head * o_head + token * o_token)[:, None] + column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_ANY)
def _attend_back(
    q_in, k_in, v_in, mask, g_in, q_grad, k_grad, v_grad, seed, call,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    o_row, o_head, o_token,
    mask_row, mask_query, mask_key, scale, dropout, rows_at_once, n_rows, n_heads, n_tokens, width,
    DROPS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, column = tl.program_id(1), tl.arange(0, WIDTH)
    row, token, inside = _places(rows_at_once, n_rows, n_tokens, BLOCK)
    there = inside[:, None] & (column < width)[None, :]
    far = row.to(tl.int64)
    q = tl.load(
        q_in + (far * q_row + head * q_head + token * q_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    k = tl.load(
        k_in + (far * k_row + head * k_head + token * k_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    v = tl.load(
        v_in + (far * v_row + head * v_head + token * v_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    g = tl.load(
        g_in + (far * g_row + head * g_head + token * g_token)[:, None] + column[None, :], mask=there, other=0.0
    )
    shares = _softmax(q, k, mask, row, token, inside, mask_row, mask_query, mask_key, scale, PRECISION)
    of_shares = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    used = shares
    if DROPS:
        kept = _kept(seed, call, dropout, n_heads, BLOCK)
        used *= kept
        of_shares *= kept
    to = (far * o_row + head * o_head + token * o_token)[:, None] + column[None, :]
    of_v = tl.dot(tl.trans(used.to(g.dtype)), g, input_precision=PRECISION)
    tl.store(v_grad + to, of_v.to(v_grad.dtype.element_ty), mask=there)
    of_scores = shares * (of_shares - tl.sum(shares * of_shares, axis=1)[:, None]) * scale
    of_scores = of_scores.to(q.dtype)
    of_q = tl.dot(of_scores, k, input_precision=PRECISION)
    tl.store(q_grad + to, of_q.to(q_grad.dtype.element_ty), mask=there)
    of_k = tl.dot(tl.trans(of_scores), q, input_precision=PRECISION)
    tl.store(k_grad + to, of_k.to(k_grad.dtype.element_ty), mask=there)


class ShortAttention(torch.autograd.Function):
    """Attention of rows whose tokens fit into one block. Once differentiable.

    Args:
        q, k, v: (B, H, T, D) of one shape, the numbers of a token adjacent.
        mask: bool, expandable to (B, 1, T, T): what each token sees.
        scale: of the scores before the softmax.
        dropout: of the shares behind it.
        seed: (1) on the device, where there is dropout.
        call: added to the seed, so that one serves several layers.
        members: of whom each has an equal share of the rows. What is not finite in one stays there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        call: int,
        members: int,
    ) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        # tokens before heads in memory, as the layer behind it has them
        out = q.new_empty(_tokens_first(q)).transpose(1, 2)
        grid, numbers, constants = _launch(q, mask, members, scale, dropout)
        strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
        _attend[grid](q, k, v, mask, out, seed, call, *strides, *numbers, **constants)
        ctx.save_for_backward(q, k, v, mask, seed)
        ctx.options = call, (members, scale, dropout)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, seed = ctx.saved_tensors
        call, options = ctx.options
        g = g if g.stride(-1) == 1 else g.contiguous()
        grads = [q.new_empty(_tokens_first(q)).transpose(1, 2) for _ in range(3)]
        grid, numbers, constants = _launch(q, mask, *options)
        strides = [stride for x in (q, k, v, g, grads[0]) for stride in x.stride()[:3]]
        _attend_back[grid](q, k, v, mask, g, *grads, seed, call, *strides, *numbers, **constants)
        return *grads, None, None, None, None, None, None


def _tokens_first(x: Tensor) -> tuple[int, ...]:
    n_rows, n_heads, n_tokens, width = x.shape
    return n_rows, n_tokens, n_heads, width


def _launch(
    q: Tensor, mask: Tensor, members: int, scale: float, dropout: float
) -> tuple[tuple[int, int], tuple[Any, ...], Any]:
    n_rows, n_heads, n_tokens, width = q.shape
    of_member = n_rows // members
    at_once = max(1, min(of_member, _LEAST // n_tokens))
    block = triton.next_power_of_2(max(16, at_once * n_tokens))
    mask_strides = (mask.stride(0), mask.stride(2), mask.stride(3))
    numbers = (*mask_strides, scale, dropout, at_once, of_member, n_heads, n_tokens, width)
    constants = {
        "DROPS": dropout > 0,
        "BLOCK": block,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "PRECISION": "ieee" if q.dtype is torch.float32 else "tf32",
        "num_warps": 4 if block <= 64 else 8,
    }
    return (members * triton.cdiv(of_member, at_once), n_heads), numbers, constants
