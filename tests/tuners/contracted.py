"""Trained adapters in float64 whose trains are contracted together, and the same with each layer on its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from draws import seeded
from peft import PeftModel
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from tuners.families import logits
from tuners.wrapped import Two, config_for, trainable, trained, wrap

from loretta import get_peft_model
from loretta.tuners.contraction import Contraction

# the first block unlike the others; T5 counts the parts of a block too
FIRST = r"0\..*"


def adapted(family: str, method: str, **options) -> tuple[PeftModel, dict[str, Tensor]]:
    """A trained adapter on a tiny model in float64 without dropout, in eval mode."""
    base = {"dropout_rate": 0.0} if family == "t5" else {}
    model, inputs = wrap(family, method, base=base, **{"train_head": "dense", **options})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return trained(model).double(), inputs


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Every layer of ``model`` contracts its own trains within."""
    Contraction.detach(base_of(model))
    try:
        yield
    finally:
        Contraction.attach(base_of(model))


def weighted(out: Tensor, seed: int = 7) -> Tensor:
    """A loss that every number of the output enters with a weight of its own."""
    generator = seeded(seed)
    return (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return weighted(model(**inputs).logits)


def gradients(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """What ``run`` leaves as the gradients of everything that trains."""
    model.zero_grad()
    run()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def assert_trained_near(got: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    assert any(".values" in name for name in ref)
    assert_gradients_near(got, ref)


def assert_fresh(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The model computes without gradients what its parameters say now."""
    got = logits(model, inputs)
    with apart(model):
        assert_near("logits", got, logits(model, inputs))


def values_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in trainable(model).items() if name.endswith(".values")]


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    loss(model, inputs).backward()
    torch.optim.SGD(values_of(model), lr=1e-3).step()


def write_in_place(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        values_of(model)[0].mul_(2)


def adapted_rows(method: str, **options) -> nn.Module:
    model = get_peft_model(Two(), config_for(method, target_modules=["one", "two"], **options))
    return trained(model).double()
