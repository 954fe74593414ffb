"""Modules and weights that a model has in several places: what is adapted in one of them is not merged into all."""

import warnings
from collections import OrderedDict

import pytest
import torch
from draws import seeded
from torch import nn
from tuners.families import build, loss_of
from tuners.wrapped import config_for, every_method, trainable, trained

from loretta import InputError, get_peft_model


def with_one_under_two_names() -> nn.Module:
    first, norm = nn.Linear(12, 12), nn.LayerNorm(12)
    return nn.Sequential(OrderedDict(first=first, norm=norm, again=first, last=nn.Linear(12, 12), norm_again=norm))


def with_tied_norms() -> nn.Module:
    model = nn.Sequential(OrderedDict(norm=nn.LayerNorm(12), linear=nn.Linear(12, 12), other=nn.LayerNorm(12)))
    model.other.weight, model.other.bias = model.norm.weight, model.norm.bias
    return model


@every_method
def test_a_module_under_two_names_is_named(method):
    """PEFT goes through a model's modules, each of them once, and so would a LoRA be on one of its places alone."""
    with pytest.warns(UserWarning, match="2 of the adapted modules under other names as well.*: first, norm;"):
        model = get_peft_model(with_one_under_two_names(), config_for(method, target_modules=["first", "last"]))
    assert isinstance(model.get_base_model().again, nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # two names above it are no other place
        block = nn.Sequential(OrderedDict(first=nn.Linear(12, 12)))
        get_peft_model(nn.ModuleDict({"one": block, "two": block}), config_for(method, target_modules=["first"]))


@pytest.mark.parametrize("method", ["rep", "shared"])
@pytest.mark.parametrize(
    ("build", "targets", "words"),
    [
        (with_one_under_two_names, ["first"], "'first', a module that the model also has under another name"),
        (with_one_under_two_names, ["last"], "'norm', a module that the model also has under another name"),
        (with_tied_norms, ["linear"], "'norm', whose weight is tied"),
    ],
)
@pytest.mark.filterwarnings("ignore:the model has .* under other names")
def test_what_acts_in_one_place_is_not_merged_into_all(build, targets, words, method):
    model = trained(get_peft_model(build(), config_for(method, target_modules=targets)).double().eval())
    x = torch.randn(3, 12, generator=seeded(0), dtype=torch.float64)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match=f"cannot merge into {words}"):
            merge()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", ["rep", "shared"])
def test_tied_norms_that_are_not_trained_are_no_reason(method):
    base = with_tied_norms().double()
    model = trained(get_peft_model(base, config_for(method, target_modules=["linear"], train_norms=False)).eval())
    x = torch.randn(3, 12, generator=seeded(0), dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@every_method
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_copy_beside_modules_of_the_same_weight_that_are_called_in_its_place_is_named(method):
    """T5's encoder and decoder have embeddings of their own, whose weight is that of ``shared``."""
    for whole, said in (["shared"], ["shared"]), (["encoder.embed_tokens", "decoder.embed_tokens"], []):
        base, inputs = build("t5")
        model = get_peft_model(base, config_for(method, task_type="SEQ_2_SEQ_LM", modules_to_save=whole)).train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_of(model, inputs).backward()
        names = [str(warning.message).split("'")[1] for warning in caught if "nothing of" in str(warning.message)]
        assert [name.removeprefix("base_model.model.") for name in names] == said
        gradients = [p.grad for name, p in trainable(model).items() if "modules_to_save" in name]
        assert [gradient is None for gradient in gradients] == [bool(said)] * len(whole)
