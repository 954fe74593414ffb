"""Norms that are trained beside a base in half precision: held in float32, computed with in the base's dtype."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from tuners.families import logits, loss_of
from tuners.matrix import base_of, options_for, wrapped
from tuners.wrapped import every_method, trainable, trained

from loretta import PeftModel

FAMILIES = ("llama", "bert")
every_family = pytest.mark.parametrize("family", FAMILIES)
HALF = {"dtype": torch.bfloat16}


def norms(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trainable(model).items() if "modules_to_save" in name and "norm" in name.lower()}


@every_method
@every_family
def test_small_steps_are_not_lost(family, method):
    model, inputs = wrapped(family, method, base=HALF)
    before = {name: parameter.detach().clone() for name, parameter in norms(model).items()}
    assert before
    assert {value.dtype for value in before.values()} == {torch.float32}
    optimizer = torch.optim.SGD(norms(trained(model)).values(), lr=1e-4)
    loss_of(model, inputs).backward()
    optimizer.step()
    for name, parameter in norms(model).items():
        moved = parameter.grad != 0
        assert moved.any(), name
        assert (parameter - before[name])[moved].any(), name


@every_method
@every_family
def test_the_model_computes_on_in_its_own_dtype(family, method):
    model, inputs = wrapped(family, method, base=HALF)
    base, _ = base_of(family, **HALF)
    assert logits(model, inputs).dtype == torch.bfloat16
    assert torch.equal(logits(model, inputs), logits(base, inputs))  # an untrained adapter changes nothing
    rounded = copy.deepcopy(trained(model))
    for parameter in norms(rounded).values():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(model, inputs), logits(rounded, inputs))


@every_method
def test_they_are_saved_and_loaded_as_they_are(method, tmp_path):
    model, inputs = wrapped("llama", method, base=HALF)
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    saved = {name: value for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if "norm" in name}
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(base_of("llama", **HALF)[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again.eval(), inputs), expected)
        again.set_adapter("default")
        for mine, its in zip(norms(model).values(), norms(again).values(), strict=True):
            assert torch.equal(mine, its)


@every_method
def test_several_adapters_and_mixed_batches(method):
    model, inputs = wrapped("llama", method, base=HALF)
    first = logits(trained(model, seed=1), inputs)
    model.add_adapter("other", options_for("llama", method, tensor_rank=2))
    model.set_adapter("other")
    other = logits(trained(model, seed=2), inputs)
    names = ["default", "other", "default", "other"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], {"default": first, "other": other}[name][row], rtol=0.1, atol=0.05)
    model.base_model.set_adapter(["default", "other"])
    assert logits(model, inputs).dtype == torch.bfloat16


def test_a_merged_model_has_one_dtype():
    model, inputs = wrapped("llama", "rep", base=HALF)
    expected = logits(trained(model, scale=0.02), inputs)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    error = (logits(merged, inputs).float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.05


@every_method
def test_without_autocast_they_stay_in_the_dtype_of_the_base(method):
    model, _ = wrapped("llama", method, base=HALF, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in norms(model).values()} == {torch.bfloat16}
