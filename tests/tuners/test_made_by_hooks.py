"""Cores that torch's pruning and its older weight norm make anew whenever their train is called."""

from collections.abc import Callable

import pytest
import torch
from tolerances import assert_near
from torch import nn
from torch.nn.utils import prune, remove_weight_norm, weight_norm
from tt.trains import randn
from tuners.wrapped import config_for, every_method, trained

from loretta import get_peft_model, serving
from loretta.layers.shared import SharedCores
from loretta.layers.trains import Cores

KINDS: dict[str, tuple[Callable, Callable]] = {
    "pruned": (lambda train: prune.l1_unstructured(train, "values", amount=0.3), prune.remove),
    "weight norm": (lambda train: weight_norm(train, "values", dim=None), remove_weight_norm),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


def adapted(method: str) -> tuple[nn.Module, list[nn.Module]]:
    base = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    model = trained(get_peft_model(base, config_for(method, target_modules=["0", "2"])).double().eval())
    return model, [m for m in model.modules() if isinstance(m, Cores | SharedCores)]


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_computes_with_what_the_hooks_make_now(kind, method):
    make, undo = KINDS[kind]
    model, trains = adapted(method)
    x = randn(3, 12, seed=5)
    model(x)  # the trains were plain, and stacked
    for train in trains:
        make(train)
    made = {name: p for name, p in model.named_parameters() if ".values_" in name}
    assert len(made) >= len(trains)
    for step in range(2):  # a second backward pass needs a graph of its own
        grads = torch.autograd.grad(model(x).square().sum(), list(made.values()))
        with torch.no_grad():
            for number, parameter in enumerate(made.values()):
                parameter.add_(0.3 * randn(*parameter.shape, 1, seed=10 * step + number)[..., 0])
    grads = torch.autograd.grad(model(x).square().sum(), list(made.values()))
    for parameter, grad in zip(made.values(), grads, strict=True):
        direction, losses = randn(*parameter.shape, 1, seed=7)[..., 0], []
        for shift in (1e-6, -2e-6):
            parameter.data.add_(direction, alpha=shift)
            losses.append(model(x).square().sum().item())
        parameter.data.add_(direction, alpha=1e-6)
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx((grad * direction).sum().item(), rel=1e-4, abs=1e-6)
    with torch.no_grad(), serving(model):
        found = model(x)
    for train in trains:
        undo(train, "values")
    with torch.no_grad():
        assert_near("as plain cores of the same values", found, model(x))
