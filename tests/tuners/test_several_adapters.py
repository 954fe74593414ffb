"""Several adapters on one model: switching, switching off, deleting and adding up."""

import warnings

import pytest
import torch
from tolerances import assert_near
from tuners.families import build, logits, loss_of, natural_task
from tuners.pairs import alone, pair
from tuners.wrapped import CONFIGS, config_for, every_method, snapshot, trainable, trained, wrap

from loretta import InputError, get_peft_model
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.norms import TrainedNorm

FAMILIES = ["bert", "roberta", "deberta", "modernbert", "gpt2", "llama", "gemma2", "t5", "bart"]


every_family = pytest.mark.parametrize("family", FAMILIES)


deletes_the_active = pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")


@every_method
@every_family
def test_each_adapter_computes_as_if_it_were_the_only_one(family, method):
    model, inputs = pair(family, method)
    default, other, base = (alone(model, inputs, name) for name in ("default", "other", "__base__"))
    untouched, _ = build(family)
    assert torch.equal(base, logits(untouched, inputs))
    assert not torch.equal(default, other)
    only, _ = wrap(family, method)
    assert torch.equal(default, logits(trained(only, seed=1), inputs))
    assert torch.equal(alone(model, inputs, "default"), default)


@every_method
@every_family
def test_switching_moves_what_trains(family, method):
    model, _ = pair(family, method)
    for name, other in (("default", "other"), ("other", "default")):
        model.set_adapter(name)
        names = set(trainable(model))
        assert names
        assert all(f".{name}" in parameter and f".{other}" not in parameter for parameter in names)
        with model.disable_adapter():
            pass
        assert set(trainable(model)) == names
    fresh, _ = wrap(family, method, tensor_rank=2)
    assert {name.replace(".other", ".default") for name in names} == set(trainable(fresh))


@every_method
@every_family
def test_a_new_adapter_is_not_active_and_leaves_the_first_alone(family, method):
    model, inputs = wrap(family, method)
    trained(model)
    before, values, names = logits(model, inputs), snapshot(model), set(trainable(model))
    model.add_adapter("other", config_for(method, task_type=natural_task(family), tensor_rank=2))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, inputs), before)
    assert set(trainable(model)) == names
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in values.items())


@deletes_the_active
@every_method
@every_family
def test_deleting_an_adapter_leaves_nothing_of_it(family, method):
    model, inputs = pair(family, method)
    other, base = alone(model, inputs, "other"), alone(model, inputs, "__base__")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert not any(".default" in name for name in model.state_dict())
    for layer in (module for module in model.modules() if isinstance(module, LorettaLayer | TrainedNorm)):
        for key in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "default" not in getattr(layer, key), key
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), other)
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model.model, inputs), base)


@every_method
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_is_added_after_the_last_was_deleted(family, method):
    model, inputs = wrap(family, method)
    trained(model).delete_adapter("default")
    model.add_adapter("other", config_for(method, task_type=natural_task(family)))
    model.set_adapter("other")
    fresh, _ = wrap(family, method)
    assert {name.replace(".other", ".default") for name in trainable(model)} == set(trainable(fresh))
    trained(model)
    assert not torch.equal(logits(model, inputs), logits(build(family)[0], inputs))


@deletes_the_active
@every_method
def test_a_name_can_be_used_again_after_deletion(method):
    model, inputs = pair("bert", method)
    model.delete_adapter("default")
    model.add_adapter("default", config_for(method, task_type="SEQ_CLS", train_head="dense", train_norms=False))
    model.set_adapter("default")
    names = {name.removeprefix("base_model.model.") for name in trainable(model) if f"loretta_{method}" not in name}
    assert names == {
        f"{module}.modules_to_save.default.{part}"
        for module in ("classifier", "bert.pooler.dense")
        for part in ("weight", "bias")
    }
    assert torch.equal(logits(model, inputs), alone(model, inputs, "__base__"))


@deletes_the_active
@every_method
@pytest.mark.parametrize("of_the_first", [True, False])
def test_the_norms_follow_when_the_active_adapter_is_deleted(of_the_first, method):
    """One of the two adapters trains norms and the other does not."""
    model, inputs = pair("llama", method, train_norms=of_the_first, second={"train_norms": not of_the_first})
    other = alone(model, inputs, "other")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, inputs), other)
    assert any("norm" in name for name in trainable(model)) is not of_the_first


@every_method
def test_one_of_three_active_adapters_is_deleted(method):
    model, inputs = pair("llama", method)
    model.add_adapter("plain", config_for(method, task_type="CAUSAL_LM", train_norms=False))
    model.set_adapter("plain")
    trained(model, seed=3)
    model.set_adapter("other")
    model.base_model.set_adapter(["other", "plain"])
    wanted, names = logits(model, inputs), set(trainable(model))
    model.base_model.set_adapter(["default", "other", "plain"])
    model.base_model.delete_adapter("default")
    assert torch.equal(logits(model, inputs), wanted)
    assert set(trainable(model)) == names


@every_method
def test_two_heads_at_once_are_refused_and_nothing_is_switched(method):
    model, inputs = pair("bert", method)
    before, names = logits(model, inputs), set(trainable(model))
    words = r"only one of the adapters 'default', 'other' can be active at a time, for each has a copy of '\S+'$"
    with pytest.raises(InputError, match=words):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model, inputs), before)
    assert set(trainable(model)) == names


@deletes_the_active
@every_method
def test_the_policy_of_a_deleted_adapter_is_forgotten(method):
    model, _ = pair("roberta", method)
    model.delete_adapter("default")
    # no task type: nothing asks for a tensorised head now
    model.add_adapter("default", config_for(method, modules_to_save=["classifier"], train_norms=False))
    model.set_adapter("default")
    names = {name.removeprefix("base_model.model.") for name in trainable(model) if f"loretta_{method}" not in name}
    assert names == {
        f"classifier.modules_to_save.default.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }


@every_method
def test_an_adapter_that_is_named_twice_acts_once(method):
    model, inputs = pair("llama", method)
    model.set_adapter("default")
    expected = logits(model, inputs)
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_two_active_updates_of_rep_add_up(family):
    model, inputs = pair(family, "rep", train_norms=False)
    model.double().base_model.set_adapter(["default", "other"])
    got = logits(model, inputs)
    base = build(family)[0].double()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LorettaLayer):
            weight = base.get_submodule(name).weight
            with torch.no_grad():
                weight += layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert_near("logits", got, logits(base, inputs))
    with model.disable_adapter():
        assert not torch.equal(got, logits(model, inputs))


@every_method
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
def test_two_active_adapters_see_the_same_input(method, init_weights):
    model, _ = pair("llama", method, train_norms=False, init_weights=init_weights)
    model.base_model.set_adapter(["default", "other"])
    layer = next(module for module in model.modules() if isinstance(module, LorettaLayer))
    x = torch.randn(3, 5, layer.in_features)
    y = layer.base_layer(x)
    adapted = y if method == "adp" else x
    expected = y + layer.delta("default", adapted) + layer.delta("other", adapted)
    assert_near("y", layer(x), expected)
    assert not torch.equal(layer.delta("default", adapted), layer.delta("other", adapted))


def test_adapters_before_and_after_one_module_are_both_applied():
    options = {"target_modules": ["o_proj"], "train_norms": False}
    model, _ = pair("llama", "adp", **options, second={"insert_before": ["o_proj"]})
    model.base_model.set_adapter(["default", "other"])
    layer = next(module for module in model.modules() if isinstance(module, LorettaLayer))
    x = torch.randn(3, 5, layer.in_features)
    y = layer.base_layer(x + layer.delta("other", x))
    assert_near("y", layer(x), y + layer.delta("default", y))


@every_method
def test_layer_status_of_two_adapters(method):
    model, _ = pair("llama", method)
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False}


@every_method
@pytest.mark.parametrize(("family", "again"), [("roberta", None), *(("llama", again) for again in CONFIGS)])
def test_a_model_that_is_wrapped_again_starts_anew(family, again, method):
    """PEFT resets the trains of such an adapter, and would go on with its norms, its head and its other targets."""
    targets = {"roberta": ["query", "key"], "llama": ["q_proj", "v_proj"]}[family]
    model, inputs = wrap(family, method, target_modules=targets)
    expected = logits(build(family)[0], inputs)
    trained(model)
    options = {"task_type": natural_task(family), "target_modules": targets[:1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second time
        second = get_peft_model(model.get_base_model(), config_for(again or method, **options)).eval()
    assert torch.equal(logits(second, inputs), expected)
    fresh = get_peft_model(build(family)[0], config_for(again or method, **options))
    assert {n: p.shape for n, p in trainable(second).items()} == {n: p.shape for n, p in trainable(fresh).items()}
    assert second.state_dict().keys() == fresh.state_dict().keys()
    loss_of(second.train(), inputs).backward()
    assert all(parameter.grad is not None for parameter in trainable(second).values())


@every_method
def test_an_adapter_that_is_added_while_all_are_off_is_off(method):
    model, inputs = pair("llama", method)
    base, active = logits(build("llama")[0], inputs), logits(model, inputs)
    with model.disable_adapter():
        options = {"task_type": "CAUSAL_LM", "init_weights": "gaussian", "target_modules": ["up_proj"]}
        model.add_adapter("third", config_for(method, **options))
        assert torch.equal(logits(model, inputs), base)
        model.set_adapter("third")
        assert torch.equal(logits(model, inputs), base)
    assert not torch.equal(logits(model, inputs), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), active)


@deletes_the_active
@every_method
def test_the_next_adapter_may_have_no_place_in_the_first_layer(method):
    """PEFT asks the first layer what is active after a deletion. The head of the next adapter is, too."""
    model, inputs = pair("bert", method, second={"target_modules": ["value", "layer.1.output.dense"]})
    expected = alone(model, inputs, "other")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, inputs), expected)


@every_method
def test_an_unknown_name_is_not_made_active_and_nothing_is_switched(method):
    """It silenced the adapter that it stood for, as LoRA's does."""
    model, inputs = pair("llama", method)
    expected = logits(model, inputs)
    for names in ("typo", ["default", "typo"]):
        with pytest.raises(InputError, match=r"cannot activate \['typo'\]: loaded are default, other"):
            model.base_model.set_adapter(names)
        assert model.active_adapters == ["default"]
        assert torch.equal(logits(model, inputs), expected)
