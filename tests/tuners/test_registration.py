"""Both methods are methods of PEFT like any other, from the import on and after every reload."""

import copy
import importlib
import pickle
import sys

import peft
import pytest
import torch
import untouched
from peft import PeftConfig, PeftType, get_layer_status, get_model_status, get_peft_config
from peft.helpers import disable_input_dtype_casting
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from tuners.families import build, logits
from tuners.wrapped import CONFIGS, every_method, wrap

import loretta
from loretta import (
    LorettaAdpConfig,
    LorettaAdpModel,
    LorettaRepConfig,
    LorettaRepModel,
    LorettaSharedModel,
    TaskType,
    get_peft_model,
)

NAMES = {method: f"LORETTA_{method.upper()}" for method in CONFIGS}
MODELS = {"rep": LorettaRepModel, "adp": LorettaAdpModel, "shared": LorettaSharedModel}
PACKAGES = ["loretta", "loretta.tuners", "loretta.tuners.register", "loretta.tuners.rep", "loretta.tuners.adp"]


def assert_registered(method: str) -> None:
    peft_type = PeftType(NAMES[method])
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is CONFIGS[method]
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is MODELS[method]
    assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] == f"loretta_{method}_"
    assert peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


@every_method
def test_peft_knows_the_method(method):
    assert_registered(method)
    config = get_peft_config({"peft_type": NAMES[method], "tensor_rank": 7})
    assert type(config) is CONFIGS[method]
    assert config.tensor_rank == 7


@every_method
def test_peft_type_round_trips(method):
    name = NAMES[method]
    peft_type = PeftType(name)
    assert peft_type is PeftType[name] is getattr(PeftType, name) is PeftType(peft_type)
    assert peft_type == peft_type.value == peft_type.name == name
    assert isinstance(peft_type, PeftType)
    assert str(peft_type) == str(PeftType.LORA).replace("LORA", name)
    assert list(PeftType).count(peft_type) == 1
    assert len({member.value for member in PeftType}) == len(PeftType)
    assert {peft_type: 1}[name] == 1  # equal values hash alike: the registries may be asked by string
    assert copy.deepcopy(peft_type) is pickle.loads(pickle.dumps(peft_type)) is peft_type
    assert CONFIGS[method]().peft_type is peft_type


@pytest.mark.parametrize("package", PACKAGES)
def test_reloading_a_package_changes_nothing(package):
    members, types = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.reload(sys.modules[package])
    assert list(PeftType) == members
    assert types == PEFT_TYPE_TO_CONFIG_MAPPING
    for method in CONFIGS:
        assert_registered(method)
    wrap("llama", "rep")


def test_a_fresh_process_has_the_methods_after_a_cheap_import_and_after_reloading_every_module():
    program = """
import importlib, sys, peft
assert "LORETTA_REP" not in peft.PeftType.__members__
before = set(sys.modules)
import loretta
new = {name.partition(".")[0] for name in set(sys.modules) - before}  # counted in modules, not in seconds
heavy = {"datasets", "sklearn", "scipy", "pandas", "matplotlib", "typer", "jinja2", "pydantic"}
assert "loretta" in new and not heavy & new, new
assert set(list(peft.PeftType)[-3:]) == {"LORETTA_ADP", "LORETTA_REP", "LORETTA_SHARED"}, list(peft.PeftType)[-3:]
for name in sorted((n for n in sys.modules if n.startswith("loretta")), key=lambda n: -n.count(".")):
    importlib.reload(sys.modules[name])
assert [str(t.value) for t in peft.PeftType].count("LORETTA_REP") == 1
import torch
for kind, name in (("LORETTA_REP", "Rep"), ("LORETTA_ADP", "Adp"), ("LORETTA_SHARED", "Shared")):
    config = peft.get_peft_config({"peft_type": kind, "target_modules": ["0"], "tensor_rank": 2})
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), config)
    assert type(model.base_model).__name__ == f"Loretta{name}Model"
    assert model(torch.ones(2, 6)).shape == (2, 6)
print("fine")
"""
    done = untouched.run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def test_the_package_offers_what_the_quick_start_imports():
    assert (loretta.get_peft_model, loretta.PeftModel, loretta.TaskType) == (
        peft.get_peft_model,
        peft.PeftModel,
        peft.TaskType,
    )
    assert all(hasattr(loretta, name) for name in loretta.__all__)


@every_method
def test_status(method):
    model, _ = wrap("llama", method)
    status = get_model_status(model)
    assert status.adapter_model_type == type(model.base_model).__name__
    assert status.peft_types == {"default": NAMES[method]}
    assert status.enabled is True
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True}
    assert status.num_adapter_layers == sum(hasattr(module, "base_layer") for module in model.modules()) + sum(
        hasattr(module, "modules_to_save") for module in model.modules() if module is not model
    )
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {layer.name.rpartition(".")[2] for layer in get_layer_status(model)} >= (
        {"o_proj", "down_proj"} if method == "adp" else {"q_proj", "v_proj"}
    )


@every_method
def test_pefts_switch_of_input_casts_is_taken(method):
    model, inputs = wrap("llama", method)
    before = logits(model, inputs)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, inputs), before)


# The keywords of the authors' quick start, as they are written there


@pytest.mark.parametrize(
    ("family", "task_type", "targets"),
    [("llama", TaskType.CAUSAL_LM, ["q_proj", "v_proj"]), ("bert", TaskType.SEQ_CLS, ["query", "value"])],
)
def test_quick_start_of_rep(family, task_type, targets):
    base, inputs = build(family, task_type.value)
    config = LorettaRepConfig(
        r=8,
        lora_alpha=16,
        target_modules=targets,
        lora_dropout=0.1,
        bias="none",
        task_type=task_type,
        tensor_rank=5,
    )
    model = get_peft_model(base, config)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "loretta_rep_down")}
    assert {name.rpartition(".")[2] for name in layers} == set(targets)
    for layer in layers.values():
        assert layer.scaling == {"default": 16 / 5}
        assert layer.loretta_rep_dropout["default"].p == 0.1
        assert layer.loretta_rep_down["default"].shape.out_features == 8
        assert set(layer.loretta_rep_down["default"].shape.ranks[1:-1]) == {5}
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("family", "task_type", "targets"),
    [
        ("llama", TaskType.CAUSAL_LM, ["gate_proj", "up_proj", "down_proj"]),
        ("bert", TaskType.SEQ_CLS, ["attention.output.dense", "output.dense"]),
    ],
)
def test_quick_start_of_adp(family, task_type, targets):
    base, inputs = build(family, task_type.value)
    config = LorettaAdpConfig(
        bottleneck_size=64,
        non_linearity="relu",
        adapter_dropout=0.1,
        target_modules=targets,
        scaling=2.0,
        bias="none",
        task_type=task_type,
        tensor_rank=5,
    )
    model = get_peft_model(base, config)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "loretta_adp_down")}
    assert len(layers) == (6 if family == "llama" else 4)
    for name, layer in layers.items():
        assert layer.scaling == {"default": 2.0}
        assert layer.placements["default"].where == ("before" if name.endswith(("gate_proj", "up_proj")) else "after")
        assert layer.loretta_adp_dropout["default"].p == 0.1
        assert type(layer.loretta_adp_act["default"]).__name__ == "ReLU"
        assert layer.loretta_adp_down["default"].shape.out_features == 64
        assert set(layer.loretta_adp_up["default"].shape.ranks[1:-1]) == {5}
    assert logits(model, inputs).isfinite().all()


@every_method
def test_a_config_round_trips_through_its_dictionary(method):
    ranks = {} if method == "shared" else {"a": 2}
    config = CONFIGS[method](target_modules=["b", "a"], shapes={"8x8": [8, 8]}, rank_pattern=ranks, bias="all")
    again = PeftConfig.from_peft_type(**config.to_dict())
    assert type(again) is CONFIGS[method]
    assert again == config
