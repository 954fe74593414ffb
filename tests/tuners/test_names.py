"""Names of adapters that PEFT could not tell from parts of other names are refused wherever a name is given."""

from collections import OrderedDict

import pytest
import torch
from draws import seeded
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from tuners.families import build, logits
from tuners.wrapped import config_for, every_method, trained, wrap

import loretta
from loretta import InputError, get_peft_model
from loretta.plan.plan import read_plan

# parts of a LLaMA's names, of what PEFT puts around them, of what our layers hold, and of what torch's modules have
PARTS = ["layers", "norm", "q_proj", "model", "0", "weight", "base_layer", "modules_to_save"]
OURS = ["up", "down", "values", "cores", "loretta_rep_down", "loretta_adp_bias", "keys", "training"]
OUTSIDE = ["/tmp/x", "../x", "a/../../x", "..", "__base__"]


@pytest.mark.sampled  # one check for all methods: each name with one of them
@every_method
@pytest.mark.parametrize("name", [*PARTS, *OURS, *OUTSIDE])
def test_a_name_that_would_be_mistaken_is_refused_and_nothing_changes(name, method, tmp_path):
    model, inputs = wrap("llama", method)
    trained(model)
    model.save_pretrained(tmp_path)
    before, saved = logits(model, inputs), get_peft_model_state_dict(model)
    attempts = {
        "add": lambda: model.add_adapter(name, config_for(method, task_type="CAUSAL_LM")),
        "load": lambda: model.load_adapter(str(tmp_path), name),
        "rename": lambda: loretta.rename_adapter(model, "default", name),
    }
    if method == "rep":
        attempts["sum"] = lambda: model.base_model.add_weighted_adapter(["default"], [1.0], name)
    for attempt in attempts.values():
        with pytest.raises(InputError, match=repr(name)):
            attempt()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), before)
    assert get_peft_model_state_dict(model).keys() == saved.keys()


@every_method
@pytest.mark.parametrize("name", ["layers", "values"])
def test_a_first_adapter_cannot_have_such_a_name_either(name, method, tmp_path):
    wrap("llama", method)[0].save_pretrained(tmp_path)
    for attempt in (
        lambda model: get_peft_model(model, config_for(method, task_type="CAUSAL_LM"), adapter_name=name),
        lambda model: PeftModel.from_pretrained(model, str(tmp_path), adapter_name=name),
        lambda model: model.add_adapter(config_for(method), adapter_name=name),
        lambda model: model.load_adapter(str(tmp_path), adapter_name=name),
    ):
        model = build("llama")[0]
        keys = set(model.state_dict())
        with pytest.raises(InputError, match=name):
            attempt(model)
        assert set(model.state_dict()) == keys


@pytest.mark.sampled
@every_method
@pytest.mark.parametrize("name", ["layer", "ups", "norm_2", "org/adapter", "vals", "Layers", "q"])
def test_names_that_only_resemble_a_part_save_everything(name, method, tmp_path):
    """Every tensor of both adapters is in its own file, and loads to the same logits."""
    model, inputs = wrap("llama", method)
    model.add_adapter(name, config_for(method, task_type="CAUSAL_LM"))
    expected = {}
    for k, adapter in enumerate(("default", name)):
        model.set_adapter(adapter)
        expected[adapter] = logits(trained(model, seed=k), inputs)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        again = PeftModel.from_pretrained(build("llama")[0], str(folder)).eval()
        assert torch.equal(logits(again, inputs), expected[adapter])


@every_method
def test_a_name_that_ends_like_a_module_that_is_trained_whole_is_refused(method):
    model, inputs = wrap("bert", method)
    before = logits(trained(model), inputs)
    with pytest.raises(InputError, match=r"'my_classifier'.*'classifier'"):
        model.add_adapter("my_classifier", config_for(method, task_type="SEQ_CLS"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), before)


@every_method
@pytest.mark.parametrize("ends", [["embeddings"], ["pooler"]], ids=["other", "head"])
def test_a_module_within_one_that_is_trained_whole_is_refused(ends, method):
    """Of BERT's embeddings three layers end like the module, and the pooler holds a layer of the head."""
    model, _ = build("bert")
    config = config_for(method, task_type="SEQ_CLS", modules_to_save=ends)
    with pytest.raises(InputError, match=rf"within 'bert.{ends[0]}'.*leave one of them out"):
        get_peft_model(model, config)
    assert not any("modules_to_save" in name for name, _ in model.named_modules())


def test_a_module_whose_name_begins_like_that_within_a_layer_keeps_it(tmp_path):
    block = nn.Sequential(OrderedDict(base_layer_one=nn.Linear(12, 12), two=nn.Linear(12, 12)))
    model = trained(
        get_peft_model(nn.Sequential(OrderedDict(block=block)), config_for("rep", target_modules="all-linear"))
    )
    x = torch.randn(3, 12, generator=seeded(0))
    expected = model(x)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected)
    assert [p.name for p in read_plan(model, "sum").placements] == ["block.base_layer_one", "block.two"]
