"""Putting matrices side by side and apart again, so that a compiler does either once and not once for each matrix."""

from typing import Any

import torch
from torch import Tensor

if not hasattr(torch.ops.loretta, "stack"):  # a reload of this module finds it defined
    _library = torch.library.Library("loretta", "DEF")
    _library.define("stack(Tensor[] parts) -> Tensor")
    _library.impl("stack", torch.stack, "CompositeExplicitAutograd")  # on every device, and for shapes alone


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


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        return torch.ops.loretta.stack(list(parts))  # one launch, where a compiler would copy each part by a kernel

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


class _Apart(torch.autograd.Function):
    """``unbind`` by strided views, whose own gradients would each be as large as the stack."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor) -> tuple[Tensor, ...]:
        size, step, first = stacked.shape[1:], stacked.stride(), stacked.storage_offset()
        return tuple(stacked.as_strided(size, step[1:], first + k * step[0]) for k in range(len(stacked)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.loretta.stack(list(grads))
