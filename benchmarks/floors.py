"""The least that a training step has to do, in bytes and operations, and the time of an H200 for that.

Counted are the linear layers and attention. Everything between them could be fused into them, and is not counted.
"""

from dataclasses import dataclass
from functools import cache

import torch
from cases import METHODS, SHAPES, build_base
from peft import get_peft_model
from torch import nn

from loretta.tuners.adp.layer import AdpLinear
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.rep.layer import RepLinear

MEMORY_RATE = 4.8e12  # bytes a second, from the data sheet
HALF_FLOPS = 7.9e14  # operations a second that large bfloat16 products reach, of 9.9e14 on the data sheet
HALF = 2  # bytes of a number


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of weights and of activations that pass through memory, and floating-point operations."""

    weights: float
    activations: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.weights + self.activations

    @property
    def bytes_ms(self) -> float:
        return 1e3 * self.bytes / MEMORY_RATE

    @property
    def flops_ms(self) -> float:
        return 1e3 * self.flops / HALF_FLOPS

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.flops_ms)


def base_cost(shape: str, layers: int, batch: int, tokens: int) -> Cost:
    """The frozen base, forward and backward with only the gradients of activations."""
    model, rows = _base(shape, layers), batch * tokens
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    numbers = sum(i * o for i, o in sizes)
    # two products forward, five backward (one of them again), half of each where a token sees those before it alone
    attention = 14 * batch * tokens**2 * model.config.hidden_size * layers
    causal = SHAPES[shape].task_type == "CAUSAL_LM"
    return Cost(
        weights=2 * HALF * numbers,
        activations=2 * HALF * rows * sum(i + o for i, o in sizes),
        flops=4 * rows * numbers + attention / (2 if causal else 1),
    )


def adapter_cost(shape: str, layers: int, method: str, batch: int, tokens: int) -> Cost:
    """What rep or adp adds, forward and backward, were each layer one kernel forward and one backward."""
    rows, products, moved = batch * tokens, 0, 0
    for layer in _adapted(shape, layers, method):
        down, up = layer.placements["default"].down, layer.placements["default"].up
        if isinstance(layer, RepLinear):
            width_in, width_out = layer.in_features, layer.out_features
            products += min(down.cut_rank, down.out_features, up.cut_rank) * (width_in + width_out)
            # x read, y read and written; the gradient of y and x read, that of x read and written
            moved += 4 * width_in + 3 * width_out
        elif isinstance(layer, AdpLinear):
            # the bias is one more of the inner size
            products += (down.cut_rank + 1) * (down.in_features + down.out_features)
            products += (up.cut_rank + 1) * (up.in_features + up.out_features)
            # y read and written; its gradient and y read, the gradient written
            moved += 5 * down.in_features
    # each product forward and, for two gradients, backward
    return Cost(weights=0, activations=HALF * rows * moved, flops=6 * rows * products)


@cache
def _base(shape: str, layers: int) -> nn.Module:
    return build_base(shape, device="meta", dtype=torch.bfloat16, layers=layers)


@cache
def _adapted(shape: str, layers: int, method: str) -> list[LorettaLayer]:
    base = build_base(shape, device="meta", dtype=torch.bfloat16, layers=layers)
    model = get_peft_model(base, METHODS[method](SHAPES[shape].task_type))
    return [module for module in model.modules() if isinstance(module, LorettaLayer)]
