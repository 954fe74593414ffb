"""Trained scales where one layer computes queries, keys and values: of some of its outputs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from tuners import families
from tuners.families import inputs_for, logits, loss_of, randomise
from tuners.pairs import expected_rows
from tuners.wrapped import config_for, every_method, trained

import loretta
from loretta import get_peft_model
from loretta.errors import InputError
from loretta.plan import plan_model, read_plan
from loretta.tuners.config import LorettaConfig
from loretta.tuners.rescaled import TIMES, scaled_modules

PLACES = ["keys", "values"]
WIDTH, HEADS = families.HIDDEN, families.HEADS
EACH = WIDTH // HEADS
_SAME = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": WIDTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {**_SAME, "num_hidden_layers": 2, "num_attention_heads": HEADS, "alibi": False, "bias": True}
OPTIONS = {
    "gpt2": families.OPTIONS["gpt2"],
    "phi3": families.OPTIONS["phi3"],
    "modernbert": families.OPTIONS["modernbert"],
    "bloom": {**_SAME, "n_layer": 2, "n_head": HEADS},
    "gpt_neox": {
        **_SAME, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48,
        "max_position_embeddings": 40,
    },
    "codegen": {
        **_SAME, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "rotary_dim": 4, "n_positions": 40, "n_ctx": 40,
        "n_inner": 48,
    },
    "falcon": {**_FALCON, "multi_query": False, "new_decoder_architecture": False},
    "falcon of one key": {**_FALCON, "multi_query": True, "new_decoder_architecture": False},
    "falcon of groups": {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
}  # fmt: skip
# how the forward passes of transformers' models take keys and values from a layer's outputs: views of both
SPLIT: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "gpt2": lambda y: (y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]),
    "phi3": lambda y: (y[..., WIDTH : WIDTH + 2 * EACH], y[..., WIDTH + 2 * EACH :]),
    "modernbert": lambda y: _of(y.view(*y.shape[:-1], 3, HEADS, EACH), (..., 1, slice(None), slice(None))),
    "bloom": lambda y: _of(y.view(*y.shape[:-1], HEADS, 3, EACH), (..., 1, slice(None))),
    "gpt_neox": lambda y: (
        y.view(*y.shape[:-1], HEADS, 3 * EACH)[..., EACH : 2 * EACH],
        y.view(*y.shape[:-1], HEADS, 3 * EACH)[..., 2 * EACH :],
    ),
    "codegen": lambda y: (
        y.view(*y.shape[:-1], 4, -1)[..., 2 * WIDTH // 4 :],
        y.view(*y.shape[:-1], 4, -1)[..., WIDTH // 4 : 2 * WIDTH // 4],
    ),
    "falcon": lambda y: _of(y.view(*y.shape[:-1], HEADS, 3, EACH), (..., 1, slice(None))),
    "falcon of one key": lambda y: _of(y.view(*y.shape[:-1], HEADS + 2, EACH), (..., HEADS, slice(None))),
    "falcon of groups": lambda y: _of(y.view(*y.shape[:-1], 2, HEADS // 2 + 2, EACH), (..., HEADS // 2, slice(None))),
}
every_family = pytest.mark.parametrize("family", OPTIONS)


def _of(y: Tensor, at: tuple) -> tuple[Tensor, Tensor]:
    """Keys, which lie there, and values, which lie behind them."""
    return y[at], y[tuple(each + 1 if isinstance(each, int) else each for each in at)]


def build(family: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    encodes = family == "modernbert"
    config = AutoConfig.for_model(family.partition(" ")[0], **OPTIONS[family])
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        model = (AutoModelForSequenceClassification if encodes else AutoModelForCausalLM).from_config(config).eval()
    randomise(model.parameters(), seed=0)
    return model.to(dtype), inputs_for("SEQ_CLS" if encodes else "CAUSAL_LM")


def wrap(
    family: str, method: str = "rep", dtype: torch.dtype = torch.float64, **options
) -> tuple[PeftModel, dict[str, Tensor]]:
    model, inputs = build(family, dtype)
    options = {"train_scales": PLACES, "train_norms": False, "train_head": "dense", **options}
    task = "SEQ_CLS" if family == "modernbert" else "CAUSAL_LM"
    return get_peft_model(
        model, config_for(method, task_type=task, target_modules="all-linear", **options)
    ).eval(), inputs


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "_scale_" in name}


def scaled_by_hand(base: nn.Module, family: str, changes: dict[str, Tensor]) -> nn.Module:
    """Has hooks of a plain model scale keys and values."""
    for layer in {name.removeprefix("base_model.model.").partition(".base_layer")[0] for name in changes}:
        own = {n.split("_scale_")[1].partition(".")[0]: v for n, v in changes.items() if f"{layer}." in n}

        def scale(module: nn.Module, args: tuple, y: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            y = y.clone()
            for part, place in zip(SPLIT[family](y), PLACES, strict=True):
                part.mul_((1 + TIMES * own[place]).view(part.shape[2:]))
            return y

        base.get_submodule(layer).register_forward_hook(scale)
    return base


@every_family
def test_values_and_gradients_are_those_of_keys_and_values_scaled_by_hand(family):
    model, inputs = wrap(family)
    own = scales(model)
    assert torch.equal(logits(model, inputs), logits(build(family)[0], inputs))
    randomise(own.values(), seed=3, scale=0.03)
    plain = {name: value.detach().clone().requires_grad_() for name, value in own.items()}
    by_hand = scaled_by_hand(build(family)[0], family, plain)
    expected = logits(by_hand, inputs)
    assert_near("logits", logits(model, inputs), expected)
    got = torch.autograd.grad(loss_of(model, inputs), list(own.values()))
    ref = torch.autograd.grad(loss_of(by_hand, inputs), list(plain.values()))
    assert_gradients_near(dict(zip(own, got, strict=True)), dict(zip(own, ref, strict=True)))
    model.merge_adapter()
    assert_near("merged", logits(model, inputs), expected)
    model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), expected)
    assert_near("unloaded", logits(model.merge_and_unload(), inputs), expected)


@pytest.mark.parametrize("family", [family for family in OPTIONS if family != "modernbert"])
def test_what_a_model_caches_is_what_was_scaled(family):
    """Of a rotated key the first half is turned into the second, so a head's keys have one factor here."""
    model, inputs = wrap(family)
    base, _ = build(family)
    first = {name.split("_scale_")[1].partition(".")[0]: p for name, p in scales(model).items() if "0." in name}
    randomise(first.values(), seed=3, scale=0.03)
    with torch.no_grad():
        first["keys"].copy_(first["keys"].view(-1, EACH)[:, :1].expand(-1, EACH).flatten())
        got, plain = (m(**inputs, use_cache=True).past_key_values.layers[0] for m in (model, base))
    for place in PLACES:
        factors = (1 + TIMES * first[place].detach()).view(1, -1, 1, EACH)
        ours, theirs = getattr(got, place), getattr(plain, place)
        repeats = theirs.shape[1] // factors.shape[1]  # Falcon repeats the keys of a group
        assert_near(place, ours, theirs * factors.repeat_interleave(repeats, 1))


def test_another_layers_keys_are_those_of_what_is_attended_to():
    """GPT-2's cross-attention: its layer computes no queries."""
    config = AutoConfig.for_model("gpt2", **OPTIONS["gpt2"], add_cross_attention=True)
    base = AutoModelForCausalLM.from_config(config)
    found = {(s.name, s.side): s for s in scaled_modules(base, LorettaConfig(train_scales=PLACES))}
    assert len(found) == 8
    for place, start in (("keys", 0), ("values", WIDTH)):
        own = found["transformer.h.1.crossattention.c_attn", place]
        assert (own.width, own.size, own.start) == (2 * WIDTH, WIDTH, start)


@every_method
@pytest.mark.parametrize("family", ["gpt2", "falcon of groups", "modernbert"])
def test_a_plan_counts_them_and_a_file_holds_them(family, method, tmp_path):
    model, inputs = wrap(family, method, torch.float32, train_scales=["values"])
    trained(model)
    planned = plan_model(build(family)[0], model.peft_config["default"])
    keys = 2 * EACH if family == "falcon of groups" else WIDTH
    assert planned.scales == read_plan(model).scales == sum(p.numel() for p in scales(model).values()) == 2 * keys
    assert planned.trainable == read_plan(model).trainable == model.get_nb_trainable_parameters()[0]
    assert planned.cost == read_plan(model).cost
    model.add_adapter("other", replace(model.peft_config["default"], train_scales=PLACES))
    model.set_adapter("other")
    trained(model, seed=2)
    model.set_adapter("default")
    rows = ["default", "other", "__base__", "default"]
    assert_near("rows", logits(model, inputs, adapter_names=rows), expected_rows(model, inputs, rows))
    expected = logits(model, inputs)
    model.save_pretrained(str(tmp_path))
    fresh = PeftModel.from_pretrained(build(family, torch.float32)[0], str(tmp_path)).eval()
    assert torch.equal(logits(fresh, inputs), expected)
    ours = build(family, torch.float32)[0]
    ours.load_adapter(str(tmp_path))
    assert torch.equal(logits(ours.eval(), inputs), expected)


@pytest.mark.parametrize("places", [["keys"], PLACES])
def test_a_layers_outputs_are_kept_once(places):
    costs = [plan_model(build("phi3")[0], config_for("rep", train_scales=some)).cost for some in ([], places)]
    width = WIDTH + 4 * EACH
    assert [after - before for before, after in zip(*map(_per_token, costs), strict=True)] == [2 * width, 2 * width]


def _per_token(cost) -> tuple[int, int]:
    return cost.flops_per_token, cost.kept_per_token


def test_a_sum_of_adapters_and_a_merged_model_have_them(tmp_path):
    model, inputs = wrap("phi3", dtype=torch.float32, train_scales=["keys"])
    trained(model)
    model.add_adapter("other", config_for("rep", train_scales=["values"], train_norms=False))
    model.set_adapter("other")
    trained(model, seed=2)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, inputs)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert_near("sum", logits(model, inputs), expected)
    loretta.export_merged(model, tmp_path / "merged", adapter_name="sum")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_near("merged", logits(merged, inputs), expected)


def test_the_values_of_deberta_have_biases_that_are_added_later():
    base = families.build("deberta")[0]
    with pytest.raises(InputError, match="no keys or values that are outputs of linear layers"):
        get_peft_model(base, config_for("rep", train_scales=[*PLACES, "mlp"]))
