"""A fresh adapter changes no bit of a language model; only "gaussian" perturbs it, as the authors' code does."""

import pytest
import torch
from draws import seed_torch, seeded
from torch import nn
from tuners.families import DECODERS, SEQ2SEQ, build, logits
from tuners.wrapped import config_for, every_method, own_trains, trainable, wrap

from loretta import get_peft_model
from loretta.tuners.layer import LorettaLayer

LANGUAGE_MODELS = DECODERS + SEQ2SEQ
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_method
@every_dtype
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
def test_fresh_logits_are_those_of_the_base_bit_for_bit(family, method, dtype, init_weights):
    base, inputs = build(family, dtype=dtype)
    expected = logits(base, inputs)
    model, _ = wrap(family, method, base={"dtype": dtype}, init_weights=init_weights)
    got = logits(model, inputs)
    assert got.dtype == expected.dtype == dtype
    assert expected.float().std() > 0.1  # nothing is equal because all of it is zero
    assert torch.equal(got, expected)
    if init_weights == "denoised":
        for name, core in model.named_parameters():
            assert core.any() or "bias" in name or "_norm_" in name, f"{name} is zero: nothing was there to be denoised"


@every_method
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_gaussian_perturbs(family, method):
    base, inputs = build(family)
    model, _ = wrap(family, method, init_weights="gaussian")
    assert (logits(model, inputs) - logits(base, inputs)).norm() > 1e-3 * logits(base, inputs).norm()


@every_method
@pytest.mark.parametrize("init_weights", [True, False])
def test_true_and_false_mean_zero_and_gaussian(method, init_weights):
    base, inputs = build("llama")
    model, _ = wrap("llama", method, init_weights=init_weights)
    assert model.peft_config["default"].init_weights == ("zero" if init_weights else "gaussian")
    assert torch.equal(logits(model, inputs), logits(base, inputs)) is init_weights


@every_method
@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize("train_head", ["dense", "frozen"])
@pytest.mark.parametrize("family", ["roberta", "deberta", "deberta-v2", "electra", "modernbert", "llama", "bart"])
def test_a_dense_head_is_untouched_too(family, method, train_head, train_norms):
    base, inputs = build(family, "SEQ_CLS")
    model, _ = wrap(family, method, "SEQ_CLS", train_head=train_head, train_norms=train_norms)
    assert torch.equal(logits(model, inputs), logits(base, inputs))


@every_method
@every_dtype
def test_inputs_that_lie_in_another_order_are_rounded_as_by_the_base(method, dtype):
    """torch adds the bias of a linear layer after the product there, and not within it.

    The base is frozen, as it is under an adapter: torch folds the rows of such inputs only where the weight asks for a
    gradient, and some kernels round the two products apart (MKL_CBWR=COMPATIBLE).
    """
    base = nn.Sequential(nn.Linear(256, 64)).to(dtype).requires_grad_(False)
    x = torch.randn(2, 7, 3, 256, generator=seeded(0)).to(dtype)
    inputs = (x[0, 0, 0], x[0, 0], x[0], x, x[0].transpose(0, 1), x.transpose(1, 2))
    expected = [base(each) for each in inputs]
    model = get_peft_model(base, config_for(method, target_modules=["0"]))
    assert all(torch.equal(model(each), wanted) for each, wanted in zip(inputs, expected, strict=True))


@own_trains
def test_only_the_last_core_of_up_is_zero(method):
    model, _ = wrap("llama", method)
    for name, layer in model.named_modules():
        if not isinstance(layer, LorettaLayer):
            continue
        down, up = (getattr(layer, f"loretta_{method}_{part}")["default"] for part in ("down", "up"))
        assert not up[-1].any(), name
        assert all(core.any() for core in [*down, *list(up)[:-1]]), name


@every_method
def test_two_fresh_adapters_start_with_different_cores(method):
    first, _ = wrap("llama", method, seed=1)
    second, _ = wrap("llama", method, seed=2)
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    cores = [
        (a, b) for (name, a), (_, b) in pairs if f"loretta_{method}_{'train' if method == 'shared' else 'down'}" in name
    ]
    assert cores
    assert not any(torch.equal(a, b) for a, b in cores)


@every_method
def test_adapters_of_a_bfloat16_model_are_kept_in_float32(method):
    model, _ = wrap("llama", method, base={"dtype": torch.bfloat16})
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if f"loretta_{method}_" in name}
    assert dtypes == {torch.float32}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "base_layer" in name} == {torch.bfloat16}


@every_method
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_trains_are_made_in_float32_at_least_whatever_the_default_dtype(default, method):
    expected = trainable(wrap("roberta", method)[0])
    base, _ = build("roberta")
    torch.set_default_dtype(default)
    try:
        with torch.random.fork_rng(devices=[]):
            seed_torch(0)
            model = get_peft_model(base, config_for(method, task_type="SEQ_CLS"))
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    found = trainable(model)
    assert found.keys() == expected.keys()
    assert {value.dtype for name, value in found.items() if "loretta" in name} <= {torch.float32, torch.float64}
    if default != torch.float64:  # whose random numbers are others
        assert all(torch.equal(found[name], value) for name, value in expected.items())
