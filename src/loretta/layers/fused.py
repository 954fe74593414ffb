"""The two layers as single autograd functions over Triton kernels, for half precision on NVIDIA and AMD GPUs.

A layer of any method multiplies a wide matrix of activations by thin ones. Each plain product reads the activations
once more, and small batches wait for one product after the other. The kernels read the activations once forward and
once backward, and add to the output and to the gradient in place. Where :func:`pays` says no, the layers use the plain
twins.

Axes: B rows, I input features, O output features, H width, C and D inner sizes, R rank of the update, b bottleneck.
"""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, relu

if TYPE_CHECKING:
    from types import ModuleType

# Below this size an eager step waits for the CPU, and a Triton launch takes more CPU time than a plain product (H200)
MANY_NUMBERS = 2**24
HALF = (torch.bfloat16, torch.float16)


def pays(x_BI: Tensor) -> bool:
    """Whether the fused functions beat their plain twins on ``x``: on a GPU, if captured, or large and trained."""
    if not x_BI.is_cuda or torch.compiler.is_compiling() or x_BI.dtype not in HALF:
        return False
    large = torch.is_grad_enabled() and x_BI.numel() >= MANY_NUMBERS
    return (large or in_graph()) and not torch.is_autocast_enabled("cuda") and has_triton()


def one_matrix_pays(like: Tensor, dtype: torch.dtype) -> bool:
    """Whether a bottleneck takes each of its trains as the one matrix that the train spells.

    That leaves two products of four forward, and five of eight backward. They do more arithmetic: an eager GPU, which
    waits for launches, has time for it, and a CPU has not; in recorded graphs the kernels here are faster.

    Args:
        dtype: of the activations.
    """
    if not like.is_cuda or torch.compiler.is_compiling() or not in_graph():
        return like.is_cuda
    return not torch.is_grad_enabled() and (dtype not in HALF or torch.is_autocast_enabled("cuda"))


def in_graph() -> bool:
    """Whether a step is recorded as a CUDA graph, or warmed up for it: that is done on a stream of its own."""
    return torch.cuda.is_initialized() and torch.cuda.current_stream().cuda_stream != 0 and not _thread.eager


class _Thread(threading.local):
    eager = False


_thread = _Thread()


@contextmanager
def for_eager_steps() -> Iterator[None]:
    """What is recorded within this block is no step, but a part of eager ones."""
    before, _thread.eager = _thread.eager, True
    try:
        yield
    finally:
        _thread.eager = before


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def linear_with_update(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_IR: Tensor, b_RO: Tensor) -> Tensor:
    """``x W^T + bias + (x A) B``: the plain twin of :class:`LinearWithUpdate`."""
    return torch.addmm(linear(x_BI, weight_OI, bias_O), x_BI @ a_IR, b_RO)


def add_bottleneck(
    y_BH: Tensor, one_C: Tensor, left_HC: Tensor, mid_Cb: Tensor, one_D: Tensor, mid_bD: Tensor, up_DH: Tensor
) -> Tensor:
    """``y + (relu((y L + one) M) N + one) U``: the plain twin of :class:`AddBottleneck`."""
    hidden_Bb = relu(torch.addmm(one_C, y_BH, left_HC) @ mid_Cb)
    return torch.addmm(y_BH, torch.addmm(one_D, hidden_Bb, mid_bD), up_DH)


class LinearWithUpdate(torch.autograd.Function):
    """:func:`linear_with_update` with a frozen W and bias. Once differentiable, with respect to x, A and B."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_IR: Tensor, b_RO: Tensor) -> Tensor:
        x_BI, a_IR, b_RO = _rows(x_BI), a_IR.contiguous(), b_RO.contiguous()
        y_BO = linear(x_BI, weight_OI, bias_O)
        h_BR = _triton().add_update(x_BI, a_IR, b_RO, y_BO)
        ctx.save_for_backward(x_BI, weight_OI, a_IR, b_RO, h_BR)
        return y_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI, a_IR, b_RO, h_BR = ctx.saved_tensors
        grad_BO, kernels = _rows(grad_BO), _triton()
        parts, grad_b_RO = kernels.grad_of_right(grad_BO, b_RO, h_BR)
        grad_h_BR = kernels.sum_parts(parts, h_BR.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, x_BI.T @ grad_h_BR[:, : len(b_RO)], grad_b_RO
        grad_x_BI = grad_BO @ weight_OI
        grad_a_IR = kernels.grad_of_left(x_BI, a_IR, grad_h_BR, grad_x_BI, grad_x_BI)
        return grad_x_BI, None, None, grad_a_IR, grad_b_RO


class AddBottleneck(torch.autograd.Function):
    """:func:`add_bottleneck`. Once differentiable, with respect to y, L, M, N and U."""

    @staticmethod
    def forward(ctx: Any, y_BH: Tensor, *factors: Tensor) -> Tensor:
        y_BH = _rows(y_BH)
        factors = tuple(factor.contiguous() for factor in factors)
        out_BH, t_BC, u_BD = _triton().add_bottleneck(y_BH, factors)
        _, left_HC, mid_Cb, _, mid_bD, up_DH = factors
        ctx.save_for_backward(y_BH, left_HC, mid_Cb, mid_bD, up_DH, t_BC, u_BD)
        return out_BH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor) -> tuple[Tensor | None, ...]:
        y_BH, left_HC, mid_Cb, mid_bD, up_DH, t_BC, u_BD = ctx.saved_tensors
        grad_BH, kernels = _rows(grad_BH), _triton()
        parts, grad_up_DH = kernels.grad_of_right(grad_BH, up_DH, u_BD)
        grad_t_BC, grad_mid_Cb, grad_mid_bD = kernels.grad_of_middle(parts, t_BC, mid_Cb, mid_bD)
        grad_y_BH = torch.empty_like(y_BH)
        grad_left_HC = kernels.grad_of_left(y_BH, left_HC, grad_t_BC, grad_BH, grad_y_BH)
        return grad_y_BH, None, grad_left_HC, grad_mid_Cb, None, grad_mid_bD, grad_up_DH


def _rows(x: Tensor) -> Tensor:
    """``x`` with the numbers of each row adjacent: the kernels ask for nothing else."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _triton() -> "ModuleType":
    from loretta.layers import triton_kernels

    return triton_kernels
