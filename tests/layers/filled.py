"""Layers of trains with random cores."""

import torch
from torch import nn
from tt.trains import randn, random_cores

from loretta.layers.trains import Cores, TTLinear
from loretta.tt import TTShape


def filled_cores(shape: TTShape, *, seed: int, dtype: torch.dtype = torch.float64) -> Cores:
    cores = Cores(shape, dtype=dtype)
    cores.assign([core.detach() for core in random_cores(shape, seed=seed, dtype=dtype)])
    return cores


def filled_layer(shape: TTShape, *, seed: int, dtype: torch.dtype = torch.float64, **options) -> TTLinear:
    layer = TTLinear(shape, dtype=dtype, **options)
    layer.cores.assign(list(filled_cores(shape, seed=seed, dtype=dtype)))
    if layer.start is not None:
        layer.start.assign(list(filled_cores(shape, seed=seed + 1, dtype=dtype)))
    if layer.bias is not None:
        nn.init.ones_(layer.bias)
    return layer


def dense_layer(shape: TTShape, *, seed: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    dense = nn.Linear(shape.in_features, shape.out_features, bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(randn(*dense.weight.shape, seed=seed))
        if bias:
            dense.bias.copy_(randn(shape.out_features, seed=seed + 1))
    return dense
