"""Every family in half and double precision, under autocast, and moved to other dtypes and devices."""

import copy

import pytest
import torch
from tolerances import assert_as_near, assert_gradients_near, assert_near
from torch import Tensor
from tuners.families import logits, loss_of
from tuners.matrix import (
    adapted,
    cast,
    every_family,
    gradients,
    wrapped,
)
from tuners.wrapped import every_method, trainable, trained

from loretta import PeftModel


def with_and_without(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with model.disable_adapter():
        base = logits(model, inputs)
    return {"base": base, "adapter": logits(model, inputs)}


def assert_adapter_as_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """With its adapter a model loses what its dtype costs, beside twice what it loses without."""
    assert_as_near("logits", got["adapter"], expected["adapter"], beside=(got["base"], expected["base"]))


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@every_method
@every_family
@pytest.mark.parametrize(
    ("dtype", "autocast_adapter_dtype"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)],
    ids=["bfloat16", "float16", "bfloat16 throughout"],
)
def test_a_base_in_half_precision(family, dtype, autocast_adapter_dtype, method):
    model, inputs = wrapped(family, method, base={"dtype": dtype}, autocast_adapter_dtype=autocast_adapter_dtype)
    trained(model, scale=0.05)
    kept = {p.dtype for name, p in trainable(model).items() if ".loretta_" in name}
    assert kept == {torch.float32 if autocast_adapter_dtype else dtype}
    # the same numbers, computed with in float32
    expected = with_and_without(copy.deepcopy(model).float(), cast(inputs, torch.float32))
    assert_adapter_as_near(with_and_without(model, inputs), expected)
    for name, grad in gradients(model, inputs).items():
        assert grad.isfinite().all(), name
        assert grad.any(), name


@every_method
@every_family
@HALF
def test_autocast(family, dtype, method):
    model, inputs = wrapped(family, method)
    trained(model, scale=0.05)
    expected = with_and_without(model, inputs)
    with torch.autocast("cpu", dtype=dtype):
        got = with_and_without(model, inputs)
        loss = loss_of(model, inputs)
    assert_adapter_as_near(got, expected)
    loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_method
@every_family
def test_to_another_dtype_and_back(family, method):
    model, inputs = wrapped(family, method)
    expected = with_and_without(trained(model, scale=0.05), inputs)
    wide = logits(model.to(torch.float64), cast(inputs, torch.float64))
    assert_near("float64", wide.float(), expected["adapter"])
    assert torch.equal(logits(model.to(torch.float32), inputs), expected["adapter"])
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_adapter_as_near(with_and_without(model, cast(inputs, torch.bfloat16)), expected)


@every_method
@pytest.mark.parametrize("family", ["llama", "bert"])  # the second has a head with a start of its own
def test_what_is_subtracted_is_rounded_with_what_trains(family, method):
    """TRL rounds what trains beside a quantised base, and nothing else; no change stays no change."""
    model, inputs = wrapped(family, method, base={"dtype": torch.bfloat16}, init_weights="denoised")
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    found = with_and_without(model, inputs)
    assert torch.equal(found["adapter"], found["base"])
    assert not torch.equal(logits(trained(model), inputs), found["base"])


@every_method
@every_family
def test_to_another_device(family, method):
    model, _ = wrapped(family, method)
    layer = next(iter(adapted(model).values()))
    x = torch.randn(3, 5, layer.in_features)
    shape = layer(x).shape
    model.to("meta")
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert layer(x.to("meta")).shape == shape


@every_method
@pytest.mark.parametrize("family", ["gpt2", "bert", "mlp"])
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
def test_autocast_leaves_a_base_in_double_precision_alone(family, init_weights, method):
    model, inputs = wrapped(family, method, base={"dtype": torch.float64}, init_weights=init_weights)
    trained(model)
    inputs, found = cast(inputs, torch.float64), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss_of(model, inputs).backward()
            found.append((logits(model, inputs), {name: p.grad for name, p in trainable(model).items()}))
        model.zero_grad()
    (ref, ref_gradients), (got, gradients) = found
    assert_near("logits", got, ref)
    assert_gradients_near(gradients, ref_gradients)
