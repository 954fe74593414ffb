"""Other names and other values for adapters that are already loaded."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from tolerances import assert_near
from tuners.families import build, logits, natural_task
from tuners.wrapped import config_for, every_method, snapshot, trainable, trained, wrap

import loretta
from loretta import InputError

every_family = pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5"])


def saved(folder, family: str, method: str, seed: int, **options):
    """A trained adapter on disk, and what it computes."""
    model, inputs = wrap(family, method, **options)
    trained(model, seed=seed).save_pretrained(folder)
    return logits(model, inputs)


@every_method
@every_family
def test_a_renamed_adapter_computes_trains_and_saves_as_before(family, method, tmp_path):
    model, inputs = wrap(family, method)
    trained(model)
    before, names = logits(model, inputs), {name.replace(".default", ".new") for name in trainable(model)}
    loretta.rename_adapter(model, "default", "new")
    assert list(model.peft_config) == ["new"]
    assert model.active_adapter == "new"
    assert not any(".default" in name for name in model.state_dict())
    assert set(trainable(model)) == names
    assert torch.equal(logits(model, inputs), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family, natural_task(family))[0], tmp_path / "new").eval()
    assert torch.equal(logits(again, inputs), before)


@every_method
def test_the_inactive_of_two_adapters_can_be_renamed(method):
    model, inputs = wrap("bert", method)
    before = logits(trained(model), inputs)
    model.add_adapter("other", config_for(method, task_type="SEQ_CLS", modules_to_save=["word_embeddings"]))
    loretta.rename_adapter(model, "other", "third")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, inputs), before)
    model.set_adapter("third")
    assert all(".third" in name for name in trainable(model))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("absent", "x", "'absent'.*default"),
        ("default", "other", "'other'"),
        ("default", "x.y", "'x.y'"),
        ("default", "", "''"),
        ("default", "values", "'values'"),
        ("default", "training", "'training'"),
    ],
)
def test_a_name_that_is_missing_taken_or_impossible(old, new, words):
    model, inputs = wrap("llama", "rep")
    model.add_adapter("other", config_for("rep"))
    before = logits(trained(model), inputs)
    with pytest.raises(InputError, match=words):
        loretta.rename_adapter(model, old, new)
    assert torch.equal(logits(model, inputs), before)
    assert set(model.peft_config) == {"default", "other"}


@every_method
@every_family
def test_a_swapped_adapter_computes_as_the_loaded_one(family, method, tmp_path):
    wanted = saved(tmp_path, family, method, seed=5)
    model, inputs = wrap(family, method)
    assert not torch.equal(logits(trained(model), inputs), wanted)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    loretta.hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model, inputs), wanted)
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def load_onto(model: PeftModel, folder) -> None:
    """PEFT's own road to other values: a name that is taken. LoRA keeps the old scale there."""
    model.load_adapter(folder, "default", is_trainable=True)


both_roads = pytest.mark.parametrize("load", [loretta.hotswap_adapter, load_onto])


@both_roads
@every_method
def test_the_scale_comes_with_the_values(method, load, tmp_path):
    alpha = {"lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"layers.1.*q_proj": 40}}
    option = "scaling" if method == "adp" else "lora_alpha"
    wanted = saved(tmp_path, "llama", method, seed=5, **({"scaling": 3.0} if method == "adp" else alpha))
    model, inputs = wrap("llama", method)
    load(model, tmp_path)
    assert torch.equal(logits(model, inputs), wanted)
    assert getattr(model.peft_config["default"], option) == (3.0 if method == "adp" else 5)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build("llama")[0], tmp_path / "again").eval()
    assert torch.equal(logits(again, inputs), wanted)


def test_values_without_a_config_keep_the_scale_that_is_there(tmp_path):
    saved(tmp_path, "llama", "rep", seed=5, lora_alpha=5)
    (tmp_path / "adapter_config.json").unlink()
    model, _ = wrap("llama", "rep")
    load_onto(model, tmp_path)
    assert model.peft_config["default"].lora_alpha == 16


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("rep", {"r": 4}, "r=4 instead of 8"),
        ("rep", {"tensor_rank": 2}, "tensor_rank=2 instead of 3"),
        ("rep", {"target_modules": ["q_proj"]}, "target_modules"),
        ("rep", {"train_norms": False}, "train_norms=False instead of True"),
        ("rep", {"init_weights": "denoised"}, "start_down"),
        ("adp", {}, "LORETTA_ADP adapter, and 'default' is"),
    ],
)
@both_roads
def test_an_adapter_that_cannot_take_the_place(load, method, options, words, tmp_path):
    saved(tmp_path, "llama", method, seed=5, **options)
    model, inputs = wrap("llama", "rep")
    values, before = snapshot(model), logits(trained(model), inputs)
    by_peft = rf"{words}|needs .* here|file lacks \d+ tensors? \(|has no place"  # the tensors come first there
    with pytest.raises(InputError, match=words if load is loretta.hotswap_adapter else by_peft):
        load(model, tmp_path)
    assert snapshot(model).keys() == values.keys()
    assert torch.equal(logits(model, inputs), before)


def test_no_swap_into_merged_weights(tmp_path):
    saved(tmp_path, "llama", "rep", seed=5)
    model, inputs = wrap("llama", "rep")
    expected = logits(model, inputs)
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge"):
        loretta.hotswap_adapter(model, tmp_path)
    with pytest.raises(InputError, match="unmerge"):  # by PEFT's own road
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    assert_near("as before", logits(model, inputs), expected)


@every_method
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5"])
def test_two_active_adapters_add_up_their_norms_too(family, method):
    """The same change by one adapter, or by two that make half of it each."""
    task = natural_task(family)
    model, inputs = wrap(family, method, task)
    model.double()
    norms = {name: value for name, value in trainable(model).items() if "_norm_" in name}
    base = {name: value.detach().clone() for name, value in norms.items()}
    trained(model)  # the trains too
    model.add_adapter("other", config_for(method, task_type=task))
    whole = {name: value.detach().clone() for name, value in norms.items()}
    parameters = dict(model.named_parameters())
    wanted = logits(model.double(), inputs)
    with torch.no_grad():
        for name, value in norms.items():
            value.copy_(base[name] + 0.25 * (whole[name] - base[name]))
            parameters[name.replace(".default", ".other")].copy_(base[name] + 0.75 * (whole[name] - base[name]))
    model.base_model.set_adapter(["default", "other"])
    assert_near("logits", logits(model, inputs), wanted)
    active = set(trainable(model))
    assert active == {name.replace(".default", f".{new}") for name in active for new in ("default", "other")}
    logits_of_two = logits(model, inputs)
    with model.disable_adapter():
        assert not torch.equal(logits(model, inputs), logits_of_two)
    assert set(trainable(model)) == active
    if method != "adp":
        merged = copy.deepcopy(model).merge_and_unload()
        assert_near("merged", logits(merged, inputs), logits_of_two)
    model.base_model.delete_adapter("other")
    assert model.active_adapters == ["default"]


@every_method
def test_gradients_reach_the_norms_of_both_active_adapters(method):
    model, inputs = wrap("llama", method)
    trained(model)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    model(**inputs).logits.square().sum().backward()
    norms = [value for name, value in trainable(model).items() if "_norm_" in name]
    assert norms
    assert all(value.grad.any() for value in norms)


def test_names_that_peft_has_repeated_are_no_other_option(tmp_path):
    """PEFT adds those of the head to the list of both configs, where one was made from the other."""
    model, inputs = wrap("bert", "rep")
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    model.add_adapter("other", replace(model.peft_config["default"], tensor_rank=2))
    assert len(model.peft_config["default"].modules_to_save) > len({*model.peft_config["default"].modules_to_save})
    trained(model, seed=7)
    loretta.hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model, inputs), expected)
