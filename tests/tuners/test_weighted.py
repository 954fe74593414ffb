"""add_weighted_adapter: the sum of rep adapters as a rep adapter."""

import copy

import pytest
import torch
from peft import PeftModel
from tolerances import assert_near
from transformers import BertConfig, BertForSequenceClassification
from tuners.families import build, logits, natural_task
from tuners.wrapped import config_for, trainable, trained, wrap

from loretta import InputError, get_peft_model
from loretta.tuners.norms import TrainedNorm

WEIGHTS = {"default": 0.7, "other": -1.5, "third": 0.25}


def three(family: str, **second) -> tuple[PeftModel, dict]:
    """Three trained adapters: other ranks, other scales, other modules."""
    task = natural_task(family)
    model, inputs = wrap(family, "rep", task, train_norms=False)
    trained(model)
    targets = second.pop("target_modules", None)
    for seed, (name, options) in enumerate({"other": {"r": 4, "tensor_rank": 2}, "third": second}.items(), start=2):
        config = config_for("rep", task_type=task, train_norms=False, target_modules=targets, **options)
        model.add_adapter(name, config)
        model.set_adapter(name)
        trained(model, seed=seed)
    model.set_adapter("default")
    return model.eval(), inputs


def dense_sum(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weighted sum of the dense updates, module by module."""
    sums = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "n_pairs"):
            deltas = [weight * layer.get_delta_weight(a) for a, weight in WEIGHTS.items() if a in layer.n_pairs]
            sums[name] = sum(delta.detach().double() for delta in deltas)
    return sums


def errors(model: PeftModel, name: str, wanted: dict[str, torch.Tensor]) -> list[float]:
    modules = dict(model.named_modules())
    assert {key for key, module in modules.items() if name in getattr(module, "n_pairs", {})} == set(wanted)
    return [
        float((modules[k].get_delta_weight(name).detach() - delta).norm() / delta.norm()) for k, delta in wanted.items()
    ]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {"use_rslora": True}),
        ("t5", {"rank_pattern": {".*block.0.*": 4}}),
        ("gpt2", {"init_weights": "denoised"}),
        ("llama", {"target_modules": ["k_proj", "down_proj"]}),
        ("llama", {"shapes": {"32x8": [2, 16, 2, 4], "8x32": [8, 32]}}),
    ],
)
def test_linear_is_exactly_the_sum(family, options):
    model, _ = three(family, **options)
    wanted = dense_sum(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", "linear")
    assert max(errors(model, "sum", wanted)) < 2e-6
    assert model.active_adapters == ["default"]
    assert not any(".sum." in name for name in trainable(model))


def test_the_sum_computes_as_all_of_its_parts_together(tmp_path):
    model, inputs = three("llama")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["default", "other"])
    together = logits(model, inputs)
    model.set_adapter("sum")
    got = logits(model, inputs)
    assert (got - together).norm() < 1e-4 * together.norm()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("llama")[0], tmp_path / "sum").eval()
    assert torch.equal(logits(again, inputs), got)


@pytest.mark.parametrize("error", [0.5, 0.2, 0.05])
def test_an_error_budget_is_kept_and_smaller_than_the_exact_sum(error):
    model, _ = three("llama")
    wanted = dense_sum(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "exact")
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "rounded", error=error)
    found = errors(model, "rounded", wanted)
    assert max(found) <= error
    assert max(found) > 1e-4
    rounded, exact = (
        sum(p.numel() for key, p in model.named_parameters() if f".{name}." in key) for name in ("rounded", "exact")
    )
    assert rounded < exact


def test_a_rank_budget_and_the_svd():
    model, _ = three("llama")
    wanted = dense_sum(model)
    found = {}
    for name, options in {
        "rank 2": {"rank": 2},
        "rank 4": {"rank": 4},
        "svd 3": {"combination_type": "svd", "svd_rank": 3, "rank": 64},
        "svd": {"combination_type": "svd"},
    }.items():
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), name, **options)
        found[name] = errors(model, name, wanted)
    assert model.peft_config["rank 2"].tensor_rank == 2
    assert all(two > four for two, four in zip(found["rank 2"], found["rank 4"], strict=True))
    assert model.peft_config["svd"].r == 8
    best = [float(torch.linalg.svdvals(delta)[3:].norm() / delta.norm()) for delta in wanted.values()]
    assert found["svd 3"] == pytest.approx(best, rel=1e-4)  # the nearest of rank 3 (Eckart, Young)


@pytest.mark.parametrize("widened", [True, False])
def test_a_sum_has_the_precision_of_its_parts(widened):
    base, _ = build("llama", dtype=torch.bfloat16)
    model = get_peft_model(base, config_for("rep", task_type="CAUSAL_LM"), autocast_adapter_dtype=widened)
    trained(model).add_weighted_adapter(["default"], [0.5], "sum")
    dtypes = {value.dtype for name, value in model.named_parameters() if ".sum" in name}
    assert dtypes == {torch.float32 if widened else torch.bfloat16}


def test_norms_are_summed_with_the_same_weights():
    model, _ = wrap("llama", "rep")
    trained(model)
    model.add_adapter("other", config_for("rep", task_type="CAUSAL_LM"))
    model.set_adapter("other")
    trained(model, seed=2)
    norms = [module for module in model.modules() if isinstance(module, TrainedNorm)]
    wanted = [0.5 * norm.change("default")["weight"] - 2.0 * norm.change("other")["weight"] for norm in norms]
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert len(norms) == 5
    for norm, weight in zip(norms, wanted, strict=True):
        assert_near("norm", norm.change("sum")["weight"], weight)


def test_the_one_head_is_taken_over():
    model, inputs = wrap("llama", "rep", train_norms=False, modules_to_save=["lm_head"])
    trained(model)
    wanted = logits(model, inputs)
    model.add_adapter("other", config_for("rep", train_norms=False))
    model.add_weighted_adapter(["other", "default"], [0.0, 1.0], "sum")
    model.set_adapter("sum")
    got = logits(model, inputs)
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"tensor_rank": 2, "shapes": {"32x32": [4, 8, 8, 4]}}, {"train_head": "tensorized_only"}],
    ids=str,
)
def test_a_train_of_the_one_head_is_taken_over_and_saved(tmp_path, options):
    model, inputs = wrap("bert", "rep", "SEQ_CLS", **options)
    wanted = logits(trained(model).eval(), inputs)
    model.add_weighted_adapter(["default"], [1.0], "sum", rank=8)
    model.set_adapter("sum")
    got = logits(model, inputs)
    assert (got - wanted).norm() < 1e-4 * wanted.norm()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("bert", "SEQ_CLS")[0], tmp_path / "sum").eval()
    assert torch.equal(logits(again, inputs), got)


def test_a_train_that_stands_in_for_a_fresh_layer_is_taken_over():
    model = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model = trained(get_peft_model(model, config_for("rep", task_type="SEQ_CLS"))).eval()
    inputs = {"input_ids": torch.arange(8).reshape(2, 4)}
    wanted = logits(model, inputs)
    model = copy.deepcopy(model)  # from now on nothing but the adapter tells that the layer was fresh
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    assert (logits(model, inputs) - wanted).norm() < 1e-4 * wanted.norm()


def test_biases_are_no_part_of_a_sum():
    model, _ = wrap("bert", "rep", bias="all", train_norms=False)
    with pytest.raises(InputError, match="'default': trained biases are not added up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


def test_two_heads_are_refused():
    model, _ = wrap("bert", "rep")
    model.add_adapter("other", config_for("rep", task_type="SEQ_CLS"))
    with pytest.raises(InputError, match="heads of default, other"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "other"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapters": ["default", "absent"]}, "no adapter 'absent'"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"adapter_name": "third"}, "'third' is taken"),
        ({"combination_type": "ties"}, "'ties' is none of"),
        ({"combination_type": "dare_ties", "density": 0.5}, "'dare_ties' is none of .*; density=0.5 is no option"),
        ({"rank": 2, "error": 0.1}, "two budgets"),
        ({"rank": 0}, "rank=0"),
        ({"error": -1.0}, "error=-1.0"),
        ({"svd_rank": 4}, "svd_rank is for"),
    ],
)
def test_bad_sums(options, words):
    model, _ = three("llama")
    given = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "sum", **options}
    with pytest.raises(InputError, match=words):
        model.add_weighted_adapter(**given)
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(("method", "words"), [("adp", "each has a non-linearity"), ("shared", "export each adapter")])
def test_what_has_no_sum_is_refused(method, words):
    model, _ = wrap("llama", method)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match=words):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
