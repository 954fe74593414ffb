"""Merging rep into plain weights, and refusing to merge adp and whatever is more than a plain weight."""

import copy
from collections import OrderedDict

import pytest
import torch
from draws import seeded
from peft import PeftModel, get_peft_model
from tolerances import assert_near
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D
from tuners.families import OPTIONS, assert_plain, build, kinds, logits
from tuners.wrapped import config_for, layers_of, snapshot, trained, wrap

from loretta import InputError
from loretta.tuners.adp import AdpLinear
from loretta.tuners.norms import TrainedNorm
from loretta.tuners.rep import RepLinear

every_family = pytest.mark.parametrize("family", OPTIONS)


def adapted(model: nn.Module) -> list[RepLinear]:
    return [module for module in model.modules() if isinstance(module, RepLinear)]


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


def two_adapters(**other) -> tuple[PeftModel, dict[str, Tensor], dict[tuple[str, ...], Tensor]]:
    """A model with the norms of two adapters too, and its logits with each and with both; "default" is active."""
    model, inputs = wrap("llama", "rep")
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM", tensor_rank=2, **other))
    model.base_model.set_adapter(["default", "other"])
    trained(model)
    expected = {}
    for names in (["other"], ["default", "other"], ["default"]):
        model.base_model.set_adapter(names)
        expected[tuple(names)] = logits(model, inputs)
    return model, inputs, expected


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("names", [("default",), ("other",), ("default", "other")], ids=str)
def test_what_is_merged_computes_and_not_what_is_active(names, targets):
    """Nor where a merged adapter has no place, and an active one has."""
    model, inputs, expected = two_adapters(target_modules=targets)
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


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_a_safe_merge_that_the_last_layer_refuses_leaves_the_model_as_it_was(how):
    model, inputs, expected = two_adapters()
    types = kinds(model)
    with torch.no_grad():
        adapted(model)[-1].loretta_rep_up["other"][0][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="other"):
        getattr(model, how)(safe_merge=True, adapter_names=["other"])
    assert kinds(model) == types
    assert model.get_model_status().merged_adapters == []
    assert_near("as before", logits(model, inputs), expected["default",])
    model.merge_adapter()
    with pytest.raises(ValueError, match="other"), pytest.warns(UserWarning, match="additionally merging other"):
        getattr(model, how)(safe_merge=True, adapter_names=["default", "other"])
    assert model.get_model_status().merged_adapters == ["default"]
    assert_near("still merged", logits(model, inputs), expected["default",])


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("method", "options"), [("rep", {"train_scales": ["values", "mlp"]}), ("shared", {})], ids=str)
def test_weights_that_a_refused_merge_has_come_to_are_the_same_to_the_last_bit(method, options, dtype, how):
    """What is subtracted again has been rounded."""
    model, _ = wrap("llama", method, base={"dtype": dtype}, **options)
    trained(model)
    weight = layers_of(model)[-1].get_base_layer().weight
    weight.data[0, 0] = float("nan")
    values = snapshot(model)
    with pytest.raises(ValueError, match="default"):
        getattr(model, how)(safe_merge=True)
    assert all(torch.equal(value.nan_to_num(), values[name].nan_to_num()) for name, value in model.state_dict().items())
    assert model.get_model_status().merged_adapters == []
    weight.data[0, 0] = 0.5
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    merged = model.merge_and_unload(safe_merge=True).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


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


@pytest.mark.filterwarnings("ignore:Adapter third was active which is now deleted:UserWarning")
def test_deleting_the_active_adapter_leaves_what_is_merged():
    model, inputs, expected = two_adapters(target_modules=["v_proj", "down_proj"])
    model.add_adapter("third", config_for("rep", task_type="CAUSAL_LM", target_modules=["o_proj"]))
    model.set_adapter("third")
    model.merge_adapter(["default", "other"])
    model.delete_adapter("third")
    assert_near("merged", logits(model, inputs), expected["default", "other"])
    model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), expected["default",])


def test_what_could_not_be_told_from_a_merge_is_refused():
    model, inputs, expected = two_adapters()
    with pytest.raises(InputError, match=r"cannot merge \['typo'\]: loaded are default, other"):
        model.merge_adapter(["typo"])
    with model.disable_adapter(), pytest.raises(InputError, match="while the adapters are disabled"):
        model.merge_adapter(["other"])
    assert torch.equal(logits(model, inputs), expected["default",])


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
