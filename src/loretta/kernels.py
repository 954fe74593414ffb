"""Steps of the two layers as single autograd functions, for GPUs: fewer passes over memory, and work side by side.

The plain twins are :func:`loretta.layers.add_update` after a linear layer, and the products of the adp layer. What is
gained here is order: the update of a gradient is written into it in place, and while a CUDA graph is captured the thin
products run on a second stream beside the base layer's large one, which at small batches leaves most of the GPU idle.

Axes: B rows, I input features, O output features, H width, C and D inner sizes, R rank of the update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# From here on the passes saved outweigh what an autograd function in Python costs to launch (H200, 4096 wide)
MANY_ROWS = 2048


def is_capturing(x: Tensor) -> bool:
    """Whether what is done with ``x`` now becomes part of a CUDA graph."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def pays(x_BI: Tensor) -> bool:
    """Whether these functions beat their plain twins on ``x``: in a CUDA graph, or with many rows on a GPU."""
    if not x_BI.is_cuda or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    return torch.is_grad_enabled() and (x_BI.shape[0] >= MANY_ROWS or torch.cuda.is_current_stream_capturing())


class LinearWithUpdate(torch.autograd.Function):
    """``x W^T + bias + (x A) B`` with a frozen W and bias.

    ``apply(x (B, I), W (O, I), bias (O) or None, A (I, R), B (R, O))``. Once differentiable, with respect to x, A, B.
    """

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_IR: Tensor, b_RO: Tensor) -> Tensor:
        ctx.beside = is_capturing(x_BI)
        with _beside(ctx.beside):
            h_BR = x_BI @ a_IR
        y_BO = linear(x_BI, weight_OI, bias_O)
        _join(ctx.beside)
        ctx.save_for_backward(x_BI, weight_OI, a_IR, b_RO, h_BR)
        return y_BO.addmm_(h_BR, b_RO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI, a_IR, b_RO, h_BR = ctx.saved_tensors
        with _beside(ctx.beside):
            grad_h_BR = grad_BO @ b_RO.T
            ready = _mark(ctx.beside)
            grad_b_RO = h_BR.T @ grad_BO
            grad_a_IR = x_BI.T @ grad_h_BR
        grad_x_BI = None
        if ctx.needs_input_grad[0]:
            grad_x_BI = grad_BO @ weight_OI
            if ready is not None:
                ready.wait()
            grad_x_BI.addmm_(grad_h_BR, a_IR.T)
        _join(ctx.beside)
        return grad_x_BI, None, None, grad_a_IR, grad_b_RO


class AddBottleneck(torch.autograd.Function):
    """``y + inner(y L) U``, ``inner`` any small function of (B, C) and further parameters, to (B, D).

    ``apply(inner, y (B, H), one (C) or None, L (H, C), U (D, H), *parameters)``; ``one`` is added to ``y L``. Once
    differentiable, with respect to y, L, U and the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inner: Callable[..., Tensor],
        y_BH: Tensor,
        one_C: Tensor | None,
        left_HC: Tensor,
        up_DH: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.beside = is_capturing(y_BH)
        h_BC = y_BH @ left_HC if one_C is None else torch.addmm(one_C, y_BH, left_HC)
        with torch.enable_grad():  # a small graph of its own, walked in the backward pass
            ctx.leaves = [h_BC.detach().requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
            ctx.inner_BD = inner(*ctx.leaves)
        ctx.save_for_backward(y_BH, left_HC, up_DH)
        return torch.addmm(y_BH, ctx.inner_BD.detach(), up_DH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor) -> tuple[Tensor | None, ...]:
        y_BH, left_HC, up_DH = ctx.saved_tensors
        with _beside(ctx.beside):
            grad_up_DH = ctx.inner_BD.detach().T @ grad_BH
        grad_h_BC, *grads = torch.autograd.grad(ctx.inner_BD, ctx.leaves, grad_BH @ up_DH.T)
        with _beside(ctx.beside):
            grad_left_HC = y_BH.T @ grad_h_BC
        grad_y_BH = torch.addmm(grad_BH, grad_h_BC, left_HC.T)
        _join(ctx.beside)
        return None, grad_y_BH, None, grad_left_HC, grad_up_DH, *grads


@contextmanager
def _beside(wanted: bool) -> Iterator[None]:
    """Run what follows on the second stream, after all that was launched so far."""
    if not wanted:
        yield
        return
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


def _mark(wanted: bool) -> torch.cuda.Event | None:
    return torch.cuda.current_stream().record_event() if wanted else None


def _join(wanted: bool) -> None:
    """Have the current stream wait for the second one; memory can then be handed back and forth."""
    if wanted:
        torch.cuda.current_stream().wait_stream(_side_stream(torch.cuda.current_device()))


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
