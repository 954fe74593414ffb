"""Decisions about places, from names and sizes alone, and that what is injected is what was planned."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from tuners.families import OPTIONS, build
from tuners.wrapped import config_for, every_method, own_trains, wrap

from loretta import (
    InputError,
    LorettaAdpModel,
    LorettaRepConfig,
    LorettaRepModel,
    LorettaSharedModel,
    get_peft_model,
    tt,
)
from loretta.plan import plan_model
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.placement import Placement, linear_size, matched_modules, rank_for, require_linear

MODELS = {"rep": LorettaRepModel, "adp": LorettaAdpModel, "shared": LorettaSharedModel}


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (Conv1D(5, 3), (3, 5)),  # its arguments come the other way round
        (nn.Embedding(3, 5), None),
        (nn.LayerNorm(3), None),
        (nn.Conv2d(3, 5, 1), None),
        (nn.MultiheadAttention(4, 2), None),
        (nn.ModuleList([nn.Linear(3, 5)]), None),
    ],
)
def test_linear_size(module, size):
    assert linear_size(module) == size


_EXPERTS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0,
    "intermediate_size_mlp": 48, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPS = {"q_lora_rank": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "o_groups": 2, "o_lora_rank": 8}
# classes of linear layers that give no row of numbers for a row, and a model of each
NO_MATRIX = {"Llama4Router": "llama4_text", "PhimoeTopKRouter": "phimoe", "DeepseekV4GroupedLinear": "deepseek_v4"}


@every_method
@pytest.mark.parametrize("cls", NO_MATRIX)
def test_what_is_no_matrix_is_known_before_there_are_numbers(cls, method, monkeypatch):
    """Plans on the meta device counted the routers, and DeepSeek V4 with all-linear failed at its first call."""
    kind = NO_MATRIX[cls]
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    config = AutoConfig.for_model(kind, **{**_EXPERTS, **_GROUPS})
    ours = config_for(method, target_modules="all-linear")
    with torch.device("meta"):
        monkeypatch.setattr("loretta.tuners.placement._tried", {})
        planned = plan_model(AutoModelForCausalLM.from_config(config), ours)
    base = AutoModelForCausalLM.from_config(config)
    assert cls in {type(module).__name__ for module in base.modules()}
    assert len(planned.placements) == sum(type(module) is nn.Linear for module in base.modules()) - 1  # the head
    monkeypatch.setattr("loretta.tuners.placement._tried", {})
    model = get_peft_model(base, ours).eval()
    assert planned.trainable == model.get_nb_trainable_parameters()[0]
    assert model(input_ids=torch.arange(4, 12)[None]).logits.requires_grad


def test_require_linear_names_the_module_and_the_mend():
    assert require_linear("a.b", nn.Linear(3, 5)) == (3, 5)
    with pytest.raises(InputError, match=r"'a\.b' is a LayerNorm.*exclude_modules"):
        require_linear("a.b", nn.LayerNorm(3))


@own_trains
@pytest.mark.parametrize(
    ("name", "rank"),
    [("layers.1.mlp.up_proj", 7), ("layers.11.mlp.up_proj", 4), ("x.q_proj", 2), ("q_proj", 2), ("xq_proj", 3)],
)
def test_rank_for_matches_ends_of_names_and_expressions(method, name, rank):
    config = config_for(method, rank_pattern={"q_proj": 2, r".*\.1\.mlp\..*": 7, r"layers\.\d+\.mlp.up_proj": 4})
    assert rank_for(config, name) == rank


def test_the_costs_of_a_placement():
    shape = tt.plan_shape(768, 64, rank=5)
    place = Placement(name="x", where="after", down=shape, up=tt.plan_shape(64, 768, rank=5), bias_params=832)
    assert (place.core_params, place.n_params) == (1560, 2392)
    assert Placement(name="x", where="update", down=shape, up=shape).n_params == 2 * shape.n_params


def test_rep_plans_through_its_bottleneck():
    placement = LorettaRepModel.place(config_for("rep", r=8, tensor_rank=5), "x.query", nn.Linear(768, 2304))
    assert placement.where == "update"
    assert (placement.down.in_features, placement.down.out_features) == (768, 8)
    assert (placement.up.in_features, placement.up.out_features) == (8, 2304)
    assert placement.down.modes == (8, 8, 12, 8)
    assert placement.n_params == 13_980 // 12


@pytest.mark.parametrize(("name", "where", "width"), [("x.gate_proj", "before", 768), ("x.down_proj", "after", 96)])
def test_adp_plans_on_the_side_where_it_works(name, where, width):
    placement = LorettaAdpModel.place(config_for("adp", bottleneck_size=64), name, nn.Linear(768, 96))
    assert placement.where == where
    assert (placement.down.in_features, placement.down.out_features) == (width, 64)
    assert (placement.up.in_features, placement.up.out_features) == (64, width)
    assert placement.bias_params == width + 64
    without = LorettaAdpModel.place(config_for("adp", train_bias=False), name, nn.Linear(768, 96))
    assert without.bias_params == 0


@own_trains
def test_given_shapes_and_patterns_reach_the_plan(method):
    key, modes = ("24x8", [2, 96]) if method == "rep" else ("32x64", [32, 4, 16])
    config = config_for(method, shapes={key: modes}, rank_pattern={"x.lin": 4})
    placement = MODELS[method].place(config, "x.lin", nn.Linear(24, 32))
    assert placement.down.modes == tuple(modes)
    assert set(placement.down.ranks[1:-1]) == {4}


@every_method
def test_a_shape_that_does_not_fit_is_refused_with_the_modules_name(method):
    key = {"rep": "24x8", "shared": "24x3", "adp": "32x64"}[method]
    with pytest.raises(InputError, match=r"'x\.lin': the shape \[3, 5\].*multiplies to 15"):
        MODELS[method].place(config_for(method, shapes={key: [3, 5]}), "x.lin", nn.Linear(24, 32))


@every_method
def test_matched_modules_are_those_that_are_replaced(method):
    model, _ = build("llama")
    config = config_for(method, target_modules=["q_proj", "1.mlp.up_proj"])
    names = [name for name, _ in matched_modules(config, model)]
    assert sorted(names) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    wrapped, _ = wrap("llama", method, target_modules=["q_proj", "1.mlp.up_proj"])
    assert sorted(wrapped.base_model.targeted_module_names) == sorted(names)


@every_method
@pytest.mark.parametrize("targets", ["all-linear", ["fc"], "fc"])
def test_a_model_without_linear_layers_is_told(targets, method):
    """The list of linear layers was empty, and nothing said why."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(
        InputError, match=r"no linear layers.*\(its weights are in Conv2d, BatchNorm2d\): give a method"
    ):
        get_peft_model(model, config_for(method, target_modules=targets))


@every_method
def test_nothing_matched_says_what_there_is(method):
    model, _ = build("llama")
    with pytest.raises(InputError) as error:
        list(matched_modules(config_for(method, target_modules=["q_porj", "value"]), model))
    message = str(error.value)
    assert "['q_porj', 'value'] not found" in message
    assert "did you mean 'q_proj'" in message
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
        assert name in message.partition("linear layers here end in")[2]
    with pytest.raises(InputError, match="exclude_modules"):
        list(matched_modules(config_for(method, target_modules=["q_proj"], exclude_modules=["q_proj"]), model))
    with pytest.raises(InputError, match=r"layers_to_transform=\[7\]"):
        list(matched_modules(config_for(method, target_modules=["q_proj"], layers_to_transform=[7]), model))
    assert list(matched_modules(config_for(method, target_modules=["value"]), model, required=False)) == []


@own_trains  # those of a shared train are in test_shared.py
@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"0\\..*": 2}, "target_modules": "all-linear"}])
def test_what_is_injected_is_what_was_planned(family, method, options):
    if options and family == "t5":
        options = {**options, "rank_pattern": {".*block.0.*": 2}}
    model, _ = wrap(family, method, **options)
    config, base = model.peft_config["default"], build(family)[0]
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LorettaLayer):
            continue
        placement = MODELS[method].place(config, name, base.get_submodule(name))
        ours = {n: p for n, p in layer.named_parameters() if not n.startswith("base_layer.")}
        assert placement.name == name
        assert placement.n_params == sum(p.numel() for p in ours.values())
        assert placement.bias_params == sum(p.numel() for n, p in ours.items() if "_bias." in n)
        for part, shape in (("down", placement.down), ("up", placement.up)):
            cores = getattr(layer, f"loretta_{method}_{part}")["default"]
            assert [tuple(core.shape) for core in cores] == shape.cores


def test_planning_needs_no_weights():
    with torch.device("meta"):
        linear = nn.Linear(8192, 28672)
    placement = LorettaRepModel.place(config_for("rep", tensor_rank=8), "x", linear)
    assert placement.down.padded_in == 8192


def test_targets_of_the_head_are_said_to_be_trained_whole():
    config = LorettaRepConfig(task_type="SEQ_CLS", target_modules=["classifier"])
    with pytest.raises(InputError, match=r"\['classifier'\] not found .* trained whole \(classifier\)"):
        get_peft_model(build("bert")[0], config)
