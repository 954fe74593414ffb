"""The label names of several adapters: the model answers with those of the one that computes, and keeps its own."""

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from tuners.families import build, logits
from tuners.wrapped import config_for, every_method, trained

from loretta import get_peft_model
from loretta.errors import InputError

ONE, OTHER = ["bad", "good"], ["red", "blue"]


def names(base) -> list[str]:
    assert base.config.label2id == {name: k for k, name in base.config.id2label.items()}
    return list(base.config.id2label.values())


def config(method: str, label_names: list[str] | None):
    return config_for(method, task_type="SEQ_CLS", label_names=label_names)


@every_method
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("native", [True, False], ids=["transformers", "peft"])
def test_names_follow_the_adapter_that_computes(native, method):
    base, _ = build("bert", "SEQ_CLS")
    own = names(base)
    if native:
        base.add_adapter(config(method, ONE), "one")
        base.add_adapter(config(method, OTHER), "other")
        base.add_adapter(config(method, None), "bare")
        model, off, on = base, base.disable_adapters, base.enable_adapters
    else:
        model = get_peft_model(base, config(method, ONE), adapter_name="one")
        model.add_adapter("other", config(method, OTHER))
        assert names(base) == ONE  # one that is added is not active
        model.add_adapter("bare", config(method, None))
        off, on = model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers
    for adapter, expected in (("one", ONE), ("bare", own), ("other", OTHER)):
        model.set_adapter(adapter)
        assert names(base) == expected
        off()
        assert names(base) == own
        on()
        assert names(base) == expected
    if not native:
        model.base_model.rename_adapter("other", "another")
        model.set_adapter("one")
        model.set_adapter("another")
        assert names(base) == OTHER
        model.set_adapter("one")
        model.delete_adapter("another")
        assert names(base) == ONE
        model.unload()
        assert names(base) == own


@every_method
def test_rows_of_a_fresh_head_are_as_many_as_the_names(method):
    seed_torch(0)
    base, inputs = build("bert", "SEQ_CLS")
    fresh = type(base)(base.config).eval()
    model = get_peft_model(fresh, config(method, ["a", "b", "c"])).eval()
    assert logits(model, inputs).shape[-1] == fresh.num_labels == 3
    assert names(fresh) == ["a", "b", "c"]


@every_method
def test_a_head_that_holds_something_keeps_its_rows(method):
    """One that was trained, and one that another adapter has copied: neither is replaced by a random one."""
    base, inputs = build("bert", "SEQ_CLS")
    before = logits(base, inputs)
    with pytest.raises(InputError, match=r"are 3 classes, and 'classifier' of this model answers with 2"):
        get_peft_model(base, config(method, ["a", "b", "c"]))
    assert torch.equal(logits(base, inputs), before)
    model = trained(get_peft_model(base, config(method, ONE)).eval())
    expected = logits(model, inputs)
    with pytest.raises(InputError, match="num_labels=3"):
        model.add_adapter("other", config(method, ["a", "b", "c"]))
    assert torch.equal(logits(model, inputs), expected)


@every_method
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_head_of_another_number_of_classes_is_refused_in_a_sentence(method, tmp_path):
    """torch spoke of a size mismatch in load_state_dict; LoRA's copies still end so."""
    model, inputs = build("bert", "SEQ_CLS", num_labels=3)
    model = trained(get_peft_model(model, config_for(method, task_type="SEQ_CLS"))).eval()
    model.save_pretrained(tmp_path)
    words = r"classifier.*\(3, ?\d*\), and this model has \(2, ?\d*\) there: load the model with num_labels=3"
    with pytest.raises(InputError, match=words):
        PeftModel.from_pretrained(build("bert", "SEQ_CLS", num_labels=2)[0], tmp_path)
    second = get_peft_model(build("bert", "SEQ_CLS", num_labels=2)[0], config_for(method, task_type="SEQ_CLS"))
    with pytest.raises(InputError, match=words):
        second.load_adapter(tmp_path, "second")
    native, _ = build("bert", "SEQ_CLS", num_labels=2)
    plain = logits(native.eval(), inputs)
    with pytest.raises(InputError, match=r"have other sizes on this model, .* with num_labels for as many classes"):
        native.load_adapter(tmp_path)
    assert torch.equal(logits(native, inputs), plain)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):  # as PEFT's: the head of the base stays
        PeftModel.from_pretrained(build("bert", "SEQ_CLS", num_labels=2)[0], tmp_path, ignore_mismatched_sizes=True)
    again = PeftModel.from_pretrained(build("bert", "SEQ_CLS", num_labels=3)[0], tmp_path)
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))
