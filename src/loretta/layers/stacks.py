"""Taking a stack of matrices apart, so that a compiler computes it once and not once for each matrix."""

from typing import Any

import torch
from torch import Tensor


@torch.compiler.allow_in_graph
def apart(stacked: Tensor) -> tuple[Tensor, ...]:
    """The parts along the first dimension, for Dynamo's graphs, where ``unbind`` would do more work.

    A compiler fuses what made the stack into each part that is taken from it: a kernel for each module, where one
    for all of them would do. Before strided views it computes the whole stack.
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
