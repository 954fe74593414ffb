"""The joint contraction of a model against its layers contracting one by one: values, gradients, and how often."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from tolerances import assert_near
from torch import Tensor, nn
from tuners.contracted import FIRST, adapted, apart, assert_trained_near, gradients, loss, write_in_place
from tuners.families import build, logits, randomise
from tuners.wrapped import config_for, every_method, layers_of, trained

from loretta import get_peft_model
from loretta.tuners.contraction import Contraction

FAMILIES = ["bert", "gpt2", "llama", "t5"]


KINDS: dict[str, dict[str, dict]] = {
    "rep": {
        "plain": {},
        "other ranks": {"rank_pattern": {FIRST: 2}},
        "other scales": {"alpha_pattern": {FIRST: 5}},
        "denoised": {"init_weights": "denoised", "alpha_pattern": {FIRST: 5}},
        "trained biases of the base": {"bias": "all"},
        "all linear": {"target_modules": "all-linear", "r": 2},
    },
    "shared": {
        "plain": {},
        "other scales": {"alpha_pattern": {FIRST: 5}},
        "denoised": {"init_weights": "denoised", "alpha_pattern": {FIRST: 5}},
        "all linear": {"target_modules": "all-linear"},
    },
    "adp": {
        "plain": {},
        "other ranks": {"rank_pattern": {FIRST: 2}, "scaling": 0.3},
        "no biases": {"train_bias": False},
        "denoised": {"init_weights": "denoised", "scaling": 0.3},
        "denoised, no biases": {"init_weights": "denoised", "train_bias": False},
        "trained biases of the base": {"bias": "all"},
        "all linear": {"target_modules": "all-linear", "insert_before": ["c_attn", "q_proj", "query", "q"]},
    },
}


@pytest.mark.parametrize(("method", "kind"), [(method, kind) for method in KINDS for kind in KINDS[method]])
@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_each_alone(family, method, kind, contractions):
    model, inputs = adapted(family, method, **KINDS[method][kind])
    embeddings = model.get_base_model().get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    inputs["inputs_embeds"] = embeddings

    def run() -> dict[str, Tensor]:
        embeddings.grad = None
        return gradients(model, lambda: loss(model, inputs).backward()) | {"input": embeddings.grad}

    with apart(model):
        ref, ref_logits = run(), logits(model, inputs)
    assert contractions["alone"]
    assert not contractions["together"]
    contractions.clear()
    got, got_logits = run(), logits(model, inputs)
    assert contractions["together"]
    assert not contractions["alone"]
    assert_near("logits", got_logits, ref_logits)
    assert_trained_near(got, ref)


@every_method
def test_a_call_contracts_each_kind_of_trains_once(method, contractions):
    model, inputs = adapted("llama", method, target_modules=["q_proj", "v_proj", "o_proj"])
    kinds = {(p.down, p.up) for layer in layers_of(model) for p in layer.placements.values()}
    assert len(kinds) == 2 < len(layers_of(model))  # v is narrower: its heads are shared
    for call in range(4):
        with torch.set_grad_enabled(call % 2 == 0):
            model(**inputs)
        assert contractions == {"together": 2 * len(kinds) * (call + 1)}


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_generation_contracts_once(family, method, contractions):
    model, inputs = adapted(family, method)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}
    whole, inputs = inputs, {name: inputs[name] for name in ("input_ids", "attention_mask")}
    got = model.generate(**inputs, **options)
    once = contractions["together"]
    assert once == 2 * len({(p.down, p.up) for layer in layers_of(model) for p in layer.placements.values()})
    # T5's encoder is called by itself, before the model
    in_encoder = len(layers_of(model.get_base_model().encoder)) if family == "t5" else 0
    assert contractions["alone"] == 2 * in_encoder
    assert torch.equal(model.generate(**inputs, **options), got)
    assert contractions["together"] == 2 * once
    contractions.clear()
    logits(model, whole)
    assert contractions["together"] == once  # nothing that a generation kept outlives it
    with apart(model):
        assert torch.equal(model.generate(**inputs, **options), got)


@every_method
def test_two_models_at_once(method):
    one, inputs = adapted("llama", method)
    other, _ = adapted("llama", method, seed=3)
    trained(other, seed=4)
    with apart(one), apart(other):
        refs = [gradients(model, lambda m=model: loss(m, inputs).backward()) for model in (one, other)]
    pending = [loss(one, inputs), loss(other, inputs)]
    logits(one, inputs)
    other.eval()
    for model, value, ref in zip((one, other), pending, refs, strict=True):
        assert_trained_near(gradients(model, value.backward), ref)


def injected(method: str, config) -> nn.Module:
    return inject_adapter_in_model(config, build("llama")[0])


def native(method: str, config) -> nn.Module:
    model = build("llama")[0]
    model.add_adapter(config)
    return model


def through_base(method: str, config) -> nn.Module:
    return get_peft_model(build("llama")[0], config).get_base_model()


@every_method
@pytest.mark.parametrize("way", [injected, native, through_base])
def test_every_way_into_a_model(method, way, contractions):
    model = way(method, config_for(method, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise([p for name, p in model.named_parameters() if "loretta_" in name], seed=3)
    model.double().eval()
    inputs = build("llama")[1]
    got, got_logits = gradients(model, lambda: loss(model, inputs).backward()), logits(model, inputs)
    assert contractions["together"]
    assert not contractions["alone"]
    with apart(model):
        assert_trained_near(got, gradients(model, lambda: loss(model, inputs).backward()))
        assert_near("logits", got_logits, logits(model, inputs))


@every_method
def test_an_adapted_model_within_an_adapted_model(method):
    base, inputs = build("t5")
    inject_adapter_in_model(config_for(method, target_modules=["v"], train_norms=False), base.encoder)
    model = inject_adapter_in_model(config_for(method, target_modules=["v", "wo"], train_norms=False), base)
    assert set(layers_of(model.encoder)) < set(layers_of(model))
    randomise([p for name, p in model.named_parameters() if "loretta_" in name], seed=3)
    model.double()
    for _ in range(2):
        got, got_logits = gradients(model, lambda: loss(model, inputs).backward()), logits(model, inputs)
        assert torch.equal(logits(model, inputs), got_logits)
        # apart for good: two models to attach to
        twin = copy.deepcopy(model)
        Contraction.detach(twin)
        Contraction.detach(twin.encoder)
        assert_trained_near(got, gradients(twin, lambda twin=twin: loss(twin, inputs).backward()))
        assert_near("logits", got_logits, logits(twin, inputs))
        write_in_place(model, inputs)


@every_method
def test_adapters_of_which_some_are_frozen(method):
    model, inputs = adapted("llama", method)
    frozen = layers_of(model)[1]
    with apart(model):
        ref = gradients(model, lambda: loss(model, inputs).backward())
    loss(model, inputs).backward()
    frozen.requires_grad_(False)
    names = {f"{path}.{name}" for path, m in model.named_modules() if m is frozen for name, _ in m.named_parameters()}
    for _ in range(2):
        got = gradients(model, lambda: loss(model, inputs).backward())
        assert_trained_near(got, {name: grad for name, grad in ref.items() if name not in names})
        model.eval().set_adapter("default")  # groups anew, now with the frozen ones apart
        frozen.requires_grad_(False)


@every_method
def test_two_active_adapters(method, contractions):
    scales = {"lora_alpha": 3} if method != "adp" else {"scaling": 0.4}
    model, inputs = adapted("llama", method, train_norms=False)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", train_norms=False, **scales))
    model.base_model.set_adapter(["default", "other"])
    trained(model.double(), seed=4)
    contractions.clear()
    got, got_logits = gradients(model, lambda: loss(model, inputs).backward()), logits(model, inputs)
    assert not contractions["alone"]
    with apart(model):
        assert_trained_near(got, gradients(model, lambda: loss(model, inputs).backward()))
        assert_near("logits", got_logits, logits(model, inputs))
    assert any(".other." in name for name in got)


@every_method
def test_mixed_batches(method):
    model, inputs = adapted("llama", method)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", tensor_rank=2))
    model.double().set_adapter("other")
    trained(model, seed=2)
    model.eval()
    rows = ["default", "other", "__base__", "other"]
    for _ in range(2):
        got = logits(model, inputs, adapter_names=rows)
        with apart(model):
            assert_near("logits", got, logits(model, inputs, adapter_names=rows))
        write_in_place(model, inputs)
