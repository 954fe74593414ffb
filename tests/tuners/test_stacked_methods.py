"""Adapters of two methods on one module: each is switched, saved and loaded as if it were there alone."""

import copy
import warnings
from itertools import permutations

import pytest
import torch
from draws import seed_torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft import get_peft_model as peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from tolerances import assert_near
from torch import Tensor, nn
from tuners.families import build, logits, randomise
from tuners.wrapped import CONFIGS, Two, config_for, every_method, trained

from loretta import InputError, get_peft_model
from loretta.tuners.adapted import AdaptedModule, chain

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`",
    "ignore:You are trying to modify a model",
)
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


@every_method
def test_a_lora_that_came_first_is_saved_under_its_own_names(method, tmp_path):
    """It came back as nothing: its tensors were called base_layer.lora_A."""
    model, inputs = build("llama", dtype=torch.float64)
    model.add_adapter(LATER["lora"](), "lora")
    expected = logits(trained(model).eval(), inputs)
    model.add_adapter(config_for(method, target_modules=["q_proj", "v_proj"], train_scales=["keys"]), "ours")
    trained(model, seed=2)
    model.set_adapter("lora")
    assert_near("beside ours", logits(model, inputs), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama", dtype=torch.float64)[0], tmp_path).eval()
    assert_near("with PEFT", logits(again, inputs), expected)
    other, _ = build("llama", dtype=torch.float64)
    other.load_adapter(tmp_path)
    assert_near("with transformers", logits(other.eval(), inputs), expected)


@every_method
def test_transformers_loads_ours_where_a_lora_lies_already(method, tmp_path):
    """It finds tensors by the names that an adapter has alone, so ours lies around the LoRA then."""
    for name, config in ("lora", LATER["lora"]()), ("ours", config_for(method, target_modules=["q_proj", "v_proj"])):
        model, inputs = build("llama", dtype=torch.float64)
        trained(get_peft_model(model, config)).save_pretrained(tmp_path / name)
    expected = logits(model.eval(), inputs)
    both, _ = build("llama", dtype=torch.float64)
    for name in ("lora", "ours"):
        both.load_adapter(str(tmp_path / name), name)
    both.set_adapter("ours")
    assert_near("ours", logits(both.eval(), inputs), expected)


ON_ONE = {
    "a lora": LoraConfig(target_modules=["one"]),
    **{f"a {method}": config_for(method, target_modules=["one"]) for method in CONFIGS},
}


def put(model: nn.Module, name: str) -> nn.Module:
    """One of ``ON_ONE``, whose numbers are the same whatever else is on the model."""
    get_peft_model(model, copy.deepcopy(ON_ONE[name]), name)
    own = sorted((key, value) for key, value in model.named_parameters() if f".{name}." in key)
    with torch.no_grad():
        for _, value in own:
            value.zero_()
    randomise([value for _, value in own], seed=[*ON_ONE].index(name), scale=0.3)
    return model.double()


@pytest.mark.parametrize("first", ON_ONE)
def test_each_method_on_one_layer_adds_what_it_adds_alone_in_any_order(first):
    """What adp computes saw the updates of the methods that came before it, and of no other."""
    seed_torch(0)
    base, x = Two().double(), torch.randn(5, 12, dtype=torch.float64)
    plain = base.one(x)
    expected = plain + sum(put(copy.deepcopy(base), name).one(x) - plain for name in ON_ONE)
    for rest in permutations(name for name in ON_ONE if name != first):
        model = copy.deepcopy(base)
        for name in (first, *rest):
            put(model, name)
        for layer in chain(model.one):
            layer.set_adapter([*ON_ONE])
        assert_near(str((first, *rest)), model.one(x), expected)


@pytest.mark.parametrize("name", [name for name in ON_ONE if name != "a lora"])
def test_a_lora_that_calls_what_it_wraps_by_another_name_has_ours_around_it(name):
    """As PEFT's for GPTQ and AWQ: an adapter put in the place of ``base_layer`` would never be called."""
    seed_torch(0)
    base, x = Two().double(), torch.randn(5, 12, dtype=torch.float64)
    plain = base.one(x)
    alone = put(copy.deepcopy(base), name).one(x)
    base.one = GPTQLoraLinear(base.one, "other", LoraConfig(r=2), r=2).double()  # B is zero: no update of its own
    assert torch.equal(base.one(x), plain)
    assert_near(name, put(base, name).one(x), alone)


@pytest.mark.parametrize("name", ON_ONE)
def test_ia3_scales_what_came_before_it_be_it_lora_or_ours(name):
    seed_torch(0)
    base, x = Two().double(), torch.randn(5, 12, dtype=torch.float64)
    scale, scaled = 1.5, copy.deepcopy(base)
    for parameter in scaled.parameters():
        parameter.data *= scale
    around, within = scale * put(copy.deepcopy(base), name).one(x), put(scaled, name).one(x)
    for ia3_last, expected in ((True, around), (False, within)):
        model = copy.deepcopy(base)
        for each in (name, "scales") if ia3_last else ("scales", name):
            if each == name:
                put(model, name)
            else:
                get_peft_model(model, IA3Config(target_modules=["one"], feedforward_modules=[]), each)
        for layer in chain(model.one):
            layer.set_adapter([name, "scales"])
            for factor in getattr(layer, "ia3_l", {}).values():
                factor.data.fill_(scale)
        assert_near(f"{name}, ia3_last={ia3_last}", model.one(x), expected)


@every_method
@pytest.mark.parametrize("between", LATER)
def test_adapters_of_one_method_around_anothers_are_saved_under_their_own_names(between, method, tmp_path):
    """The first lay within the second layer of its own method too, and came back on no model."""
    if between == method:
        pytest.skip("one method has one layer for all")
    model, inputs = build("llama", dtype=torch.float64)
    own = {
        name: config_for(method, target_modules=["q_proj", "v_proj"], train_scales=["values"])
        for name in ("one", "two")
    }
    for seed, (name, config) in enumerate({"one": own["one"], "between": LATER[between](), "two": own["two"]}.items()):
        model.add_adapter(config, name)
        model.set_adapter(name)
        trained(model, seed).double()
    for name in ("one", "two"):
        model.set_adapter(name)
        expected = logits(model.eval(), inputs)
        model.save_pretrained(tmp_path / name)
        again, _ = build("llama", dtype=torch.float64)
        again.load_adapter(tmp_path / name)
        assert_near(f"{name}, loaded", logits(again.double().eval(), inputs), expected)
        tensors = copy.deepcopy(model.get_adapter_state_dict(name))
        trained(model, seed=5)
        set_peft_model_state_dict(model, tensors, name)
        assert_near(f"{name}, set again", logits(model, inputs), expected)


def of_two_methods(methods: tuple[str, str], at: str) -> tuple[dict[str, PeftModel], dict[str, Tensor]]:
    """One model by the names of its two adapters, each with the tuner of that one, and inputs."""
    model, inputs = build("llama", dtype=torch.float64)
    targets = {"one": "q_proj", "two": at}
    models = {
        name: trained(get_peft_model(model, config_for(method, target_modules=[targets[name]]), name), seed).double()
        for seed, (name, method) in enumerate(zip(targets, methods, strict=True), 1)
    }
    return {name: each.eval() for name, each in models.items()}, inputs


def alone(models: dict[str, PeftModel], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, model in models.items():
        model.base_model.set_adapter(name)
        found[name] = logits(model, inputs)
    return found


@pytest.mark.parametrize("at", ["q_proj", "v_proj"])
@pytest.mark.parametrize("methods", [("rep", "adp"), ("adp", "rep"), ("shared", "adp"), ("adp", "shared")], ids=str)
def test_what_merges_does_so_beside_adp_which_falls_silent(methods, at):
    models, inputs = of_two_methods(methods, at)
    expected, name = alone(models, inputs), "two" if methods[0] == "adp" else "one"
    model = models[name]
    for active in ("one", "two"):
        model.base_model.set_adapter(active)
        model.merge_adapter([name])
        assert_near(f"{name} merged", logits(model, inputs), expected[name])
        model.unmerge_adapter()
        assert_near(f"{active} unmerged", logits(model, inputs), expected[active])
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, inputs)
    with pytest.raises(ValueError, match="LoRETTA_adp cannot be merged"):
        model.merge_adapter()
    assert not any(module.merged for module in model.modules() if isinstance(module, AdaptedModule))
    assert torch.equal(logits(model, inputs), both)


@pytest.mark.parametrize("methods", [("rep", "adp"), ("adp", "shared"), ("shared", "rep")], ids=str)
def test_rows_of_one_batch_have_adapters_of_two_methods(methods):
    models, inputs = of_two_methods(methods, "q_proj")
    expected, rows = alone(models, inputs), ["one", "two", "two", "one"]
    for model in models.values():
        got = logits(model, inputs, adapter_names=rows)
        assert_near("logits", got, torch.stack([expected[name][k] for k, name in enumerate(rows)]))


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
def test_a_tuner_merges_and_deletes_what_another_one_made_active():
    models, inputs = of_two_methods(("rep", "shared"), "v_proj")
    models["one"].add_adapter("extra", config_for("rep", target_modules=["k_proj"]))
    models["one"].base_model.set_adapter("extra")
    models["extra"] = trained(models["one"], seed=3).double()
    expected = alone(models, inputs)
    models["one"].base_model.set_adapter(["one", "two"])
    models["two"].base_model.set_adapter("one")
    models["one"].merge_adapter(["one"])
    assert_near("merged", logits(models["one"], inputs), expected["one"])
    models["two"].unmerge_adapter()
    models["one"].base_model.set_adapter("two")
    models["two"].base_model.set_adapter("one")
    models["one"].base_model.delete_adapter("one")
    assert_near("deleted", logits(models["two"], inputs), expected["extra"])


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_what_another_methods_tuner_has_deleted_does_not_become_active():
    model, inputs = build("llama", dtype=torch.float64)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "first")
    ours = trained(get_peft_model(model, config_for("rep", target_modules=["q_proj"]), "second"))
    ours.add_adapter("third", config_for("rep", target_modules=["v_proj"]))
    lora.delete_adapter("first")
    ours.set_adapter("third")
    expected = logits(trained(ours, seed=2).double().eval(), inputs)
    ours.set_adapter("second")
    ours.delete_adapter("second")
    assert ours.active_adapters == ["third"]
    assert_near("the one that is left", logits(ours, inputs), expected)


def test_a_sum_of_adapters_within_another_methods_layers_comes_back(tmp_path):
    """It was one of modules called base_layer, which no other model has."""
    base, inputs = build("llama", dtype=torch.float64)
    model = get_peft_model(base, config_for("rep", target_modules=["q_proj", "v_proj"], train_norms=False), "one")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"]), "around").base_model.set_adapter([])
    model.add_adapter("two", config_for("rep", target_modules=["q_proj"], train_norms=False))
    model.base_model.set_adapter(["one", "two"])
    trained(model).double().eval()
    expected = logits(model, inputs)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama", dtype=torch.float64)[0], tmp_path / "sum").double().eval()
    assert_near("sum", logits(again, inputs).float(), expected.float())
    model.set_adapter("sum")
    assert_near("here", logits(model, inputs).float(), expected.float())


@every_method
def test_scales_that_transformers_would_not_load_within_another_methods_layer_are_refused(method, tmp_path):
    """Its load_adapter finds what lies where it lay alone, reports the rest as missing and leaves it zero."""
    for name, config in ("ours", config_for(method, train_scales=["keys"])), ("lora", LATER["lora"]()):
        model, inputs = build("llama", dtype=torch.float64)
        trained(get_peft_model(model, config)).save_pretrained(tmp_path / name)
    model, _ = build("llama", dtype=torch.float64)
    expected = logits(PeftModel.from_pretrained(model, tmp_path / "ours").eval(), inputs)
    within, _ = build("llama", dtype=torch.float64)
    within.load_adapter(str(tmp_path / "lora"), "lora")
    names = [name for name, _ in within.named_modules()]
    with pytest.raises(InputError, match=r"would not load the scale of 'model.layers.0.self_attn.k_proj'"):
        within.load_adapter(str(tmp_path / "ours"), "ours")
    assert names == [name for name, _ in within.named_modules()]
    first, _ = build("llama", dtype=torch.float64)
    first.load_adapter(str(tmp_path / "ours"), "ours")
    first.load_adapter(str(tmp_path / "lora"), "lora")
    first.set_adapter("ours")
    assert_near("logits", logits(first.eval(), inputs), expected)


@every_method
@pytest.mark.parametrize(("bias", "norms"), [("lora_only", False), ("all", True)])
def test_a_loras_file_with_biases_is_loaded_onto_a_model_that_has_ours(bias, norms, method, tmp_path):
    """Its names are those of a model without ours: PEFT dropped the biases without a word."""
    base, inputs = build("bert", dtype=torch.float64)
    lora = trained(peft_model(base, LoraConfig(target_modules=["query", "key"], bias=bias)))
    expected = logits(lora.eval(), inputs)
    lora.save_pretrained(tmp_path)
    base, _ = build("bert", dtype=torch.float64)
    ours = get_peft_model(base, config_for(method, target_modules=["query"], train_norms=norms), "ours")
    again = PeftModel.from_pretrained(ours.get_base_model(), tmp_path)
    assert_near("logits", logits(again.eval(), inputs), expected)


@every_method
@pytest.mark.parametrize(
    ("bias", "target", "names"), [("lora_only", "query", 2), ("all", "key", 2), ("lora_only", "key", 0)]
)
def test_biases_that_a_loras_file_loses_below_ours_are_counted(bias, target, names, method):
    """PEFT saves them by their names here, and a model with that LoRA alone has none of these."""
    config = LoraConfig(target_modules=["query"], bias=bias)
    base, _ = build("bert")
    lora = peft_model(base, config, "first")
    alone = get_peft_model_state_dict(lora, adapter_name="first").keys()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(base, config_for(method, target_modules=[target], train_norms=False), "ours")
    lost = alone - get_peft_model_state_dict(lora, adapter_name="first").keys()
    assert len(lost) == names
    sentences = [str(each.message) for each in said if "'first' trains biases" in str(each.message)]
    assert [f"would lose {names} of them" in sentence for sentence in sentences] == [True] * bool(names)
    assert all(min(lost).removeprefix("base_model.model.") in sentence for sentence in sentences)
