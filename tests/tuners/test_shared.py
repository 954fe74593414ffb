"""One train for all layers, against its definition in float64: values, gradients, files, plans and exports."""

import math
import warnings

import pytest
import torch
from draws import seed_torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from tolerances import assert_gradients_near, assert_near
from torch import nn
from transformers import AutoModelForCausalLM
from tuners.families import build, logits, loss_of, natural_task, randomise
from tuners.matrix import MLP
from tuners.wrapped import config_for, trained, wrap

from loretta import InputError, LorettaSharedConfig, PeftModel, export_lora, export_merged, get_peft_model
from loretta.layers.shared import SharedCores
from loretta.plan import Budget, choose, find_config, meta_model, plan_model, trainable_by_kind
from loretta.tuners.shared import SharedLinear
from loretta.tuners.shared.model import split_name

# name -> (family, options); grouped queries are 16 wide beside 32
CASES = {
    "one width": ("bert", {}),
    "grouped queries and MLP": ("llama", {"target_modules": "all-linear"}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "wi"]}),
    "Conv1D": ("gpt2", {"target_modules": ["attn.c_attn", "mlp.c_proj"]}),
    "sides of two cores": ("llama", {"shapes": {"32x3": [4, 24], "3x32": [12, 8], "3x16": [6, 8]}}),
}
every_case = pytest.mark.parametrize("case", CASES)


def layers_of(model: nn.Module) -> dict[str, SharedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedLinear)}


def train_of(model: nn.Module) -> SharedCores:
    (train,) = {module for module in model.modules() if isinstance(module, SharedCores)}
    return train


def by_hand(values: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """The I x O update of every module, by the definition: slices of the flat train, one module after the other."""
    shape = train_of(model).shape
    rank, at = shape.rank, 0

    def take(*size: int) -> torch.Tensor:
        nonlocal at
        at += math.prod(size)
        return values[at - math.prod(size) : at].view(size)

    def side(plan) -> torch.Tensor:
        full = torch.ones(1, 1, dtype=values.dtype)
        for left, mode, right in plan.cores:
            full = torch.einsum("ar,rms->ams", full, take(left, mode, right)).reshape(-1, right)
        return full.reshape(plan.in_features, plan.out_features)

    lefts = {plan.in_features: side(plan) for plan in shape.left}
    layers, projections = take(shape.layers, rank, rank), take(shape.projections, rank, rank)
    rights = {plan.out_features: side(plan) for plan in shape.right}
    assert at == len(values) == shape.n_params
    names = {name: split_name(name) for name in layers_of(model)}
    order = [list(dict.fromkeys(part)) for part in zip(*names.values(), strict=True)]
    updates = {}
    for name, layer in layers_of(model).items():
        at_layer, at_projection = (known.index(part) for known, part in zip(order, names[name], strict=True))
        left, right = lefts[layer.in_features], rights[layer.out_features]
        updates[name] = layer.scaling["default"] * (left @ layers[at_layer] @ projections[at_projection] @ right)
    return updates


@every_case
def test_updates_are_those_of_the_definition(case):
    family, options = CASES[case]
    model = trained(wrap(family, "shared", **options)[0]).double()
    updates = by_hand(train_of(model).values.detach(), model.get_base_model())
    assert len(updates) >= 4
    for name, layer in layers_of(model.get_base_model()).items():
        delta = layer.get_delta_weight("default")
        assert_near(name, delta if family == "gpt2" else delta.T, updates[name])


@every_case
def test_outputs_and_gradients_are_those_of_the_definition(case):
    """The gradients of L, R and the small cores are sums over all modules."""
    family, options = CASES[case]
    model, inputs = wrap(family, "shared", train_norms=False, train_head="frozen", **options)
    model = trained(model).double()
    values = train_of(model).values
    loss_of(model, inputs).backward()
    by_model, got = values.grad.clone(), logits(model, inputs)
    leaf = values.detach().clone().requires_grad_()
    updates = by_hand(leaf, model.get_base_model())

    def add(name):
        layer = layers_of(model.get_base_model())[name]

        def hook(module, args, output):
            return layer.base_layer(args[0]) + args[0] @ updates[name]

        return layer.register_forward_hook(hook)

    for name in updates:
        add(name)
    assert_near("logits", got, logits(model, inputs))
    loss_of(model, inputs).backward()
    assert_gradients_near({"train": by_model}, {"train": leaf.grad})


@every_case
def test_the_start_is_exactly_no_change_and_keeps_the_size_of_inputs(case):
    family, options = CASES[case]
    model, inputs = wrap(family, "shared", **{**options, "tensor_rank": 3})
    with model.disable_adapter():
        expected = logits(model, inputs)
    assert torch.equal(logits(model, inputs), expected)
    parts = train_of(model)()
    assert not any(right.any() for right in parts.right)


def test_the_zero_core_meets_inputs_of_size_one_at_any_rank_and_width():
    sizes = []
    for rank, width in ((1, 32), (8, 32), (4, 128), (32, 64)):
        seed_torch(rank)
        model = get_peft_model(_Stack(width), LorettaSharedConfig(target_modules=["linear"], tensor_rank=rank))
        parts = train_of(model)()
        # of independent inputs of size one, on average over all such inputs
        sizes += [(parts.left[0] @ layer @ parts.projections[0]).square().sum().item() / rank for layer in parts.layers]
    assert sizes == pytest.approx([1.0] * len(sizes))


class _Stack(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(width, width)}) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["linear"](x)
        return x


# What counts


@every_case
def test_the_plan_counts_what_is_trained(case):
    family, options = CASES[case]
    plan = plan_model(build(family)[0], config_for("shared", task_type=natural_task(family), **options))
    model, _ = wrap(family, "shared", **options)
    counts = trainable_by_kind(model)
    assert plan.cores == counts["cores"] == train_of(model).values.numel()
    assert plan.trainable == sum(counts.values())
    assert counts["other"] == 0


@pytest.mark.parametrize(("rank", "count"), [(8, 2 * 4096 * 8 + 34 * 64), (16, 2 * 4096 * 16 + 34 * 256)])
def test_a_large_model_costs_two_sides_and_a_square_a_layer(rank, count):
    base = meta_model(find_config("llama-2-7b"), "CAUSAL_LM")
    plan = plan_model(base, LorettaSharedConfig(task_type="CAUSAL_LM", tensor_rank=rank))
    assert plan.cores == count
    assert plan.cost.flops_per_token == 2 * rank * 2 * 4096 * 64  # as LoRA's of the same rank


def test_a_budget_chooses_the_rank_and_says_what_it_costs():
    base = meta_model(find_config("llama-2-7b"), "CAUSAL_LM")
    config, plan, reasons = choose(base, LorettaSharedConfig(task_type="CAUSAL_LM"), Budget.parse("400k"))
    assert config.tensor_rank == 15
    assert plan.cores == 2 * 4096 * 15 + 34 * 15**2
    assert any("rank 16 would take" in reason for reason in reasons)
    with pytest.raises(InputError, match="no shared adapter fits"):
        choose(base, LorettaSharedConfig(task_type="CAUSAL_LM"), Budget.parse("8k"))


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", None, ("model.layers.3", "self_attn.q_proj")),
        ("layers.1.experts.0.w1", None, ("layers.1", "experts.0.w1")),
        ("encoder.block.0.layer.1.wi", None, ("encoder.block.0", "layer.1.wi")),
        ("encoder.stages.0.blocks.1.query", "blocks", ("encoder.stages.0.blocks.1", "query")),
        ("encoder.stages.0.blocks.1.query", ["h", "stages"], ("encoder.stages.0", "blocks.1.query")),
        ("embed", None, ("", "embed")),
        ("0", None, ("", "0")),
        ("fc1.linear2", None, ("", "fc1.linear2")),
    ],
)
def test_layer_and_projection_by_the_name(name, pattern, expected):
    assert split_name(name, pattern) == expected


def test_modules_without_a_number_are_a_layer_of_their_own():
    model = get_peft_model(MLP(), LorettaSharedConfig(target_modules=["embed", "widen", "narrow"], tensor_rank=2))
    seats = {name: layer.placements["default"].seat for name, layer in layers_of(model.get_base_model()).items()}
    assert [(seat.layer, seat.projection) for seat in seats.values()] == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    shape = train_of(model).shape
    assert shape.n_params == 2 * (12 + 32 + 48) + 3 * 4 + 3 * 4 + 2 * (32 + 48)


# Files


def test_a_file_has_the_train_once(tmp_path):
    model, inputs = wrap("llama", "shared", train_norms=False, init_weights="denoised")
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj.loretta_shared_"
    assert set(tensors) == {first + "train.values", first + "start_train.values"}
    again = PeftModel.from_pretrained(build("llama")[0], tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(again, inputs), expected)


def test_the_config_says_which_modules_to_adapt():
    """Weights name the first module alone, so they cannot, as those of rep and adp can."""
    model, inputs = wrap("bert", "shared", train_norms=False, train_head="frozen")
    expected = logits(trained(model), inputs)
    weights = get_peft_model_state_dict(model)
    again, _ = build("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(model.peft_config["default"], again, state_dict=weights)
    assert list(layers_of(again)) == list(layers_of(model.get_base_model()))
    assert not torch.equal(expected, logits(again.eval(), inputs))


# Leaving as a LoRA


@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
@every_case
def test_it_leaves_as_an_exact_lora(case, init_weights, tmp_path):
    family, options = CASES[case]
    model, inputs = wrap(family, "shared", train_norms=False, init_weights=init_weights, **options)
    model = trained(model).double()
    expected = logits(model, inputs)
    report = export_lora(model, tmp_path / "lora")
    assert report.ranks == {3 if init_weights == "zero" else 6: len(layers_of(model))}
    lora = PeftModel.from_pretrained(build(family)[0].double(), tmp_path / "lora", autocast_adapter_dtype=False).eval()
    assert {type(module).__module__ for module in lora.modules() if hasattr(module, "lora_A")} == {
        "peft.tuners.lora.layer"
    }
    assert_near("logits", logits(lora.double(), inputs), expected)


def test_it_leaves_merged(tmp_path):
    model, inputs = wrap("llama", "shared")
    model = trained(model).double()
    expected = logits(model, inputs)
    export_merged(model, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert_near("logits", logits(again, inputs), expected)


# Several adapters


def test_each_adapter_has_a_train_of_its_own():
    model, inputs = wrap("bert", "shared", train_norms=False, train_head="frozen")
    first = logits(trained(model), inputs)
    model.add_adapter("other", LorettaSharedConfig(tensor_rank=2, train_norms=False, train_head="frozen"))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("other")
    randomise([p for p in model.parameters() if p.requires_grad], seed=5, scale=0.3)
    second = logits(model, inputs)
    assert not torch.equal(first, second)
    trains = {module for module in model.modules() if isinstance(module, SharedCores)}
    assert sorted(train.shape.rank for train in trains) == [2, 3]
    assert [train.values.requires_grad for train in sorted(trains, key=lambda t: t.shape.rank)] == [True, False]
    model.set_adapter("default")
    model.delete_adapter("other")
    assert train_of(model).shape.rank == 3
    assert torch.equal(logits(model, inputs), first)


# What is refused


def test_a_train_far_larger_than_its_matrices_is_refused():
    with pytest.raises(InputError, match="a rank of 100000"):
        wrap("bert", "shared", tensor_rank=100_000)


def test_a_sum_of_adapters_is_refused_with_the_way_round():
    model, _ = wrap("bert", "shared")
    with pytest.raises(InputError, match="export_lora"):
        model.add_weighted_adapter(["default"], [0.5], "sum")
