"""Trained scales: factors on keys, values and the inputs of an MLP's last layer, beside the trains of any method."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D
from tuners import experts, families
from tuners.families import build, inputs_for, logits, loss_of, natural_task, randomise
from tuners.matrix import base_of
from tuners.pairs import alone, expected_rows, pair
from tuners.wrapped import config_for, every_method, trainable, trained, wrap

import loretta
from loretta import get_peft_model
from loretta.errors import InputError
from loretta.plan import plan_model, read_plan
from loretta.tuners.config import LorettaConfig
from loretta.tuners.rescaled import NAMES, TIMES, scaled_modules

ALL = ["keys", "values", "mlp"]
DOUBLE = {"base": {"dtype": torch.float64}, "train_head": "dense"}
mergeable = pytest.mark.parametrize("method", ["rep", "shared"])


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "_scale_" in name}


def by_hand(base: nn.Module, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights and biases of a plain model that scales of these names and changes make, differentiably."""
    found = {}
    for name, change in changes.items():
        path, _, rest = name.removeprefix("base_model.model.").replace(".base_layer", "").partition(".loretta_")
        module, factor = base.get_submodule(path), 1 + TIMES * change
        is_row = ("_scale_in." in rest) == isinstance(module, Conv1D)
        found[f"{path}.weight"] = module.weight * (factor[:, None] if is_row else factor)
        if "_scale_out." in rest and module.bias is not None:
            found[f"{path}.bias"] = module.bias * factor
    return found


@every_method
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "opt", "gpt2"])
def test_values_and_gradients_are_those_of_weights_scaled_by_hand(family, method):
    places = ["mlp"] if family == "gpt2" else ALL
    model, inputs = wrap(family, method, train_scales=places, train_norms=False, **DOUBLE)
    base, _ = build(family, dtype=torch.float64)
    own = scales(model)
    layers = {name.partition(".loretta_")[0] for name in own}
    assert len(layers) == len(own) >= 2 * len(places)  # two layers of one side each, and T5's cross-attention
    assert torch.equal(logits(model, inputs), logits(base, inputs))  # the trains are no change either
    randomise(own.values(), seed=3, scale=0.02)
    plain = {name: value.detach().clone().requires_grad_() for name, value in own.items()}

    class ByHand(nn.Module):
        def forward(self, **inputs: Tensor):
            return functional_call(base, by_hand(base, plain), (), inputs)

    assert_near("logits", logits(model, inputs), logits(ByHand(), inputs))
    got = torch.autograd.grad(loss_of(model, inputs), list(own.values()))
    ref = torch.autograd.grad(loss_of(ByHand(), inputs), list(plain.values()))
    assert_gradients_near(dict(zip(own, got, strict=True)), dict(zip(own, ref, strict=True)))


@pytest.mark.parametrize("options", [families.OPTIONS, experts.OPTIONS])
def test_each_layer_of_a_family_has_the_places_that_it_names(options):
    """Encoders and decoders of text alone: gemma3 has a tower for images too. Experts are not scaled."""
    for family in options.keys() & NAMES:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(family, **options[family]))
        for place, name in zip(ALL, NAMES[family], strict=True):
            layers = 2
            if family in families.SEQ2SEQ:  # a decoder also attends to what the encoder gives
                layers = 4 if place == "mlp" else 6
            scaled = scaled_modules(model, LorettaConfig(train_scales=[place]))
            if name:
                fused = NAMES[family][0] == NAMES[family][1]
                side = "in" if place == "mlp" else place if fused else "out"
                assert [each.side for each in scaled] == layers * [side], family
            else:
                with pytest.raises(InputError, match=f"no {place} that are outputs of linear layers"):
                    next(scaled)


@every_method
def test_places_that_are_not_there_are_refused_before_anything_is_adapted(method):
    with pytest.raises(InputError, match=r"train_scales=\['query'\] is none of 'keys', 'values', 'mlp'"):
        config_for(method, train_scales=["query"])
    with pytest.raises(InputError, match="no keys or values that are outputs of linear layers"):
        wrap("deberta", method, train_scales=ALL)
    model, _ = base_of("mlp")
    with pytest.raises(InputError, match="not known for the model type 'custom'"):
        get_peft_model(model, config_for(method, target_modules=["widen"], train_scales=ALL))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@every_method
def test_adapters_are_saved_and_loaded_wherever_the_scales_lie(method, tmp_path):
    model, inputs = pair(
        "bert", method, train_scales=ALL, target_modules=["query"], second={"target_modules": ["key", "value"]}
    )
    expected = {name: alone(model, inputs, name) for name in ("default", "other")}
    model.save_pretrained(str(tmp_path))
    own = load_file(str(tmp_path / "other" / "adapter_model.safetensors"))
    assert sum(".base_layer.loretta_" in key and "_scale_" in key for key in own) == 6
    fresh = PeftModel.from_pretrained(build("bert")[0], str(tmp_path / "other"), adapter_name="other").eval()
    fresh.load_adapter(str(tmp_path), "default")
    for name, value in expected.items():
        fresh.set_adapter(name)
        assert torch.equal(logits(fresh, inputs), value)
    ours = build("bert")[0]
    ours.load_adapter(str(tmp_path), "default")
    ours.load_adapter(str(tmp_path / "other"), "other")
    for name, value in expected.items():  # as transformers loads them
        ours.set_adapter(name)
        assert torch.equal(logits(ours.eval(), inputs), value)
    fresh.delete_adapter("default")
    assert torch.equal(alone_of(fresh, "other", inputs), expected["other"])


def alone_of(model: PeftModel, name: str, inputs: dict[str, Tensor]) -> Tensor:
    model.set_adapter(name)
    return logits(model, inputs)


@every_method
def test_rows_of_a_mixed_batch_have_scales_of_their_own(method):
    model, inputs = pair("llama", method, train_scales=ALL, second={"train_scales": ["mlp"]})
    names = ["default", "other", "__base__", "default"]
    assert_near("logits", logits(model, inputs, adapter_names=names), expected_rows(model, inputs, names))


@every_method
def test_they_are_held_in_float32_and_start_as_no_change_in_half_precision(method):
    model, inputs = wrap("llama", method, train_scales=ALL, base={"dtype": torch.bfloat16})
    assert {p.dtype for p in scales(model).values()} == {torch.float32}
    assert torch.equal(logits(model, inputs), logits(build("llama", dtype=torch.bfloat16)[0], inputs))
    with torch.no_grad():
        next(iter(scales(model).values())).add_(1e-6)
    assert next(iter(scales(model).values()))[0].item() == pytest.approx(1e-6)
    assert all(".default." in name for name in scales(model))  # TRL copies by this


@every_method
@pytest.mark.parametrize("places", [ALL, ["values"]])
def test_a_plan_counts_them(method, places):
    config = config_for(method, task_type="CAUSAL_LM", train_scales=places)
    model, _ = build("llama")
    planned = plan_model(model, config)
    wrapped = get_peft_model(model, config)
    assert planned.scales == read_plan(wrapped).scales == sum(p.numel() for p in scales(wrapped).values())
    assert planned.trainable == read_plan(wrapped).trainable == wrapped.get_nb_trainable_parameters()[0]
    assert planned.scales == {1: 2 * 16, 3: 2 * (16 + 16 + 48)}[len(places)]


def test_a_sum_of_adapters_has_the_sum_of_their_scales():
    model, inputs = pair("llama", "rep", train_scales=ALL, second={"train_scales": ["values"]}, train_norms=False)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, inputs)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert_near("sum", logits(model, inputs), expected)


@mergeable
def test_what_is_no_lora_says_so(method, tmp_path):
    model, _ = wrap("llama", method, train_scales=["values"], train_norms=False)
    with pytest.raises(InputError, match=r"scales 2 layers \(such as 'model.layers.0.self_attn.v_proj'\)"):
        loretta.export_lora(model, tmp_path / "lora")
    both, _ = wrap("llama", method, train_scales=["values"])
    with pytest.raises(InputError, match=r"train with train_norms=False, train_scales=\[\], or export"):
        loretta.export_lora(both, tmp_path / "lora")
    with pytest.raises(InputError, match=r"train_scales=\[\]|train_norms=False"):
        model.base_model.model.model.layers[0].self_attn.v_proj.supports_lora_conversion()
    assert not model.supports_lora_conversion()


@every_method
def test_an_adapter_is_deleted_renamed_and_replaced_with_its_scales(method):
    model, inputs = pair("bert", method, train_scales=ALL)
    expected = alone_of(model, "other", inputs)
    model.delete_adapter("default")
    assert {name.split(".")[-2] for name in scales(model)} == {"other"}
    loretta.rename_adapter(model, "other", "renamed")
    model.set_adapter("renamed")
    assert torch.equal(logits(model, inputs), expected)
    assert set(trainable(model)) >= set(scales(model))
    task = natural_task("bert")
    model.add_adapter("new", config_for(method, task_type=task, train_scales=["keys"]))
    model.set_adapter("new")
    trained(model)
    assert not torch.equal(logits(model, inputs), expected)
    assert inputs_for(task).keys() == inputs.keys()


@every_method
def test_unloading_gives_the_base_back(method):
    model, inputs = wrap("llama", method, train_scales=ALL, train_norms=False)
    trained(model)
    assert torch.equal(logits(model.unload(), inputs), logits(build("llama")[0], inputs))


@every_method
def test_the_options_that_choose_layers_choose_scales_too(method):
    model, _ = wrap(
        "llama", method, train_scales=ALL, layers_to_transform=[1], target_modules=["q_proj"], train_norms=False
    )
    assert {name.split(".")[4] for name in scales(model)} == {"1"}
    model, _ = wrap(
        "llama", method, train_scales=["keys"], exclude_modules=r".*0\.self_attn\.k_proj", train_norms=False
    )
    assert {name.split(".")[4] for name in scales(model)} == {"1"}
    base, _ = build("llama")
    for whole, places in ((["mlp"], ["mlp"]), (["v_proj"], ["values"])):
        config = config_for(method, target_modules=["q_proj"], train_scales=places, modules_to_save=whole)
        with pytest.raises(InputError, match=r"train_scales and modules_to_save both name 'model\.layers\.0"):
            get_peft_model(base, config)
        assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_they_are_held_in_float32_beside_weights_of_eight_bits():
    base = build("llama")[0]
    for layer in base.model.layers:
        layer.self_attn.v_proj.weight.data = layer.self_attn.v_proj.weight.data.to(torch.float8_e4m3fn)
    # trains on such a weight have a refusal of their own
    config = config_for("rep", target_modules=["q_proj"], task_type="CAUSAL_LM", train_scales=["values"])
    model = get_peft_model(base, config)
    assert {p.dtype for p in scales(model).values()} == {torch.float32}
    with pytest.raises(InputError, match="cannot merge scales into the quantised weight"):
        model.merge_adapter()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
@pytest.mark.parametrize("places", [["keys", "values"], ["mlp"]])
def test_a_plan_counts_what_scales_keep_for_the_backward_pass(places, targets):
    kept, planned = {}, {}
    for some in ([], places):
        config = config_for("rep", target_modules=targets, train_norms=False, train_scales=some)
        model = get_peft_model(build("llama")[0], config)
        kept[len(some)] = (_kept(model, 24) - _kept(model, 8)) / 16
        planned[len(some)] = read_plan(model).cost
        assert plan_model(build("llama")[0], config).cost == planned[len(some)]
    without, with_scales = planned[0], planned[len(places)]
    assert kept[len(places)] - kept[0] == with_scales.kept_per_token - without.kept_per_token
    assert with_scales.flops_per_token - without.flops_per_token == with_scales.parameters - without.parameters


def _kept(model: nn.Module, tokens: int) -> int:
    """How many numbers autograd holds after a call, but for the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        out = model(input_ids=torch.arange(4, 4 + tokens)[None])
    assert out.logits.requires_grad
    return sum(each.untyped_storage().nbytes() // each.element_size() for at, each in found.items() if at not in own)
