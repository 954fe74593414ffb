"""The walk that the tests have in the place of torch's is torch's."""

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from module_walk import named_modules, of_torch
from torch import nn
from tuners.wrapped import wrap


class Own(nn.Sequential):
    """Has a walk of its own, and counts how often it is begun."""

    begun = 0

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        self.begun += 1
        return super().named_modules(*args, **kwargs)


def strange() -> nn.Module:
    """A layer in three places, a place without a module, a module that walks by itself, twice, and one in itself."""
    shared, own = nn.Linear(2, 2), Own(nn.ReLU(), nn.Sequential(nn.Tanh()))
    model = nn.Sequential(shared, nn.Sequential(nn.Sequential(shared), own), own, nn.ReLU())
    model.register_module("none", None)
    model[1][0].add_module("again", shared)
    return model


def test_tests_walk_with_it():
    assert nn.Module.named_modules is named_modules is not of_torch


@pytest.mark.parametrize("remove_duplicate", [True, False])
@pytest.mark.parametrize("make", [strange, lambda: wrap("bert", "rep")[0], nn.ReLU], ids=["strange", "bert", "leaf"])
def test_it_meets_the_same_modules_by_the_same_names(make, remove_duplicate, monkeypatch):
    model, found = make(), []
    for walk in (of_torch, named_modules):
        monkeypatch.setattr(nn.Module, "named_modules", walk)
        own = [module for module in model.modules() if isinstance(module, Own)]
        for module in own:
            module.begun = 0
        found.append(list(model.named_modules(prefix="model", remove_duplicate=remove_duplicate)))
        found[-1].append([module.begun for module in own])
    assert found[0] == found[1]


def test_a_cycle_ends(monkeypatch):
    model, found = nn.Sequential(nn.Sequential(nn.ReLU())), []
    model[0].add_module("up", model)
    for walk in (of_torch, named_modules):
        monkeypatch.setattr(nn.Module, "named_modules", walk)  # also for the modules within
        found.append(list(islice(model.named_modules(), 9)))
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.parametrize(
    "change", [lambda m: m.add_module("new", nn.ReLU()), lambda m: m.set_submodule("0", nn.ReLU())]
)
def test_it_sees_what_changes_on_the_way(change: Callable[[nn.Module], None], monkeypatch):
    found = []
    for walk in (of_torch, named_modules):
        monkeypatch.setattr(nn.Module, "named_modules", walk)
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Sequential(nn.ReLU()))
        names = []
        for name, module in model.named_modules():
            names.append((name, type(module)))
            if name == "0":
                change(model[1])
        found.append(names)
    assert found[0] == found[1]
