"""Gather the cores that FSDP2 has sharded, with one collective for the whole model.

FSDP gathers the weights of a block when the block runs, and the trains of one block are too few to be contracted
together. So the joint contraction gathers all shards itself when the model is called. In the backward pass one
collective sums the gradients and leaves each process its shard, averaged as FSDP averages.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether each process of a mesh holds some rows of ``tensor``, on the device that computes."""
    return (
        isinstance(tensor, DTensor)
        and tensor.placements == (Shard(0),)
        and tensor.device.type == tensor.device_mesh.device_type
    )


def whole_stacks(columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sharded tensors of each column, gathered and stacked: (M, ...). Those of a column have one shape."""
    alike: dict[tuple[DeviceMesh, torch.dtype], list[int]] = defaultdict(list)
    for k, column in enumerate(columns):
        first = column[0]
        assert isinstance(first, DTensor)
        alike[first.device_mesh, first.dtype].append(k)
    found: dict[int, Tensor] = {}
    for (mesh, _), own in alike.items():
        stacks = _Whole.apply(mesh, [len(columns[k]) for k in own], *(t for k in own for t in columns[k]))
        found.update(zip(own, stacks, strict=True))
    return [found[k] for k in range(len(columns))]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, counts: Sequence[int], *tensors: DTensor) -> tuple[Tensor, ...]:
        world = mesh.size()
        left = iter(tensors)
        ctx.columns = columns = [[next(left) for _ in range(count)] for count in counts]
        ctx.mesh = mesh
        flat = torch.cat([_padded(torch.stack([t.to_local() for t in c]), _rows(c, world)).flatten() for c in columns])
        gathered = flat.new_empty(world, len(flat))
        dist.all_gather(list(gathered), flat, group=mesh.get_group())
        whole = []
        for column, part in zip(columns, gathered.split([_size(c, world) for c in columns], dim=1), strict=True):
            rows_WMr = part.unflatten(1, (len(column), _rows(column, world), *column[0].shape[1:]))
            stack_Mn = rows_WMr.transpose(0, 1).flatten(1, 2)[:, : len(column[0])]
            whole.append(stack_Mn.clone())  # each a tensor of its own
        return tuple(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mesh, columns = ctx.mesh, ctx.columns
        world, parts = mesh.size(), []
        for column, grad_Mn in zip(columns, grads, strict=True):
            rows_MWr = _padded(grad_Mn, world * _rows(column, world)).unflatten(1, (world, -1))
            parts.append(rows_MWr.transpose(0, 1).flatten(1))
        summed = torch.cat(parts, dim=1)
        dist.all_reduce(summed, group=mesh.get_group())
        own = summed[mesh.get_local_rank()] / world
        found: list[Tensor] = []
        for column, part in zip(columns, own.split([_size(c, world) for c in columns]), strict=True):
            first = column[0]
            here = part.unflatten(0, (len(column), _rows(column, world), *first.shape[1:]))
            local = here[:, : len(first.to_local())]
            shape, stride = torch.Size((len(column), *first.shape)), (first.numel(), *first.stride())
            stack_Mn = DTensor.from_local(local, mesh, (Shard(1),), run_check=False, shape=shape, stride=stride)
            found += stack_Mn.unbind()  # each alone would be wrapped by some fifty Python calls
        return None, None, *found


def _rows(column: Sequence[Tensor], world: int) -> int:
    """How many rows a process has; the last processes may have fewer."""
    return math.ceil(len(column[0]) / world)


def _size(column: Sequence[Tensor], world: int) -> int:
    return len(column) * _rows(column, world) * math.prod(column[0].shape[1:])


def _padded(stack: Tensor, rows: int) -> Tensor:
    """``stack`` (M, n, ...) padded with zeros to (M, rows, ...)."""
    return pad(stack, (*(0, 0) * (stack.dim() - 2), 0, rows - stack.shape[1]))
