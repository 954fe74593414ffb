"""Every family in half and double precision, under autocast, and moved to other dtypes and devices."""

import copy
from collections import OrderedDict

import pytest
import torch
from tolerances import assert_as_near, assert_gradients_near, assert_near
from torch import Tensor, nn
from tuners.families import build, logits, loss_of
from tuners.matrix import (
    adapted,
    cast,
    every_family,
    gradients,
    wrapped,
)
from tuners.wrapped import config_for, every_method, trainable, trained

from loretta import InputError, LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig, PeftModel, get_peft_model
from loretta.tuners.copies import AdapterCopy


def with_and_without(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with model.disable_adapter():
        base = logits(model, inputs)
    return {"base": base, "adapter": logits(model, inputs)}


def assert_adapter_as_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """With its adapter a model loses what its dtype costs, beside twice what it loses without."""
    assert_as_near("logits", got["adapter"], expected["adapter"], beside=(got["base"], expected["base"]))


CONFIGS = {"rep": LorettaRepConfig, "shared": LorettaSharedConfig}
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
    # the trains of a head stay in float32, as what is made of a dense layer
    kept = {p.dtype for name, p in trainable(model).items() if autocast_adapter_dtype or ".loretta_" in name}
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
    # BART adds a bias in float32 to logits that were computed in half precision
    assert_adapter_as_near({name: value.to(dtype) for name, value in got.items()}, expected)
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


@every_method
@pytest.mark.parametrize("how", ["tensorized", "dense"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "electra", "gpt2"])
def test_a_head_beside_half_precision_takes_small_steps(family, how, method, tmp_path):
    """As the cores do: numbers of bfloat16 near 1 are 0.008 apart, and a step of 2e-4 is lost there."""
    base, inputs = build(family, "SEQ_CLS", dtype=torch.bfloat16)
    before, dtypes = logits(base, inputs), {name: p.dtype for name, p in base.named_parameters()}
    model = get_peft_model(base, config_for(method, task_type="SEQ_CLS", train_head=how)).eval()
    assert torch.equal(logits(model, inputs), before)
    copies = [m for m in model.modules() if isinstance(m, AdapterCopy)]
    trains = {name: p for m in copies for name, p in m.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trains.values()} == {torch.float32}
    start = {name: p.detach().clone() for name, p in trains.items()}
    optimizer = torch.optim.AdamW(trains.values(), lr=2e-4, weight_decay=0)
    for _ in range(20):
        model(**inputs, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in trains.items():
        assert (value != start[name]).double().mean() > 0.9, name
    got = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family, "SEQ_CLS", dtype=torch.bfloat16)[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), got)
    assert torch.equal(logits(model, inputs, adapter_names=["default"] * 4), got)
    if method != "adp":
        merged = model.merge_and_unload()
        assert {name: p.dtype for name, p in merged.named_parameters()} == dtypes


@every_method
def test_what_trains_in_half_precision_outside_of_the_trains_is_named(method):
    """PEFT's own copies, and biases of the base."""
    for options in ({"modules_to_save": ["lm_head"]}, {"bias": "all"}):
        family = "llama" if "bias" not in options else "gpt2"
        model, inputs = wrapped(family, method, base={"dtype": torch.bfloat16}, **options)
        with pytest.warns(UserWarning, match=r"outside of the trains .*(lm_head|bias).* train in half precision"):
            model.train()(**inputs)


class Scaled(nn.Linear):
    """A layer whose weight is in steps of a hundredth, as in checkpoints that no library of quantisation knows."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 100, self.bias)


@pytest.mark.parametrize("method", ["rep", "shared"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_no_update_is_rounded_into_a_weight_of_whole_numbers(dtype, method):
    """It was, without a word: the merged model computed something else."""
    base = nn.Sequential(OrderedDict(up=Scaled(16, 16)))
    weight = (30 * torch.rand(16, 16)).to(dtype)
    base.up.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model = trained(get_peft_model(base, CONFIGS[method](target_modules=["up"], train_norms=False)))
    x, layer = torch.randn(3, 16), model.base_model.model.up
    expected = nn.functional.linear(x, weight.float() / 100 + layer.get_delta_weight("default"), base.up.bias)
    assert_near("output", model(x), expected)
    with pytest.raises(InputError, match=rf"cannot merge into 'up', whose weight of {dtype}"):
        model.merge_adapter()
    assert layer.base_layer.weight.equal(weight)


@pytest.mark.parametrize("method", ["rep", "shared"])
def test_an_update_of_complex_weights_acts_on_both_parts(method):
    base = nn.Sequential(OrderedDict(up=nn.Linear(16, 16, dtype=torch.complex128)))
    model = trained(get_peft_model(base, CONFIGS[method](target_modules=["up"], train_norms=False))).double()
    x, layer = torch.randn(3, 16, dtype=torch.complex128), model.base_model.model.up
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    expected = x @ weight.T + layer.base_layer.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_adp_says_that_it_has_no_complex_form():
    base = nn.Sequential(OrderedDict(up=nn.Linear(16, 16, dtype=torch.complex64)))
    with pytest.raises(InputError, match=r"'up' gives complex numbers, and adp's bottleneck has a non-linearity"):
        get_peft_model(base, LorettaAdpConfig(target_modules=["up"], train_norms=False))
