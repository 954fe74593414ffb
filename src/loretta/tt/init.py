"""Starting cores with promised statistics."""

import math

import torch
from torch import Tensor

from loretta.tt.shape import TTShape


def core_std(shape: TTShape, std: float) -> float:
    """Standard deviation of each Gaussian core entry, so that the contracted matrix has standard deviation ``std``."""
    # sqrt: each entry of the matrix sums prod(ranks) independent products, and variances add
    return (std / math.sqrt(math.prod(shape.ranks))) ** (1 / len(shape.modes))


def gaussian(
    shape: TTShape,
    *,
    std: float,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Gaussian cores whose *contracted* matrix has entries of mean 0 and standard deviation ``std``.

    Raises ValueError for a negative ``std``.
    """
    if std < 0:
        raise ValueError(f"a standard deviation must not be negative, got {std}")
    scale = core_std(shape, std)
    return [scale * torch.randn(*core, generator=generator, dtype=dtype, device=device) for core in shape.cores]
