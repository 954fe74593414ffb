"""A model with two trained adapters, and each of them alone."""

import torch
from draws import seed_torch
from peft import PeftModel
from torch import Tensor
from tuners.families import logits, natural_task
from tuners.wrapped import config_for, trained, wrap


def pair(
    family: str, method: str, *, base: dict | None = None, second: dict | None = None, **options
) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with two trained adapters of different ranks, "default" (active) and "other"."""
    task = options.pop("task", natural_task(family))
    model, inputs = wrap(family, method, task, base=base, **options)
    trained(model, seed=1)
    config = config_for(method, **{"task_type": task, "tensor_rank": 2, **options, **(second or {})})
    with torch.random.fork_rng(devices=[]):
        seed_torch(1)
        model.add_adapter("other", config)
    model.set_adapter("other")
    trained(model, seed=2)
    model.set_adapter("default")
    return model.eval(), inputs


def alone(model: PeftModel, inputs: dict[str, Tensor], name: str, **options) -> Tensor:
    """The logits of one adapter, or of the base; "default" is active afterwards."""
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, inputs, **options)
    model.set_adapter(name)
    try:
        return logits(model, inputs, **options)
    finally:
        model.set_adapter("default")


def expected_rows(model: PeftModel, inputs: dict[str, Tensor], rows: list[str]) -> Tensor:
    """The logits of a batch in which each row has an adapter of its own, or none."""
    single = {name: alone(model, inputs, name) for name in set(rows)}
    return torch.stack([single[name][k] for k, name in enumerate(rows)])
