"""Taking a stack of matrices apart, so that a compiler computes it once and not once for each matrix."""

from typing import Any

import torch
from torch import Tensor


@torch.compiler.allow_in_graph
def apart(stacked: Tensor) -> tuple[Tensor, ...]:
    """The parts along the first dimension, in Dynamo's graphs. Strided views take them, since ``unbind`` costs more.

    A compiler fuses the computation of a stack into each part that ``unbind`` takes from it, so that every module costs
    a kernel. Before strided views it computes the stack once, in one kernel.
    """
    return _Apart.apply(stacked)


class _Apart(torch.autograd.Function):
    """``unbind`` by strided views, whose own gradients would each be as large as the stack."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor) -> tuple[Tensor, ...]:
        size, step, first = stacked.shape[1:], stacked.stride(), stacked.storage_offset()
        return tuple(stacked.as_strided(size, step[1:], first + k * step[0]) for k in range(len(stacked)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.stack(grads)
