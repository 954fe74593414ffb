"""Adapters of one model of which one trains a module whole: the others leave it alone, or are refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from tolerances import assert_near
from tuners.families import build, kinds, logits
from tuners.wrapped import config_for, every_method, snapshot, trained

from loretta import InputError, get_peft_model


@every_method
@pytest.mark.parametrize(
    ("family", "task", "target", "whole"),
    [("llama", "CAUSAL_LM", "q_proj", ["lm_head"]), ("bert", "SEQ_CLS", "query", None)],
)
def test_all_linear_layers_are_the_same_beside_an_adapter_that_copied_some(
    family, task, target, whole, method, tmp_path
):
    """They were the copies too: the adapter on these came back on no model."""
    base, inputs = build(family, task)
    first = config_for(method, task_type=task, target_modules=[target], modules_to_save=whole)
    model = get_peft_model(base, first, "first").eval()
    model.add_adapter("second", config_for(method, task_type=task, target_modules="all-linear"))
    model.set_adapter("second")
    expected = logits(trained(model), inputs)
    alone = get_peft_model(build(family, task)[0], config_for(method, task_type=task, target_modules="all-linear"))
    assert get_peft_model_state_dict(model, adapter_name="second").keys() == get_peft_model_state_dict(alone).keys()
    assert sorted(model.peft_config["second"].target_modules) == sorted(alone.peft_config["default"].target_modules)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family, task)[0], tmp_path / "second").eval()
    assert_near("loaded", logits(again, inputs), expected)


OPTIONS = {
    "the module": ({"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}, "lm_head"),
    "a layer within": ({"target_modules": ["down_proj"]}, {"modules_to_save": ["mlp"]}, "model.layers.0.mlp"),
    "norms": ({"train_norms": True}, {"modules_to_save": ["model.norm"]}, "model.norm"),
    "scales": ({"train_scales": ["values"]}, {"modules_to_save": ["1.self_attn.v_proj"]}, "v_proj"),
    "a copy within": ({"modules_to_save": ["mlp.down_proj"]}, {"modules_to_save": ["mlp"]}, "down_proj"),
}


@every_method
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("what", OPTIONS)
def test_what_one_adapter_trains_whole_another_does_not_change(what, order, method):
    """The copy held the other's trains, so that neither was saved; norms and scales were left out without a word."""
    *options, named = OPTIONS[what]
    base, inputs = build("llama")
    plain = {"train_norms": False, "target_modules": ["q_proj"]}
    one, other = (config_for(method, task_type="CAUSAL_LM", **{**plain, **each}) for each in options[::order])
    model = trained(get_peft_model(base, one, "one")).eval()
    types, values, expected = kinds(model), snapshot(model), logits(model, inputs)
    with pytest.raises(InputError, match=r"is to be .* the adapter 'one'") as refused:
        model.add_adapter("other", other)
    assert named in str(refused.value)
    assert kinds(model) == types
    assert list(model.peft_config) == ["one"]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
@pytest.mark.parametrize("is_first", [True, False])
def test_nor_does_an_adapter_of_another_method(is_first):
    base, _ = build("llama")
    lora = LoraConfig(
        target_modules=["down_proj"] if is_first else ["q_proj"], modules_to_save=None if is_first else ["mlp"]
    )
    get_peft_model(base, lora, "first")
    ours = {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]} if is_first else {"target_modules": ["up_proj"]}
    with pytest.raises(InputError, match=r"adapter 'first' (changes|trains)"):
        get_peft_model(base, config_for("rep", **ours), "second")


@every_method
def test_an_adapter_that_copies_the_same_modules_is_welcome(method, tmp_path):
    model, inputs = build("llama")
    options = {"modules_to_save": ["mlp", "model.norm"], "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(model, config_for(method, task_type="CAUSAL_LM", **options), "one").eval()
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", **options))
    for seed, name in enumerate(("one", "other")):
        model.set_adapter(name)
        expected = logits(trained(model, seed), inputs)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build("llama")[0], tmp_path / name).eval()
        assert_near(name, logits(again, inputs), expected)


def test_targets_within_what_is_trained_whole_are_named_as_that():
    """The message asked whether 'dense' had been meant."""
    base, _ = build("t5", "SEQ_CLS")
    with pytest.raises(InputError, match=r"\['dense'\] not found .* trained whole \(classification_head\): name other"):
        get_peft_model(base, config_for("rep", task_type="SEQ_CLS", target_modules=["dense"]))


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
@every_method
@pytest.mark.parametrize(
    "first", [{"target_modules": ["o_proj"]}, {"modules_to_save": ["o_proj"]}, {"train_norms": True}]
)
def test_what_a_deleted_adapter_had_is_as_it_was_for_the_next_one(first, method):
    """Its empty layer could not be copied (a TypeError), and its empty wrapper not be adapted."""
    plain = {"train_norms": False, "target_modules": ["q_proj"]}
    whole = {"target_modules": ["o_proj"]} if "modules_to_save" in first else {"modules_to_save": ["o_proj", "norm"]}
    model = get_peft_model(build("llama")[0], config_for(method, **{**plain, **first}), "one")
    model.add_adapter("two", config_for(method, **plain))
    model.delete_adapter("one")
    model.add_adapter("three", config_for(method, **{**plain, **whole}))
    alone = get_peft_model(build("llama")[0], config_for(method, **{**plain, **whole}))
    assert get_peft_model_state_dict(model, adapter_name="three").keys() == get_peft_model_state_dict(alone).keys()


@every_method
@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only", "dense"])
def test_a_head_is_the_same_where_another_adapter_changes_its_hidden_layer(train_head, method):
    """It was left out of the head, and the adapter came back on no model: there it is in the head."""
    one = config_for(method, target_modules=["query", "pooler.dense"], train_norms=False)
    model = get_peft_model(build("bert", "SEQ_CLS")[0], one, "one")
    other = config_for(method, task_type="SEQ_CLS", target_modules=["query"], train_head=train_head)
    with pytest.raises(InputError, match=r"'bert.pooler.dense' is to be trained whole, and the adapter 'one' changes"):
        model.add_adapter("other", other)
