"""Getting the base model back, and what PEFT may make a LoRA of."""

import copy
import warnings
from functools import partial

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from tolerances import assert_near
from tuners.families import OPTIONS, assert_plain, build, logits, natural_task
from tuners.wrapped import config_for, every_method, snapshot, trainable, trained, wrap

import loretta
from loretta import InputError


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's config says nothing of it
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_update_converts_to_a_lora_of_its_rank(family):
    model, inputs = wrap(family, "rep", train_norms=False, tensor_rank=3)
    trained(model)
    config, weights = convert_to_lora(model, rank=3)
    lora = get_peft_model(build(family)[0], config).eval()
    assert not set_peft_model_state_dict(lora, weights).unexpected_keys
    assert_near("logits", logits(lora, inputs), logits(model, inputs))
    assert model.supports_lora_conversion()
    assert not wrap(family, "adp")[0].supports_lora_conversion()


@every_method
@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("init_weights", ["zero", "gaussian"])
def test_unload_gives_the_base_model_back_bit_for_bit(family, init_weights, method):
    base, inputs = build(family)
    values = snapshot(base)
    model, _ = wrap(family, method, init_weights=init_weights)
    model.add_adapter("other", config_for(method, task_type=natural_task(family), tensor_rank=2))
    trained(model)
    assert not torch.allclose(logits(model, inputs), logits(base, inputs), rtol=1e-2)
    unloaded = model.unload()
    assert_plain(unloaded, family)
    now = unloaded.state_dict()
    assert all(torch.equal(now[name], value) for name, value in values.items())
    assert torch.equal(logits(unloaded, inputs), logits(base, inputs))


@every_method
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_an_unloaded_model_can_be_wrapped_again(family, method):
    model, inputs = wrap(family, method)
    trained(model)
    base = model.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of a model that is wrapped already
        again = PeftModel(base, config_for(method, task_type=natural_task(family)))
    trained(again)
    assert again.get_model_status().available_adapters == ["default"]
    assert logits(again, inputs).isfinite().all()


def test_a_merged_model_can_be_wrapped_again():
    model, inputs = wrap("bert", "rep")
    trained(model)
    expected = logits(model, inputs)
    again = PeftModel(model.merge_and_unload(), config_for("rep", task_type="SEQ_CLS", train_head="dense")).eval()
    assert_near("logits", logits(again, inputs), expected)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("bert", {}),  # whose first module is a norm
        ("bert", {"train_norms": False}),
        ("modernbert", {"train_norms": False, "train_head": "frozen"}),
        ("llama", {"train_norms": False, "modules_to_save": ["lm_head"]}),
    ],
)
def test_peft_does_not_convert_an_adapter_that_also_trains_norms_or_whole_modules(family, options, tmp_path):
    model, _ = wrap(family, "rep", **options)
    assert not model.supports_lora_conversion()
    loretta.rename_adapter(model, "default", "mine")
    for convert in (convert_to_lora, partial(save_as_lora, tmp_path)):
        with pytest.raises(InputError, match=r"'mine' also trains.*export"):
            convert(model, rank=3, adapter_name="mine")
    assert not list(tmp_path.iterdir())


def test_peft_converts_an_adapter_without_norms_beside_one_that_has_them_to_the_same_function(tmp_path):
    model, inputs = wrap("llama", "rep", train_norms=False, tensor_rank=2)
    expected = logits(trained(model), inputs)
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path, model, rank=2)
    assert_near("as LoRA", logits(PeftModel.from_pretrained(build("llama")[0], tmp_path).eval(), inputs), expected)
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM"))
    assert not model.supports_lora_conversion("other")
    # PEFT goes through every norm, whichever adapter trains it
    assert not model.base_model.supports_lora_conversion("default")
    with pytest.raises(InputError, match=r"'default' on a model whose norms \['other'\] trained.*export_lora"):
        convert_to_lora(model, rank=2)


@pytest.mark.parametrize("train_norms", [True, False])
def test_adp_says_why_it_cannot_become_a_lora(train_norms):
    model, _ = wrap("llama", "adp", train_norms=train_norms)
    assert not model.supports_lora_conversion()
    with pytest.raises(InputError, match=r"(non-linearity.*LoRETTA_rep|also trains norms.*train_norms=False)"):
        convert_to_lora(model, rank=2)


WHOLE = pytest.mark.parametrize("whole", ["lm_head", "norm", "embed_tokens", "mlp"])


@every_method
@WHOLE
def test_unloading_gives_modules_that_were_trained_whole_back(method, whole):
    base, inputs = build("llama")
    model, _ = wrap("llama", method, train_norms=False, modules_to_save=[whole])
    unloaded = trained(model).unload()
    assert_plain(unloaded, "llama")
    assert torch.equal(logits(unloaded, inputs), logits(base, inputs))


@WHOLE
def test_modules_that_were_trained_whole_follow_a_merge(whole):
    model, inputs = wrap("llama", "rep", modules_to_save=[whole])
    trained(model)
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM", modules_to_save=[whole]))
    model.set_adapter("other")
    wanted = logits(trained(model, seed=2).eval(), inputs)
    model.set_adapter("default")
    before = logits(model, inputs)
    model.merge_adapter(["other"])
    assert_near("merged", logits(model, inputs), wanted)
    model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), before)
    merged = model.merge_and_unload(adapter_names=["other"])
    assert_plain(merged, "llama")
    assert_near("unloaded", logits(merged, inputs), wanted)


@every_method
def test_trained_biases_that_stay_behind_are_named(method, tmp_path):
    def told(do) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            do()
        return sum("stay as the adapter 'default' has trained them" in str(warning.message) for warning in caught)

    base, inputs = build("gpt2")
    before = logits(base, inputs)
    for do in (lambda m: m.set_adapter("other"), lambda m: m.delete_adapter("default"), lambda m: m.unload()):
        model, _ = wrap("gpt2", method, bias="all")
        trained(model).add_adapter("other", config_for(method, task_type="CAUSAL_LM"))
        assert told(partial(model.set_adapter, "default")) == 0
        assert told(partial(do, model)) == 1
        inner = model.get_base_model()
        assert not torch.allclose(logits(inner, inputs), before, rtol=1e-3)
    model, _ = wrap("gpt2", method, bias="all")
    model.save_pretrained(tmp_path)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM"))
    loretta.rename_adapter(model, "default", "new")
    with pytest.warns(UserWarning, match="stay as the adapter 'new' has trained them"):
        model.set_adapter("other")
    model.set_adapter("new")
    assert sum("new" in name or name.endswith(".bias") for name in trainable(model)) == len(trainable(model))
    assert any(name.endswith("base_layer.bias") for name in trainable(model))

    def disable() -> None:
        with model.disable_adapter():
            pass

    loretta.rename_adapter(model, "new", "default")
    assert told(disable) == 0  # PEFT has words of its own for that
    model, _ = wrap("gpt2", method, target_modules=["c_attn"])
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM"))
    assert told(partial(model.set_adapter, "other")) == told(copy.deepcopy(model).unload) == 0
    model.delete_adapter("default")
    assert told(partial(model.load_adapter, str(tmp_path), "default")) == 1  # the other computes with them
    if method != "adp":
        assert told(wrap("gpt2", method, bias="all")[0].merge_and_unload) == 0
