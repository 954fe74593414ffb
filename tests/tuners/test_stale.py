"""Writes to cores that torch does not count, and errors in the middle: the next call sees what is there now."""

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tolerances import assert_near
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tt.trains import randn
from tuners.by_hand import (
    X,
    adapted,
    add_to_data,
    answer,
    assert_fresh,
    before_every_train,
    by_hand,
    copy_average,
    cores_of,
    expected,
    write_in_another_process,
)
from tuners.families import randomise
from tuners.wrapped import every_method, layers_of

import loretta
from loretta.tuners import contraction


def fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(cores_of(model), lr=0.1, fused=True)
    model(X).square().sum().backward()
    answer(model)  # between backward and step
    optimizer.step()


def set_vector_twice(model: nn.Module) -> None:
    vector = parameters_to_vector(cores_of(model)).detach().clone()
    vector_to_parameters(vector, cores_of(model))  # from here on the cores are views of it
    answer(model)
    vector.mul_(2)
    vector_to_parameters(vector, cores_of(model))


def replace_a_train(model: nn.Module) -> None:
    layer = layers_of(model)[0]
    part = next(getattr(layer, name) for name in layer.adapter_layer_names)
    other = type(part["default"])(part["default"].shape, dtype=torch.float64)
    randomise(other.parameters(), seed=8)
    part["default"] = other


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "a fused step": fused_step,
    "data": add_to_data,
    "a moving average": copy_average,
    "a vector, twice": set_vector_twice,
    "another train": replace_a_train,
    "another process": write_in_another_process,
}


every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@every_method
@every_write
def test_a_write_that_is_not_counted(method, write):
    if write is write_in_another_process and not hasattr(os, "fork"):
        pytest.skip("no processes that share memory by fork here")
    model = adapted(method)
    before = answer(model)
    write(model)
    assert not torch.allclose(answer(model), before)
    assert_fresh(model)


@every_method
def test_every_perturbation_is_seen(method):
    """MeZO: the loss with the cores shifted one way and the other, by writes to their data."""
    model, seen = adapted(method), []
    for number in range(6):
        shifts = [randn(*values.shape, seed=number) for values in cores_of(model)]
        for factor in (0.1, -0.2):
            for values, shift in zip(cores_of(model), shifts, strict=True):
                values.data.add_(shift, alpha=factor)
            seen.append(answer(model))
            assert_near("the shifted answer", seen[-1], expected(model, X))
    assert not any(torch.equal(seen[k], seen[k + 1]) for k in range(len(seen) - 1))


class Broken(BaseException):
    """As KeyboardInterrupt, which the hooks of torch do not see, but no reason for pytest to stop."""


@contextmanager
def broken(monkeypatch, error: type[BaseException], at: int):
    """In it the joint contraction fails at its ``at``-th train."""
    count = iter(range(1, 10**6))

    def fail() -> None:
        if next(count) == at:
            raise error("on purpose")

    with monkeypatch.context() as patch:
        before_every_train(patch, fail)
        yield


every_error = pytest.mark.parametrize("error", [Broken, torch.OutOfMemoryError])


@every_method
@every_error
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("serves", [True, False])
def test_an_error_in_the_contraction(method, error, at, grad, serves, monkeypatch):
    model = adapted(method)
    answer(model)
    add_to_data(model)
    with loretta.serving(model) if serves else nullcontext():
        with broken(monkeypatch, error, at), torch.set_grad_enabled(grad), pytest.raises(error):
            model(X)
        assert_fresh(model)
    assert_fresh(model)


@every_method
@every_error
@pytest.mark.parametrize("grad", [True, False])
def test_an_error_in_the_model(method, error, grad):
    model, fails = adapted(method), [True]
    one, two = layers_of(model)

    def fail(*_) -> None:
        if fails[0]:
            raise error("on purpose")

    two.register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grad), pytest.raises(error):
        model(X)
    add_to_data(model)
    fails[0] = False
    for layer in (one, two):  # on their own: not in the call that has failed
        with torch.set_grad_enabled(grad):
            assert_near("a layer", layer(X), by_hand(layer, X))
    assert_fresh(model)


def test_an_error_before_the_call_begins():
    """A call within a call, which another hook stops before ours has seen it, ends no call but its own."""
    model, depth = adapted("rep"), [0]
    base, (one, two) = model.get_base_model(), layers_of(model)
    counted = []

    def stop(*_) -> None:
        if depth[0]:
            raise ValueError("on purpose")

    base.register_forward_pre_hook(stop, prepend=True)

    def call_again(*_) -> None:
        depth[0] += 1
        with pytest.raises(ValueError, match="on purpose"):
            base(X)
        depth[0] -= 1
        counted.append(contraction.find_factors(two, "default", 0))

    one.register_forward_hook(call_again)
    assert_near("the outer call", answer(model), expected(model, X))
    assert counted[0] is not None
    assert contraction.find_factors(two, "default", 0) is None


@every_method
def test_an_exported_program_holds_the_cores(method):
    model = adapted(method)
    answer(model)
    exported = torch.export.export(model, (X,), strict=False).module()
    values = {key: 0.5 * value if key.endswith(".values") else value for key, value in exported.state_dict().items()}
    assert sum(key.endswith(".values") for key in values) == len(cores_of(model))
    exported.load_state_dict(values)
    for p in cores_of(model):
        p.data.mul_(0.5)
    assert_near("the exported program", exported(X), expected(model, X))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # that sizes are fixed from here on
@every_method
@pytest.mark.parametrize("serves", [True, False])
def test_a_traced_module_holds_the_cores(method, serves):
    model = adapted(method)
    answer(model)
    with loretta.serving(model) if serves else nullcontext():
        answer(model)
        traced = torch.jit.trace(model, (X,), check_trace=False)
    add_to_data(model)
    assert_near("the trace", traced(X), expected(model, X))
