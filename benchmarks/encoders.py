"""MPNet with positions that stay on the GPU, so that its steps can be recorded as CUDA graphs."""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder


@cache
def _buckets(length: int, count: int, device: torch.device) -> Tensor:
    """(length, length): which of the relative distances stands between two positions; made once on each device."""
    at = torch.arange(length)
    return MPNetEncoder.relative_position_bucket(at[None] - at[:, None], num_buckets=count).to(device)


def _position_bias(encoder: Any, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
    """(1, heads, tokens, tokens), added to the scores of every row alike."""
    assert position_ids is None
    values = encoder.relative_attention_bias(_buckets(x.shape[1], num_buckets, x.device))
    return values.permute(2, 0, 1)[None]


@contextlib.contextmanager
def graphable() -> Iterator[None]:
    """transformers copies the distances from the CPU in every step, which a recorded step may not."""
    with mock.patch.object(MPNetEncoder, "compute_position_bias", _position_bias):
        yield
