"""What one and two optimiser steps reach: everything that trains, and nothing else."""

import pytest
import torch
from draws import seeded
from peft import PeftModel
from tolerances import assert_gradients_near
from torch import nn
from tuners.families import OPTIONS, build, logits, loss_of
from tuners.wrapped import Two, config_for, every_method, own_trains, snapshot, trainable, trained, wrap

from loretta import get_peft_model
from loretta.layers.shared import SharedCores
from loretta.layers.trains import Cores
from loretta.tuners.layer import LorettaLayer

every_family = pytest.mark.parametrize("family", OPTIONS)


def seen_by_text(name: str) -> bool:
    """Whether text alone reaches a parameter: the norms of Gemma 3's vision half see pictures only."""
    return "vision_tower" not in name and "multi_modal_projector" not in name


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict) -> None:
    optimizer.zero_grad()
    loss_of(model, inputs).backward()
    optimizer.step()


def without_gradient(model: nn.Module) -> set[str]:
    """Names of what trains and has no gradient; cores one by one, with their number."""
    parts = {name: p.grad for name, p in trainable(model).items() if seen_by_text(name)}
    for prefix, cores in model.named_modules():
        if isinstance(cores, Cores) and (grad := parts.pop(f"{prefix}.values", None)) is not None:
            parts |= {f"{prefix}.{k}": core for k, core in enumerate(cores.split(grad))}
    return {name for name, grad in parts.items() if grad is None or not grad.any()}


def behind_the_zero_core(model: nn.Module, method: str) -> set[str]:
    """What can have no gradient while the last core of every "up" is zero."""
    names = set()
    for prefix, layer in model.named_modules():
        if isinstance(layer, SharedCores):
            names |= {f"{prefix}.{k}" for k in range(len(layer) - len(layer.shape.right))}
        if isinstance(layer, LorettaLayer) and method != "shared":
            down, up = (getattr(layer, f"loretta_{method}_{part}")["default"] for part in ("down", "up"))
            names |= {f"{prefix}.loretta_{method}_down.default.{k}" for k in range(len(down))}
            names |= {f"{prefix}.loretta_{method}_up.default.{k}" for k in range(len(up) - 1)}
            if method == "adp":
                names.add(f"{prefix}.loretta_adp_bias.default.down")
    return names


@every_method
@every_family
def test_two_steps_reach_everything_that_trains_and_nothing_else(family, method):
    model, inputs = wrap(family, method)
    before, values = logits(model, inputs), snapshot(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    step(model, optimizer, inputs)
    assert without_gradient(model) == behind_the_zero_core(model, method)
    after_one = logits(model, inputs)
    assert not torch.equal(after_one, before)
    step(model, optimizer, inputs)
    assert without_gradient(model) == set()
    assert not torch.equal(logits(model, inputs), after_one)
    now, names = model.state_dict(), set(trainable(model))
    frozen = set(now) - names
    at = {now[name].data_ptr() for name in names}
    tied = {name for name in frozen if now[name].data_ptr() in at}
    assert frozen - tied
    for name in frozen - tied:
        assert torch.equal(now[name], values[name]), f"{name} is frozen and changed"
    for name in names:
        assert not seen_by_text(name) or not torch.equal(now[name], values[name]), f"{name} trains and did not change"


@every_method
@every_family
def test_the_base_model_is_as_it_was_after_training_and_unloading(family, method):
    base, inputs = build(family)
    expected, values = logits(base, inputs), snapshot(base)
    model, _ = wrap(family, method)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    step(model, optimizer, inputs)
    step(model, optimizer, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    base_again = model.unload()
    again = base_again.state_dict()
    assert list(again) == list(values)
    assert all(torch.equal(again[name], value) for name, value in values.items())
    assert torch.equal(logits(base_again, inputs), expected)


@every_method
@pytest.mark.parametrize("train_norms", [True, False])
@every_family
def test_what_trains_is_cores_norms_and_head(family, method, train_norms):
    model, _ = wrap(family, method, train_norms=train_norms)
    names = set(trainable(model))
    ours = {name for name in names if f".loretta_{method}_" in name}
    assert ours == {
        name for name, _ in model.named_parameters() if f".loretta_{method}_" in name and "_start_" not in name
    }
    owners = {name.partition(".modules_to_save.")[0] for name in names - ours}
    owners |= {name.partition(f".loretta_{method}_norm_")[0] for name in ours if f".loretta_{method}_norm_" in name}
    norms = {
        name
        for name, module in build(family)[0].named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    }
    assert norms
    heads = {
        "bert": {"classifier", "bert.pooler.dense"},
        "roberta": {"classifier"},
        "electra": {"classifier"},
        "deberta": {"classifier", "pooler.dense"},
        "deberta-v2": {"classifier", "pooler.dense"},
        "modernbert": {"classifier", "head.dense"},
    }
    expected = heads.get(family, set()) | (norms if train_norms else set())
    assert {owner.removeprefix("base_model.model.") for owner in owners} == expected


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@every_method
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "modernbert"])
def test_gradient_checkpointing_gives_equal_gradients(family, method, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        # BART and T5 call dropout as a function too
        changes = {"bart": {"dropout": 0.0}, "t5": {"dropout_rate": 0.0}}.get(family, {})
        model, inputs = wrap(family, method, base=changes)
        model.double()  # checkpointing adds up the gradients of shared inputs in another order
        trained(model).train()
        for module in model.modules():  # two passes draw the same masks only without any
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        calls = []
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
            assert model.get_base_model().is_gradient_checkpointing
        layer = next(module for module in model.modules() if isinstance(module, LorettaLayer))
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss_of(model, inputs).backward()
        assert (len(calls) > 1) is checkpointing  # computed again in the backward pass
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    plain, checkpointed = gradients
    assert all(grad is not None and grad.any() for grad in plain.values())
    assert_gradients_near(checkpointed, plain)


@own_trains
def test_a_module_that_a_step_does_not_call_gets_zeros(method):
    """As under DDP, and unlike a LoRA's, which gets no gradient (docs/decisions.md)."""
    model = trained(get_peft_model(Two(), config_for(method, target_modules=["one", "two"])))
    base = model.get_base_model()
    base.forward = lambda x: base.one(x)
    model(torch.randn(5, 12, generator=seeded(0))).square().sum().backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) is (".one." in name)


# Biases of the base model


@every_method
def test_bias_all_trains_every_bias_of_the_base(method):
    model, inputs = wrap("gpt2", method, bias="all", train_norms=False)
    base_biases = {name for name, _ in build("gpt2")[0].named_parameters() if name.endswith("bias")}
    ours = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name in trainable(model)
        if f"loretta_{method}" not in name
    }
    assert ours == base_biases
    loss_of(model, inputs).backward()
    assert all(p.grad is not None for p in trainable(model).values())


@every_method
@pytest.mark.parametrize("train_norms", [False, True])
def test_bias_only_trains_the_biases_of_the_adapted_modules(method, train_norms):
    model, _ = wrap("gpt2", method, bias=f"loretta_{method}_only", train_norms=train_norms)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", train_norms=train_norms))
    ours = {name for name in trainable(model) if f"loretta_{method}" not in name}
    names = ["attn.c_proj", "mlp.c_proj"] if method == "adp" else ["attn.c_attn"]
    assert ours == {
        f"base_model.model.transformer.h.{layer}.{name}.base_layer.bias" for layer in (0, 1) for name in names
    }


@every_method
@pytest.mark.filterwarnings("ignore:the biases of the base model stay")
@pytest.mark.parametrize("bias", ["all", "only"])
def test_biases_train_with_the_adapter_that_has_them_and_with_no_other(method, bias, tmp_path):
    """Whichever was first, also where it is loaded."""
    bias = f"loretta_{method}_only" if bias == "only" else bias
    with_biases = {"bias": bias, "target_modules": ["c_proj"]}

    def biases(model) -> set[str]:
        return {name.replace(".base_layer", "") for name in trainable(model) if name.endswith("bias")}

    first, _ = wrap("gpt2", method, **with_biases)
    expected = biases(first)
    assert len([name for name in expected if "c_proj" in name]) == 4
    first.save_pretrained(tmp_path)
    assert biases(PeftModel.from_pretrained(build("gpt2")[0], tmp_path)) == set()
    second = wrap("gpt2", method, target_modules=["c_attn"])[0]
    second.add_adapter("own", config_for(method, task_type="CAUSAL_LM", **with_biases))
    loaded = wrap("gpt2", method, target_modules=["c_attn"])[0]
    loaded.load_adapter(str(tmp_path), "own", is_trainable=True)
    first.add_adapter("other", config_for(method, task_type="CAUSAL_LM", target_modules=["c_attn"]))
    for model, own, other in ((first, "default", "other"), (second, "own", "default"), (loaded, "own", "default")):
        for name, those in ((other, set()), (own, expected), (other, set())):
            model.set_adapter(name)
            assert biases(model) == those


@pytest.mark.parametrize("method", ["rep", "shared"])
@pytest.mark.parametrize("first", [{"train_norms": True}, {"train_scales": ["mlp"], "train_norms": False}])
@pytest.mark.filterwarnings("ignore:the biases of the base model stay")
@pytest.mark.parametrize("bias", ["all", "only"])
def test_trained_biases_are_saved_without_what_is_merged_into_them(method, first, bias, tmp_path):
    bias = f"loretta_{method}_only" if bias == "only" else bias
    model, inputs = wrap("gpt2", method, target_modules=["c_attn"], **first)
    trained(model)
    model.add_adapter(
        "biased", config_for(method, task_type="CAUSAL_LM", bias=bias, target_modules=["mlp.c_proj"], train_norms=False)
    )
    model.set_adapter("biased")
    trained(model, seed=2)
    expected = logits(model, inputs)
    model.set_adapter("default")
    model.merge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["biased"])
    again = PeftModel.from_pretrained(build("gpt2")[0], tmp_path / "biased").eval()
    assert torch.equal(logits(again, inputs), expected)


@every_method
def test_bias_all_trains_nothing_that_has_no_effect(method):
    model, inputs = wrap("bert", method, bias="all", train_head="dense")
    loss_of(model, inputs).backward()
    unused = {name for name, p in trainable(model).items() if p.grad is None}
    assert unused == set()


@every_method
@pytest.mark.parametrize("bias", ["all", "only"])
def test_trained_biases_are_saved_and_loaded(method, bias, tmp_path):
    bias = f"loretta_{method}_only" if bias == "only" else bias
    model, inputs = wrap("gpt2", method, bias=bias)
    trained(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("gpt2")[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@every_method
@pytest.mark.filterwarnings("ignore:the biases of the base model stay")
def test_trained_biases_are_saved_and_loaded_beside_an_adapter_elsewhere(method, tmp_path):
    def biased():
        return config_for(method, task_type="CAUSAL_LM", target_modules=["c_attn"], train_norms=False, bias="all")

    elsewhere = {"target_modules": ["mlp.c_proj"], "modules_to_save": ["0.attn.c_proj"]}  # beside norms
    other = config_for(method, task_type="CAUSAL_LM", **elsewhere)
    base, inputs = build("gpt2")
    model = trained(get_peft_model(base, biased())).eval()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "alone")
    model.add_adapter("other", other)
    model.save_pretrained(tmp_path / "beside", selected_adapters=["default"])
    again = PeftModel.from_pretrained(build("gpt2")[0], tmp_path / "beside").eval()
    assert torch.equal(logits(again, inputs), expected)
    for folder in ("alone", "beside"):
        beside = get_peft_model(build("gpt2")[0], other, adapter_name="other")
        beside.load_adapter(tmp_path / folder, "default")
        beside.set_adapter("default")
        assert torch.equal(logits(beside.eval(), inputs), expected)


# Further modules


@every_method
def test_modules_to_save_of_the_user_are_trained_and_saved(method, tmp_path):
    base, inputs = build("llama")
    options = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head", "layers.1.mlp.up_proj"]}
    model = get_peft_model(base, config_for(method, **options)).eval()
    copies = {name.partition(".modules_to_save.")[0] for name in trainable(model) if "modules_to_save" in name}
    copies = {name.removeprefix("base_model.model.") for name in copies if "norm" not in name}
    assert copies == {"lm_head", "model.layers.1.mlp.up_proj"}
    trained(model).save_pretrained(tmp_path)
    expected = logits(model, inputs)
    again = PeftModel.from_pretrained(build("llama")[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(build("llama")[0], inputs))


@pytest.mark.parametrize("family", ["gemma", "gpt2", "t5", "bart"])
@every_method
def test_tied_embeddings_stay_tied_and_untouched(family, method):
    model, inputs = wrap(family, method, base={"tie_word_embeddings": True})
    base = model.get_base_model()
    embedding, output = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    before = embedding.clone()
    assert output is embedding
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    step(model, optimizer, inputs)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    assert not embedding.requires_grad
