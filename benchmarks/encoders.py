"""How models of the evidence compute on a GPU: MPNet so that its steps can be recorded, populations plainly."""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from loretta.population import members
from loretta.population.population import Population


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


def _eager_mask(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """What is added to attention scores: 0, or the lowest number for what is not to be seen."""
    mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@contextlib.contextmanager
def graphable() -> Iterator[None]:
    """transformers up to 5.17 copies the distances, and the zero of a mask, from the CPU: a recorded step may not."""
    with mock.patch.object(MPNetEncoder, "compute_position_bias", _position_bias):
        ALL_MASK_ATTENTION_FUNCTIONS["eager"] = _eager_mask
        try:
            yield
        finally:
            del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


@contextlib.contextmanager
def plain_functions() -> Iterator[None]:
    """Populations compute by torch's own functions, as those of earlier rows did."""
    norms = mock.patch.object(members, "has_triton", return_value=False)
    with norms, mock.patch.object(Population, "modes_on_gpu", ()):
        yield
