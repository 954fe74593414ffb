"""The models of the matrix: one of each kind of layers, blocks and heads, and one that is not of transformers."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from draws import seed_torch, seeded
from tolerances import assert_near
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput
from tuners.families import build, logits, loss_of, natural_task, randomise
from tuners.wrapped import config_for, trainable

from loretta import PeftModel, get_peft_model
from loretta.tuners.layer import LorettaLayer

HOSTED = ("gpt2", "llama", "opt", "bert", "t5", "bart", "modernbert", "deberta-v2")
FAMILIES = (*HOSTED, "mlp")
GENERATIVE = ("gpt2", "llama", "opt", "t5", "bart")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_hosted = pytest.mark.parametrize("family", HOSTED)


class MLP(nn.Module):
    """A model that knows nothing of transformers: two blocks of feed-forward layers, and a norm before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(OrderedDict(widen=nn.Linear(32, 48), act=nn.ReLU(), narrow=nn.Linear(48, 32)))
            for _ in range(2)
        )
        self.checkpointing: dict[str, Any] | None = None
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.checkpointing = gradient_checkpointing_kwargs

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        hidden = self.embed(features)
        if self.checkpointing:
            hidden.requires_grad_()
        for block in self.blocks:
            hidden = hidden + (checkpoint(block, hidden, **self.checkpointing) if self.checkpointing else block(hidden))
        return SequenceClassifierOutput(logits=self.head(self.norm(hidden)))


def task_of(family: str) -> str | None:
    return None if family == "mlp" else natural_task(family)


def base_of(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random parameters in eval mode, and a batch of four rows. ``changes`` go into its config."""
    if family != "mlp":  # two logits may both be nearly zero, sixteen are not
        return build(family, dtype=dtype, **{"num_labels": 16, **changes})
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        model = MLP().eval()
    randomise(model.parameters(), seed=0)
    generator = seeded(0)
    return model.to(dtype), {"features": torch.randn(4, 12, generator=generator).to(dtype)}


def options_for(family: str, method: str, **options: Any) -> Any:
    """The config of one method for one family: its defaults, or what stands in for them where none are known."""
    targets = {"target_modules": ["widen", "narrow"]} if family == "mlp" else {}
    return config_for(method, **{"task_type": task_of(family), **targets, **options})


def wrapped(
    family: str, method: str, *, base: dict[str, Any] | None = None, autocast_adapter_dtype: bool = True, **options: Any
) -> tuple[PeftModel, dict[str, Tensor]]:
    """A fresh adapter on a base model, in eval mode."""
    model, inputs = base_of(family, **(base or {}))
    config = options_for(family, method, **options)
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).eval(), inputs


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch with its numbers, but not its indices, in another dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LorettaLayer)}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad for name, parameter in trainable(model).items()}


def assert_merges(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    """In float64: a small model may blow up the rounding of float32."""
    inputs = cast(inputs, torch.float64)
    expected = logits(model.double(), inputs)
    assert_near("merged", logits(model.merge_and_unload(), inputs), expected)
