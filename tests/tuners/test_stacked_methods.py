"""Adapters of two methods on one module: each is switched, saved and loaded as if it were there alone."""

import copy

import pytest
import torch
from peft import LoraConfig, set_peft_model_state_dict
from tolerances import assert_near
from tuners.families import build, logits
from tuners.wrapped import config_for, every_method, trained

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
LATER = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "k_proj"]),
    "rep": lambda: config_for("rep", target_modules=["q_proj", "k_proj"]),
    "adp": lambda: config_for("adp", target_modules=["q_proj", "k_proj"]),
}


@every_method
@pytest.mark.parametrize("later", LATER)
def test_an_adapter_that_lies_within_another_methods_is_saved_under_its_own_names(later, method, tmp_path):
    model, inputs = build("llama", dtype=torch.float64)
    plain = logits(model, inputs)
    model.add_adapter(config_for(method, target_modules=["q_proj", "v_proj"]), "one")
    alone = {name: value.clone() for name, value in trained(model).get_adapter_state_dict("one").items()}
    first = logits(model.eval(), inputs)
    if later == method:
        pytest.skip("one method has one layer for both")
    model.add_adapter(LATER[later](), "two")
    model.set_adapter("two")
    second = logits(trained(model, seed=2).eval(), inputs)
    assert not torch.allclose(first, second)
    for name, expected in (("one", first), ("two", second)):
        model.set_adapter(name)
        assert_near(name, logits(model, inputs), expected)
        model.save_pretrained(tmp_path / name)
        again, _ = build("llama", dtype=torch.float64)
        again.load_adapter(tmp_path / name)
        assert_near(f"{name}, loaded", logits(again.eval(), inputs), expected)
    beside = model.get_adapter_state_dict("one")
    assert beside.keys() == alone.keys()
    # and they find their way back
    trained(model, seed=3)
    set_peft_model_state_dict(model, copy.deepcopy(alone), "one")
    model.set_adapter("one")
    assert_near("set again", logits(model, inputs), first)
    model.delete_adapter("two")
    assert_near("alone again", logits(model, inputs), first)
    model.delete_adapter("one")
    assert torch.equal(logits(model, inputs), plain)
