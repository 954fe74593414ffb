"""The joint contraction is never out of date: a change of parameters, scales, precision or active adapters is seen."""

import copy
import io
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.func import functional_call
from tuners.contracted import (
    FIRST,
    adapted,
    apart,
    assert_fresh,
    gradients,
    loss,
    step,
    values_of,
    weighted,
    write_in_place,
)
from tuners.families import logits, randomise
from tuners.wrapped import config_for, every_method, layers_of, trainable, trained, wrap

import loretta
from loretta import get_peft_model

Change = Callable[[PeftModel, dict[str, Tensor]], object]


def doubled(model: nn.Module) -> dict[str, Tensor]:
    return {name: 2 * v if name.endswith(".values") else v for name, v in model.state_dict().items()}


def write_in_inference_mode(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        values_of(model)[-1].mul_(2)


def write_biases(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    randomise([p for name, p in trainable(model).items() if "loretta_" in name and p.dim() == 1], seed=5)


def assign_data(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    for values in values_of(model):
        values.data = 2 * values.data


CHANGES: dict[str, Change] = {
    "optimizer step": step,
    "load_state_dict": lambda model, _: model.load_state_dict(doubled(model)),
    "load_state_dict, assigned": lambda model, _: model.load_state_dict(doubled(model), assign=True),
    "in place": write_in_place,
    "in place, in inference mode": write_in_inference_mode,
    "in place, all": write_biases,
    "data assigned": assign_data,
    "data written": lambda model, _: [p.data.mul_(2) for p in values_of(model)],
    "rounded and back": lambda model, _: model.bfloat16().double(),
    "disabled": lambda model, _: model.base_model.disable_adapter_layers(),
    "other scaling": lambda model, _: layers_of(model)[0].scaling.update(default=9.0),
    "other rounding": lambda model, _: model.to(torch.bfloat16),
}


@every_method
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(method, change, contractions):
    model, inputs = adapted("llama", method, train_norms=False)
    before = logits(model, inputs)
    assert torch.equal(logits(model, inputs), before)
    change(model, inputs)
    contractions.clear()
    after = logits(model, inputs)
    assert not contractions["alone"]
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert_fresh(model, inputs)


@every_method
def test_switching_on_autocast_is_seen(method, contractions):
    model, inputs = adapted("llama", method)
    model.float()
    plain = logits(model, inputs)
    contractions.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, inputs)
        assert contractions["together"]
        with apart(model):
            ref = logits(model, inputs)
    assert_near("logits", got, ref)
    assert torch.equal(logits(model, inputs), plain)
    assert not torch.equal(got, plain)


def test_scales_keep_the_precision_of_the_model():
    model, inputs = adapted("llama", "rep", alpha_pattern={FIRST: 5})
    model.float()
    logits(model, inputs)
    assert_fresh(model.double(), inputs)


@every_method
def test_gradients_under_autocast(method, contractions):
    model, inputs = adapted("bert", method)
    model.float()

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**inputs).logits
        weighted(out.double()).backward()

    got = gradients(model, run)
    assert not contractions["alone"]
    with apart(model):
        ref = gradients(model, run)
    # sums over the batch, rounded to bfloat16 on the way through the factors in either case
    assert_gradients_near({name: grad.bfloat16() for name, grad in got.items()}, ref)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
@every_method
def test_changes_of_what_is_active_are_seen(method, contractions):
    model, inputs = adapted("llama", method, train_norms=False)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", train_norms=False, tensor_rank=2))
    model.double().set_adapter("other")
    trained(model, seed=2)
    seen = []
    for names in ("default", "other", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        seen.append(logits(model, inputs))
        assert_fresh(model, inputs)
    assert torch.equal(seen[0], seen[3])
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))
    loretta.rename_adapter(model, "default", "renamed")
    assert torch.equal(logits(model, inputs), seen[0])
    loretta.rename_adapter(model, "renamed", "default")
    assert torch.equal(logits(model, inputs), seen[0])
    contractions.clear()
    with model.disable_adapter():
        model(**inputs)
    assert not contractions
    assert torch.equal(logits(model, inputs), seen[0])
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), seen[1])
    assert contractions["together"]
    assert not contractions["alone"]


def test_merging_and_unmerging_are_seen(contractions):
    model, inputs = adapted("llama", "rep", train_norms=False)
    before = logits(model, inputs)
    model.merge_adapter()
    contractions.clear()
    assert_near("merged", logits(model, inputs), before)
    assert not contractions
    model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), before)
    assert contractions["together"]


@every_method
def test_swapping_in_an_adapter_is_seen(method, tmp_path):
    model, inputs = adapted("llama", method)
    before = logits(model, inputs)
    other, _ = wrap("llama", method, train_head="dense", **{"scaling" if method == "adp" else "lora_alpha": 2.0})
    trained(other, seed=5).save_pretrained(tmp_path)
    loretta.hotswap_adapter(model, tmp_path)
    assert not torch.equal(logits(model, inputs), before)
    assert_fresh(model, inputs)


@every_method
def test_parameters_that_others_put_in_place_are_seen(method):
    model, inputs = adapted("llama", method, train_norms=False)

    name = next(name for name in trainable(model) if name.endswith(".values"))

    @torch.no_grad()
    def scaled(factor: float) -> Tensor:
        # gone at the next call, whose tensor may get its address
        value = factor * model.get_parameter(name)
        return functional_call(model, {name: value}, args=(), kwargs=inputs).logits

    def outs() -> list[Tensor]:
        return [scaled(1 + 0.1 * k) for k in range(4)]

    got = outs()
    with apart(model):
        ref = outs()
    for k in range(4):
        assert_near(f"call {k}", got[k], ref[k])
    assert not any(torch.equal(one, other) for one, other in pairwise(got))


@every_method
def test_inference_mode(method):
    scales = {"alpha_pattern": {FIRST: 5}} if method != "adp" else {}
    model, inputs = adapted("llama", method, **scales)
    with torch.inference_mode():
        first = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, first)
    assert torch.equal(logits(model, inputs), first)
    assert gradients(model, lambda: loss(model, inputs).backward())
    with torch.inference_mode():
        copied = copy.deepcopy(model)  # its parameters are inference tensors, which count no versions
        copied(**inputs)
        for layer in layers_of(copied):
            layer.requires_grad_(False)
        for name, p in copied.named_parameters():
            if name.endswith(".values"):
                p.mul_(2)
        got = copied(**inputs).logits
        with apart(copied):
            assert_near("logits", got, copied(**inputs).logits)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_model_in_training_are_independent(method, copied, contractions):
    model, inputs = adapted("llama", method)
    loss(model, inputs).backward()
    logits(model, inputs)
    twin = copied(model)
    before = logits(model, inputs)
    contractions.clear()
    assert torch.equal(logits(twin, inputs), before)
    assert contractions["together"]
    assert not contractions["alone"]
    step(twin, inputs)
    assert not torch.equal(logits(twin, inputs), before)
    assert_fresh(twin, inputs)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize(("method", "leave"), [("rep", "unload"), ("rep", "merge_and_unload"), ("adp", "unload")])
def test_nothing_is_left_of_it(method, leave):
    model, inputs = adapted("llama", method)
    logits(model, inputs)
    base = getattr(model, leave)()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert not base._forward_hooks_always_called
    again = get_peft_model(base, config_for(method, task_type="CAUSAL_LM"))
    assert_fresh(trained(again), inputs)
