"""Merging rep into plain weights, refusing to merge adp, and getting the base model back from both."""

import copy
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
from draws import seeded
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from tolerances import assert_near
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D
from tuners.families import OPTIONS, build, logits, natural_task
from tuners.wrapped import config_for, every_method, snapshot, trained, wrap

import loretta
from loretta import InputError
from loretta.tuners.adp import AdpLinear
from loretta.tuners.norms import TrainedNorm
from loretta.tuners.rep import RepLinear

every_family = pytest.mark.parametrize("family", OPTIONS)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def adapted(model: nn.Module) -> list[RepLinear]:
    return [module for module in model.modules() if isinstance(module, RepLinear)]


def assert_plain(merged: nn.Module, family: str, task: str | None = None) -> None:
    """The model is built as the base model is: same modules, same parameters, nothing of ours."""
    base, _ = build(family, task)
    assert kinds(merged) == kinds(base)
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in base.state_dict().items()
    }
    assert not hasattr(merged, "peft_config")


@every_family
def test_a_merged_model_is_a_plain_one_with_the_same_logits(family):
    model, inputs = wrap(family, "rep")
    trained(model).double()
    expected = logits(model, inputs)
    base, _ = build(family, dtype=torch.float64)
    merged = model.merge_and_unload()
    assert_plain(merged, family)
    assert_near("logits", logits(merged, inputs), expected)
    assert not torch.allclose(logits(merged, inputs), logits(base, inputs), rtol=1e-2)


@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only", "dense", "frozen"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "deberta-v2", "electra", "modernbert", "bart", "t5"])
def test_merging_makes_heads_dense(family, train_head):
    model, inputs = wrap(family, "rep", "SEQ_CLS", train_head=train_head)
    trained(model).double()
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert_plain(merged, family, "SEQ_CLS")
    assert_near("logits", logits(merged, inputs), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("options", [{"init_weights": "denoised"}, {"use_rslora": True, "lora_alpha": 3}, {"r": 2}])
def test_every_kind_of_update_merges(family, options):
    model, inputs = wrap(family, "rep", **options)
    trained(model).double()
    expected = logits(model, inputs)
    assert_near("logits", logits(model.merge_and_unload(safe_merge=True), inputs), expected)


def test_merging_in_bfloat16_rounds_once():
    model, inputs = wrap("llama", "rep", base={"dtype": torch.bfloat16}, train_norms=False)
    trained(model)
    weights = {
        name: (layer.base_layer.weight.float() + layer.get_delta_weight("default").float()).bfloat16()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, RepLinear)
    }
    merged = model.merge_and_unload()
    for name, weight in weights.items():
        assert merged.get_submodule(name).weight.dtype == torch.bfloat16
        assert_near(name, merged.get_submodule(name).weight, weight)
    assert logits(merged, inputs).isfinite().all()


@every_family
def test_merging_can_be_undone(family):
    model, inputs = wrap(family, "rep")
    trained(model).double()
    unmerged = logits(model, inputs)
    values = snapshot(model)
    model.merge_adapter()
    assert {tuple(layer.merged_adapters) for layer in adapted(model)} == {("default",)}
    assert_near("merged", logits(model, inputs), unmerged)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, values[name])}
    assert changed == {
        f"{name}.base_layer.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, RepLinear | TrainedNorm)
        for parameter in getattr(module, "parameter_names", ["weight"])
    }
    norms = {name for name, module in model.named_modules() if isinstance(module, TrainedNorm)}
    model.unmerge_adapter()
    changed = {name for name in changed if name.partition(".base_layer")[0] not in norms}  # these come back exactly
    assert not any(layer.merged for layer in adapted(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]) or name in changed
        assert_near(name, value, values[name])
    assert_near("unmerged", logits(model, inputs), unmerged)


def test_disabling_a_merged_adapter_unmerges_it():
    model, inputs = wrap("llama", "rep", train_norms=False)
    trained(model)
    base, _ = build("llama")
    model.merge_adapter()
    with model.disable_adapter():
        assert_near("base", logits(model, inputs), logits(base, inputs))


def test_merging_twice_merges_once():
    model, inputs = wrap("llama", "rep", train_norms=False)
    expected = logits(trained(model), inputs)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.merge_adapter()
    assert_near("logits", logits(model, inputs), expected)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_near("logits", logits(model, inputs), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_conv1d_and_linear_are_merged_in_their_own_orientation(family):
    model, _ = wrap(family, "rep")
    trained(model)
    for layer in adapted(model):
        base = layer.get_base_layer()
        assert isinstance(base, Conv1D if family == "gpt2" else nn.Linear)
        before = base.weight.clone()
        a_IR, b_RO = layer.factors("default")
        delta_IO = layer.scaling["default"] * a_IR @ b_RO
        layer.merge()
        assert_near("weight", base.weight, before + (delta_IO if family == "gpt2" else delta_IO.T))


def test_two_adapters_merge_to_the_sum_of_their_updates():
    model, inputs = wrap("gpt2", "rep", train_norms=False)
    trained(model)
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM", tensor_rank=2, train_norms=False))
    model.base_model.set_adapter(["default", "other"])
    trained(model, seed=5)
    expected = logits(model, inputs)
    assert_near("logits", logits(model.merge_and_unload(adapter_names=["default", "other"]), inputs), expected)


def test_only_the_named_adapter_is_merged():
    model, inputs = wrap("llama", "rep", train_norms=False)
    trained(model)
    expected = logits(model, inputs)
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM", train_norms=False, init_weights="gaussian"))
    model.set_adapter("other")
    assert_near("logits", logits(model.merge_and_unload(adapter_names=["default"]), inputs), expected)


def two_adapters() -> tuple[PeftModel, dict[str, Tensor], dict[tuple[str, ...], Tensor]]:
    """A model with the norms of two adapters too, and its logits with each and with both; "default" is active."""
    model, inputs = wrap("llama", "rep")
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM", tensor_rank=2))
    model.base_model.set_adapter(["default", "other"])
    trained(model)
    expected = {}
    for names in (["other"], ["default", "other"], ["default"]):
        model.base_model.set_adapter(names)
        expected[tuple(names)] = logits(model, inputs)
    return model, inputs, expected


@pytest.mark.parametrize("names", [("default",), ("other",), ("default", "other")], ids=str)
def test_norms_follow_what_is_merged_and_not_what_is_active(names):
    model, inputs, expected = two_adapters()
    model.merge_adapter(list(names))
    assert_near("merged", logits(model, inputs), expected[names])
    assert model.get_model_status().merged_adapters == list(names)
    copied = copy.deepcopy(model)
    assert_near("copied", logits(copied, inputs), expected[names])
    model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), expected["default",])
    assert model.get_model_status().merged_adapters == []
    with copied.disable_adapter():
        pass
    assert_near("switched off and on", logits(copied, inputs), expected["default",])
    copied.merge_adapter(list(names))
    with pytest.warns(UserWarning, match="Unmerging"):
        copied.set_adapter("other")
    assert_near("switched", logits(copied, inputs), expected["other",])


@pytest.mark.filterwarnings("ignore:All adapters are already merged", "ignore:Already following adapters")
@pytest.mark.parametrize("names", [("default",), ("other",), ("default", "other")], ids=str)
def test_unloading_keeps_what_is_merged_already(names):
    model, inputs, expected = two_adapters()
    model.merge_adapter(list(names))
    assert_near("unload", logits(copy.deepcopy(model).unload(), inputs), expected[names])
    # and the active one on top of it
    both = tuple(sorted({*names, "default"}))
    assert_near("merge_and_unload", logits(model.merge_and_unload(), inputs), expected[both])


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite(how, bad):
    model, _ = wrap("llama", "rep", train_norms=False)
    trained(model)
    first = adapted(model)[0]
    with torch.no_grad():
        first.loretta_rep_down["default"][0][0, 0, 0] = bad
    values = snapshot(model)
    with pytest.raises(ValueError, match="default"):
        getattr(model, how)(safe_merge=True)
    assert all(torch.equal(value.nan_to_num(), values[k].nan_to_num()) for k, value in model.state_dict().items())
    assert model.get_model_status().merged_adapters == []


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


# adp


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_adp_says_why_it_cannot_merge_and_touches_nothing(family, how):
    model, inputs = wrap(family, "adp")
    trained(model)
    values, types, expected = snapshot(model), kinds(model), logits(model, inputs)
    with pytest.raises(ValueError, match=r"cannot be merged.*non-linearity.*LoRETTA_rep"):
        getattr(model, how)()
    assert kinds(model) == types
    now = model.state_dict()
    assert list(now) == list(values)
    assert all(torch.equal(now[name], value) for name, value in values.items())
    assert torch.equal(logits(model, inputs), expected)
    layer = next(module for module in model.modules() if isinstance(module, AdpLinear))
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()
    model.unmerge_adapter()  # nothing to undo, and nothing wrong
    assert torch.equal(logits(model, inputs), expected)


# Unloading


@every_method
@every_family
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


def test_merging_some_of_the_active_adapters_is_refused():
    model, inputs, expected = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    for names in (["default"], ["other"]):
        with pytest.raises(InputError, match=r"cannot merge \['\w+'\] alone.*set_adapter"):
            model.merge_adapter(names)
        assert_near("as before", logits(model, inputs), expected["default", "other"])
    model.merge_adapter(["other", "default"])
    assert_near("merged", logits(model, inputs), expected["default", "other"])


@pytest.mark.parametrize("method", ["rep", "shared"])
@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    ],
    ids=["parametrized", "by a hook", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_that_is_computed_from_others_is_not_merged_into(computed, method):
    """What is written into it is gone at the next call."""
    base = nn.Sequential(OrderedDict(first=computed(nn.Linear(16, 24)), second=nn.Linear(24, 8)))
    model = get_peft_model(base, config_for(method, target_modules=["first", "second"], train_norms=False)).eval()
    x, _ = torch.randn(3, 16, generator=seeded(0)), trained(model)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match="cannot merge into 'first', whose weight is computed"):
            merge()
        assert torch.equal(model(x), expected)


class Softmax(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("method", ["rep", "shared"])
def test_a_layer_that_does_more_than_multiply_is_not_merged_into(method):
    """An update beside it is not one in its weight; a layer that gives no row of numbers is no target."""

    def adapted(cls, targets="all-linear"):
        base = nn.Sequential(OrderedDict(first=cls(16, 24), second=nn.Linear(24, 8)))
        return trained(get_peft_model(base, config_for(method, target_modules=targets)).eval())

    x = torch.randn(3, 16, generator=seeded(0))
    model = adapted(Softmax)
    with pytest.raises(InputError, match="cannot merge into 'first', a Softmax, which does more"):
        model.merge_adapter()
    model = adapted(Same)
    expected = model(x)
    model.merge_adapter()
    assert_near("merged", model(x), expected)
    assert {
        name for name, module in adapted(Router).base_model.model.named_children() if hasattr(module, "n_pairs")
    } == {"second"}
    with pytest.raises(InputError, match="the target 'first' is a Router"):
        adapted(Router, ["first"])
