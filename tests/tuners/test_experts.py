"""Rep on the matrices of experts, against a module of experts whose parameters have the dense updates in them.

Axes: E experts, I input features, O output features, b bottleneck.
"""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model_state_dict
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from tt.trains import oracle, randn
from tuners.experts import BOTH, EXPERTS, HIDDEN, INNER, INPUTS, OPTIONS, build, config, layers_of, wrap
from tuners.families import logits, loss_of
from tuners.wrapped import trainable, trained

import loretta
from loretta import LorettaAdpConfig, LorettaSharedConfig, get_peft_model
from loretta.errors import InputError
from loretta.tuners.ranks import RankedTrains
from loretta.tuners.rep import RepExperts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


TRANSPOSED = {"gpt_oss", "llama4_text"}  # a matrix lies as (in, out)


every_family = pytest.mark.parametrize("family", OPTIONS)


def dense_delta(layer: RepExperts, family: str, sizes: tuple[int, int], adapter: str = "default") -> Tensor:
    """The update of every expert, one after the other, from the cores alone."""
    down, up = layer.loretta_rep_down[adapter], layer.loretta_rep_up[adapter]
    n_in, n_out = sizes
    first, *cores = list(down)
    up_bO = oracle(list(up), up.shape)[:, :n_out]
    deltas = []
    for expert in range(EXPERTS):
        # the row of an expert in the first core goes into the core behind it
        row = torch.einsum("r,rns->ns", first[0, expert], cores[0])[None]
        rest = [row, *cores[1:]]
        down_Ib = rest[0]
        for core in rest[1:]:
            down_Ib = torch.einsum("anr,rms->anms", down_Ib, core).flatten(1, 2)
        down_Ib = down_Ib.reshape(-1, down.shape.out_features)[:n_in]
        delta_IO = layer.scaling[adapter] * down_Ib @ up_bO
        deltas.append(delta_IO if family in TRANSPOSED else delta_IO.T)
    return torch.stack(deltas)


@every_family
def test_experts_compute_with_the_dense_updates_in_their_parameters(family):
    """Values and gradients, in float64, with the inputs that the module gets inside its model."""
    model = trained(wrap(family, torch.float64, shapes={"32x4": [2, 16, 4]}), scale=0.7)
    outer = next(layer for layer in layers_of(model) if layer.parameter_name == "gate_up_proj")
    caught: list = []
    with outer.register_forward_pre_hook(lambda module, args, kwargs: caught.append((args, kwargs)), with_kwargs=True):
        logits(model, INPUTS)
    ((first, *others), kwargs) = caught[0]
    others = [value.double() if value.is_floating_point() else value for value in others]
    x = first.double().requires_grad_()
    sizes = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    inner = outer.base_layer
    assert isinstance(inner, RepExperts)

    reference = copy.deepcopy(outer.get_base_layer())
    for layer in (outer, inner):
        name = layer.parameter_name
        weight = reference._parameters.pop(name).detach()
        setattr(reference, name, weight + dense_delta(layer, family, sizes[name]))
    ref = reference(x, *others, **kwargs)
    got = outer(x, *others, **kwargs)
    assert got.dtype == torch.float64
    assert_near("y", got, ref)
    leaves = {"x": x}
    for at, layer in (("outer", outer), ("inner", inner)):
        for part in ("down", "up"):
            leaves[f"{at} {part}"] = getattr(layer, f"loretta_rep_{part}")["default"].values
    weights = randn(*ref.shape, seed=7)
    got_grads = torch.autograd.grad((got * weights).sum(), list(leaves.values()))
    ref_grads = torch.autograd.grad((ref * weights).sum(), list(leaves.values()))
    assert all(grad.any() for grad in ref_grads)
    assert_gradients_near(dict(zip(leaves, got_grads, strict=True)), dict(zip(leaves, ref_grads, strict=True)))
    for layer in (outer, inner):
        assert_near("delta", layer.get_delta_weight("default"), dense_delta(layer, family, sizes[layer.parameter_name]))


@every_family
def test_plan_start_merge_and_unload(family):
    base = build(family)
    before = logits(base, INPUTS)
    plan = loretta.plan_model(base, config())
    model = wrap(family)
    assert torch.equal(logits(model, INPUTS), before)
    n_trainable = model.get_nb_trainable_parameters()[0]
    assert plan.trainable == n_trainable == sum(p.numel() for p in trainable(model).values())
    assert {placement.experts for placement in plan.placements} == {EXPERTS}
    assert len(plan.placements) == len(layers_of(model)) == 4
    after = logits(trained(model), INPUTS)
    assert (after - before).abs().max() > 0.01
    for implementation in ("eager", "batched_mm"):
        model.config._experts_implementation = implementation
        assert_near(implementation, logits(model, INPUTS), after)
    model.config._experts_implementation = "eager"
    model.merge_adapter(safe_merge=True)
    assert_near("merged", logits(model, INPUTS), after)
    with model.disable_adapter():  # unmerges
        assert_near("disabled", logits(model, INPUTS), before)
    assert_near("active again", logits(model, INPUTS), after)
    unloaded = model.merge_and_unload()
    assert not [name for name, _ in unloaded.named_modules() if "base_layer" in name or "loretta" in name]
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert_near("unloaded", logits(unloaded, INPUTS), after)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_experts_beside_linear_layers_of_the_same_name(tmp_path):
    model = trained(wrap("qwen2_moe", target_modules=["shared_expert.down_proj"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("qwen2_moe"), tmp_path).eval()
    assert loaded.peft_config["default"].base_signature == (
        "2 down_proj 16 x 32, 2 down_proj 4*24 x 32, 2 gate_up_proj 4*32 x 48"
    )
    assert torch.equal(logits(loaded, INPUTS), logits(model, INPUTS))
    # the same model wrapped again under the same name
    again = get_peft_model(model.get_base_model(), config())
    assert not [name for name, _ in again.named_modules() if "shared_expert.down_proj.base_layer" in name]
    assert torch.equal(logits(again.eval(), INPUTS), logits(build("qwen2_moe"), INPUTS))
    assert len(layers_of(again)) == 4


def test_every_expert_that_got_a_token_trains():
    model = trained(wrap())
    outer = next(layer for layer in layers_of(model) if layer.parameter_name == "gate_up_proj")
    caught: list[Tensor] = []
    outer.register_forward_pre_hook(lambda module, args: caught.append(args[1]))
    one = {"input_ids": torch.tensor([[5]])}
    for inputs in (one, INPUTS):
        model.zero_grad()
        loss_of(model, inputs).backward()
        used = set(caught.pop().flatten().tolist())
        for layer in (outer, outer.base_layer):
            down = layer.loretta_rep_down["default"]
            rows = down.split(down.values.grad)[0][0].abs().sum(1)
            assert {expert for expert in range(EXPERTS) if rows[expert] > 0} == used
    assert len(used) == EXPERTS


def test_several_adapters_save_load_and_delete(tmp_path):
    model = trained(wrap())
    first = logits(model, INPUTS)
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(InputError, match="have to agree on the experts"):
        model.add_adapter("other", config(target_parameters=BOTH[:1]))
    model.add_adapter("second", config(tensor_rank=2, target_modules=["q_proj"]))
    assert len(layers_of(model)) == 4
    assert torch.equal(logits(model, INPUTS), first)
    model.set_adapter("second")
    second = logits(trained(model, seed=5), INPUTS)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, INPUTS)
    assert not torch.allclose(both, second)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_near("both", logits(merged, INPUTS), both)
    for name, expected in (("first", first), ("second", second)):
        loaded = PeftModel.from_pretrained(build("mixtral"), tmp_path / name).eval()
        assert torch.equal(logits(loaded, INPUTS), expected)
        again = PeftModel.from_pretrained(build("mixtral"), tmp_path / name, low_cpu_mem_usage=True).eval()
        assert torch.equal(logits(again, INPUTS), expected)
    # into a model that has another adapter, under another name
    loaded.load_adapter(tmp_path / "first", "third")
    loaded.set_adapter("third")
    assert torch.equal(logits(loaded, INPUTS), first)
    loretta.rename_adapter(loaded, "third", "last")
    assert torch.equal(logits(loaded, INPUTS), first)
    card = (tmp_path / "first" / "README.md").read_text()
    shape = layers_of(model)[0].loretta_rep_down["default"].shape
    assert shape.modes[0] == EXPERTS
    assert ", ".join(f"{a}·{n}·{b}" for a, n, b in shape.cores) in card
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, INPUTS), second)
    assert not any(".default." in key for key in model.state_dict())
    assert get_peft_model_state_dict(model, adapter_name="second").keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_has_wide_cores(dtype):
    model = wrap(dtype=dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    before = logits(model, INPUTS)
    assert before.dtype == dtype
    trained(model)
    outer = layers_of(model)[0]
    delta = outer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    updated = outer._updated(["default"])
    assert updated.dtype == dtype
    assert_near("parameter", updated, outer.get_base_weight().float() + delta)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outer._updated(["default"]), updated)
    loss_of(model, INPUTS).backward()
    assert all(parameter.grad.isfinite().all() for parameter in trainable(model).values())


@pytest.mark.parametrize("start", ["denoised", "gaussian"])
def test_the_papers_starts(start):
    before = logits(build("mixtral"), INPUTS)
    model = wrap(init_weights=start)
    assert torch.equal(logits(model, INPUTS), before) == (start == "denoised")
    after = logits(trained(model), INPUTS)
    assert_near("merged", logits(model.merge_and_unload(), INPUTS), after)


def test_a_start_passes_an_input_of_variance_1_through_every_expert():
    model = wrap(r=8, tensor_rank=3)
    for layer in layers_of(model):
        a_IR, _ = layer.factors("default")
        a_EIR = a_IR.unflatten(0, (EXPERTS, -1))
        variance = a_EIR.square().sum(1).mean()  # of x A for x of variance 1, over experts and columns
        assert 0.9 < variance < 1.1


def test_checkpointed_blocks_have_the_same_gradients():
    model = trained(wrap()).train()
    loss_of(model, INPUTS).backward()
    expected = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss_of(model, INPUTS).backward()
        assert_gradients_near({name: p.grad for name, p in trainable(model).items()}, expected)


def test_threads_that_share_a_model_do_not_add_an_update_twice():
    """The second one comes while the experts of the first compute with the sum in the place of their parameter."""
    model = trained(wrap())
    expected = logits(model, INPUTS)
    inside, behind = threading.Event(), threading.Event()
    outer = next(layer for layer in layers_of(model) if layer.parameter_name == "gate_up_proj")

    def wait(*_) -> None:
        if not inside.is_set():
            inside.set()
            behind.wait(300)
            time.sleep(0.3)  # for the other one to read the parameter, if nothing keeps it

    def arrive(*_) -> None:
        if inside.is_set():
            behind.set()

    outer.get_base_layer().register_forward_pre_hook(wait)
    outer.register_forward_pre_hook(arrive)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(logits, model, INPUTS)
        assert inside.wait(300)
        second = pool.submit(logits, model, INPUTS)
        assert torch.equal(first.result(), expected)
        assert torch.equal(second.result(), expected)


def test_rows_of_other_adapters_are_refused_and_those_of_the_base_are_not():
    model = trained(wrap())
    ids = INPUTS["input_ids"]
    with pytest.raises(InputError, match="call the model once for each adapter"):
        model(input_ids=ids, adapter_names=["default", "__base__"])
    assert torch.equal(model(input_ids=ids, adapter_names=["__base__"] * 2).logits, logits(build("mixtral"), INPUTS))


class Custom(nn.Module):
    """Experts that nobody has marked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.w1 = nn.Parameter(torch.ones(4, 8, 6, dtype=dtype), requires_grad=False)
        self.experts.gate = nn.Parameter(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Custom, {"target_parameters": ["experts.w1"]}, "'experts.w1' is one of a Module, whose matrices may lie"),
        (Custom, {"target_parameters": ["experts.gate"]}, "'experts.gate' has 2 dimensions"),
        (Custom, {"target_parameters": ["experts.w3"]}, "called 'experts.w3'; of those .* there are experts.w1"),
        (lambda: Custom(torch.int8), {"target_parameters": ["experts.w1"]}, r"is quantised \(torch.int8\)"),
        (lambda: build("mixtral"), {"shapes": {"32x4": [3, 4]}}, "multiplies to 12 instead of 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_refused_before_anything_is_replaced(model, options, words):
    base = model()
    before = [type(module) for module in base.modules()]
    with pytest.raises(InputError, match=words):
        get_peft_model(base, config(**options))
    assert [type(module) for module in base.modules()] == before


@every_family
def test_a_lora_of_stock_peft_computes_the_same(family, tmp_path):
    """The weights that PEFT merges are the base's and the dense updates, in float64; attention has another rank."""
    # of gpt-oss the experts alone
    linear = [] if family == "gpt_oss" else ["q_a_proj"] if family.startswith("deepseek") else ["q_proj"]
    ranks = {"target_modules": linear, "rank_pattern": {"down_proj": 2, **dict.fromkeys(linear, 4)}}
    model = trained(wrap(family, torch.float64, **ranks), scale=0.7)
    expected = logits(model, INPUTS)
    loretta.export_lora(model, tmp_path / "lora")
    base = build(family, torch.float64)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    lora = PeftModel.from_pretrained(base, tmp_path / "lora", autocast_adapter_dtype=False).eval()
    assert_near("logits", logits(lora, INPUTS), expected)
    merged = lora.merge_and_unload().state_dict()
    sizes = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    for layer in layers_of(model):
        name = layer.placements["default"].name
        delta = dense_delta(layer, family, sizes[layer.parameter_name])
        assert_near(name, merged[name] - weights[name], delta)


def test_methods_and_options_without_a_place_in_experts_say_so():
    for make in (LorettaAdpConfig, LorettaSharedConfig):
        with pytest.raises(InputError, match=r"target_parameters=\['experts.down_proj'\]: .*; rep adapts"):
            make(target_parameters=["experts.down_proj"])
    with pytest.raises(InputError, match=r"lora_dropout=0\.1 cannot reach the inputs of the experts"):
        config(lora_dropout=0.1)


def test_what_a_linear_layer_could_do_is_refused(tmp_path):
    model = trained(wrap())
    with pytest.raises((InputError, ValueError), match=r"conversion|not support"):
        convert_to_lora(model, rank=4)
    model.add_adapter("second", config())
    with pytest.raises(InputError, match="trains of experts are not added up"):
        model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    with pytest.raises(InputError, match="the ranks of experts do not adapt"):
        RankedTrains(model)
    after = logits(model, INPUTS)
    loretta.export_merged(model, tmp_path / "merged")
    assert_near("merged", logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), INPUTS), after)
