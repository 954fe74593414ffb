"""What Dynamo's graphs do in fewer launches than a compiler makes of the plain operations.

Putting matrices side by side and apart again is done once, and not once for each matrix. Each half of a bottleneck is
one product with all that surrounds it.

Axes: B rows, I input features, b bottleneck.
"""

from typing import Any

import torch
from torch import Tensor

if not hasattr(torch.ops.loretta, "stack"):  # a reload of this module finds it defined
    _library = torch.library.Library("loretta", "DEF")
    _library.define("stack(Tensor[] parts, Tensor? like=None) -> Tensor")
    # on every device, and for shapes alone
    _library.impl("stack", lambda parts, like=None: torch.stack(parts), "CompositeExplicitAutograd")


@torch.compiler.allow_in_graph
def together(*parts: Tensor) -> Tensor:
    """``parts`` along a new first dimension, for Dynamo's graphs, where ``torch.stack`` would be a kernel for each."""
    return _Together.apply(*parts)


@torch.compiler.allow_in_graph
def apart(stacked: Tensor) -> tuple[Tensor, ...]:
    """The parts along the first dimension, in Dynamo's graphs. Strided views take them, since ``unbind`` costs more.

    A compiler fuses the computation of a stack into each part that ``unbind`` takes from it, so that every module costs
    a kernel. Before strided views it computes the stack once, in one kernel.
    """
    return _Apart.apply(stacked)


@torch.compiler.allow_in_graph
def bottleneck_of(rows_BI: Tensor, down_bI: Tensor, bias_b: Tensor) -> Tensor:
    """``relu(x D^T + bias)``, for Dynamo's graphs. On a GPU it is one launch, and the gradient of the bias another."""
    return _Bottleneck.apply(rows_BI, down_bI, bias_b)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        return torch.ops.loretta.stack(list(parts))  # one launch, where a compiler would copy each part by a kernel

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


class _Apart(torch.autograd.Function):
    """``unbind`` by strided views, whose own gradients would each be as large as the stack.

    The backward pass names the stack, which it does not need. So a compiler hands that on from the forward pass, one
    tensor, and takes the views again; otherwise it would hand on each of them.
    """

    @staticmethod
    def forward(ctx: Any, stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(stacked)
        size, step, first = stacked.shape[1:], stacked.stride(), stacked.storage_offset()
        return tuple(stacked.as_strided(size, step[1:], first + k * step[0]) for k in range(len(stacked)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.loretta.stack(list(grads), *ctx.saved_tensors)


class _Bottleneck(torch.autograd.Function):
    """A compiler would launch the ReLU and the sum over the rows as kernels of their own: one and two."""

    @staticmethod
    def forward(ctx: Any, rows_BI: Tensor, down_bI: Tensor, bias_b: Tensor) -> Tensor:
        hidden_Bb = torch._addmm_activation(bias_b, rows_BI, down_bI.mT)
        ctx.save_for_backward(rows_BI, down_bI, hidden_Bb)
        return hidden_Bb

    @staticmethod
    def backward(ctx: Any, grad_Bb: Tensor) -> tuple[Tensor, ...]:
        rows_BI, down_bI, hidden_Bb = ctx.saved_tensors
        grad_Bb = torch.ops.aten.threshold_backward(grad_Bb, hidden_Bb, 0)
        grad_b = (grad_Bb.new_ones(1, len(grad_Bb)) @ grad_Bb)[0]
        return grad_Bb @ down_bI, grad_Bb.mT @ rows_BI, grad_b
