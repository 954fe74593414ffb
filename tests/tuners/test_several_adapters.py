"""Several adapters on one model: switching, switching off, deleting, adding up, and one per row of a batch."""

import warnings

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from tolerances import assert_near
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig
from tuners.families import OPTIONS, build, inputs_for, logits, loss_of, natural_task
from tuners.wrapped import CONFIGS, config_for, every_method, snapshot, trainable, trained, wrap

from loretta import InputError, get_peft_model
from loretta.layers import fused
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.norms import TrainedNorm

FAMILIES = ["bert", "roberta", "deberta", "modernbert", "gpt2", "llama", "gemma2", "t5", "bart"]
every_family = pytest.mark.parametrize("family", FAMILIES)
deletes_the_active = pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")


def pair(family: str, method: str, *, second: dict | None = None, **options) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with two trained adapters of different ranks, "default" (active) and "other"."""
    task = options.pop("task", natural_task(family))
    model, inputs = wrap(family, method, task, **options)
    trained(model, seed=1)
    config = config_for(method, **{"task_type": task, "tensor_rank": 2, **options, **(second or {})})
    with torch.random.fork_rng(devices=[]):
        seed_torch(1)
        model.add_adapter("other", config)
    model.set_adapter("other")
    trained(model, seed=2)
    model.set_adapter("default")
    return model.eval(), inputs


def alone(model: PeftModel, inputs: dict[str, Tensor], name: str, **options) -> Tensor:
    """The logits of one adapter, or of the base; "default" is active afterwards."""
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, inputs, **options)
    model.set_adapter(name)
    try:
        return logits(model, inputs, **options)
    finally:
        model.set_adapter("default")


@every_method
@every_family
def test_each_adapter_computes_as_if_it_were_the_only_one(family, method):
    model, inputs = pair(family, method)
    default, other, base = (alone(model, inputs, name) for name in ("default", "other", "__base__"))
    untouched, _ = build(family)
    assert torch.equal(base, logits(untouched, inputs))
    assert not torch.equal(default, other)
    only, _ = wrap(family, method)
    assert torch.equal(default, logits(trained(only, seed=1), inputs))
    assert torch.equal(alone(model, inputs, "default"), default)


@every_method
@every_family
def test_switching_moves_what_trains(family, method):
    model, _ = pair(family, method)
    for name, other in (("default", "other"), ("other", "default")):
        model.set_adapter(name)
        names = set(trainable(model))
        assert names
        assert all(f".{name}" in parameter and f".{other}" not in parameter for parameter in names)
        with model.disable_adapter():
            pass
        assert set(trainable(model)) == names
    fresh, _ = wrap(family, method, tensor_rank=2)
    assert {name.replace(".other", ".default") for name in names} == set(trainable(fresh))


@every_method
@every_family
def test_a_new_adapter_is_not_active_and_leaves_the_first_alone(family, method):
    model, inputs = wrap(family, method)
    trained(model)
    before, values, names = logits(model, inputs), snapshot(model), set(trainable(model))
    model.add_adapter("other", config_for(method, task_type=natural_task(family), tensor_rank=2))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, inputs), before)
    assert set(trainable(model)) == names
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in values.items())


@deletes_the_active
@every_method
@every_family
def test_deleting_an_adapter_leaves_nothing_of_it(family, method):
    model, inputs = pair(family, method)
    other, base = alone(model, inputs, "other"), alone(model, inputs, "__base__")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert not any(".default" in name for name in model.state_dict())
    for layer in (module for module in model.modules() if isinstance(module, LorettaLayer | TrainedNorm)):
        for key in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "default" not in getattr(layer, key), key
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), other)
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model.model, inputs), base)


@every_method
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_is_added_after_the_last_was_deleted(family, method):
    model, inputs = wrap(family, method)
    trained(model).delete_adapter("default")
    model.add_adapter("other", config_for(method, task_type=natural_task(family)))
    model.set_adapter("other")
    fresh, _ = wrap(family, method)
    assert {name.replace(".other", ".default") for name in trainable(model)} == set(trainable(fresh))
    trained(model)
    assert not torch.equal(logits(model, inputs), logits(build(family)[0], inputs))


@deletes_the_active
@every_method
def test_a_name_can_be_used_again_after_deletion(method):
    model, inputs = pair("bert", method)
    model.delete_adapter("default")
    model.add_adapter("default", config_for(method, task_type="SEQ_CLS", train_head="dense", train_norms=False))
    model.set_adapter("default")
    names = {name.removeprefix("base_model.model.") for name in trainable(model) if f"loretta_{method}" not in name}
    assert names == {
        f"{module}.modules_to_save.default.{part}"
        for module in ("classifier", "bert.pooler.dense")
        for part in ("weight", "bias")
    }
    assert torch.equal(logits(model, inputs), alone(model, inputs, "__base__"))


@deletes_the_active
@every_method
@pytest.mark.parametrize("of_the_first", [True, False])
def test_the_norms_follow_when_the_active_adapter_is_deleted(of_the_first, method):
    """One of the two adapters trains norms and the other does not."""
    model, inputs = pair("llama", method, train_norms=of_the_first, second={"train_norms": not of_the_first})
    other = alone(model, inputs, "other")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, inputs), other)
    assert any("norm" in name for name in trainable(model)) is not of_the_first


@every_method
def test_one_of_three_active_adapters_is_deleted(method):
    model, inputs = pair("llama", method)
    model.add_adapter("plain", config_for(method, task_type="CAUSAL_LM", train_norms=False))
    model.set_adapter("plain")
    trained(model, seed=3)
    model.set_adapter("other")
    model.base_model.set_adapter(["other", "plain"])
    wanted, names = logits(model, inputs), set(trainable(model))
    model.base_model.set_adapter(["default", "other", "plain"])
    model.base_model.delete_adapter("default")
    assert torch.equal(logits(model, inputs), wanted)
    assert set(trainable(model)) == names


@every_method
def test_two_heads_at_once_are_refused_and_nothing_is_switched(method):
    model, inputs = pair("bert", method)
    before, names = logits(model, inputs), set(trainable(model))
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model, inputs), before)
    assert set(trainable(model)) == names


@deletes_the_active
@every_method
def test_the_policy_of_a_deleted_adapter_is_forgotten(method):
    model, _ = pair("roberta", method)
    model.delete_adapter("default")
    # no task type: nothing asks for a tensorised head now
    model.add_adapter("default", config_for(method, modules_to_save=["classifier"], train_norms=False))
    model.set_adapter("default")
    names = {name.removeprefix("base_model.model.") for name in trainable(model) if f"loretta_{method}" not in name}
    assert names == {
        f"classifier.modules_to_save.default.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_two_active_updates_of_rep_add_up(family):
    model, inputs = pair(family, "rep", train_norms=False)
    model.double().base_model.set_adapter(["default", "other"])
    got = logits(model, inputs)
    base = build(family)[0].double()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LorettaLayer):
            weight = base.get_submodule(name).weight
            with torch.no_grad():
                weight += layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert_near("logits", got, logits(base, inputs))
    with model.disable_adapter():
        assert not torch.equal(got, logits(model, inputs))


@every_method
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
def test_two_active_adapters_see_the_same_input(method, init_weights):
    model, _ = pair("llama", method, train_norms=False, init_weights=init_weights)
    model.base_model.set_adapter(["default", "other"])
    layer = next(module for module in model.modules() if isinstance(module, LorettaLayer))
    x = torch.randn(3, 5, layer.in_features)
    y = layer.base_layer(x)
    adapted = y if method == "adp" else x
    expected = y + layer.delta("default", adapted) + layer.delta("other", adapted)
    assert_near("y", layer(x), expected)
    assert not torch.equal(layer.delta("default", adapted), layer.delta("other", adapted))


def test_adapters_before_and_after_one_module_are_both_applied():
    options = {"target_modules": ["o_proj"], "train_norms": False}
    model, _ = pair("llama", "adp", **options, second={"insert_before": ["o_proj"]})
    model.base_model.set_adapter(["default", "other"])
    layer = next(module for module in model.modules() if isinstance(module, LorettaLayer))
    x = torch.randn(3, 5, layer.in_features)
    y = layer.base_layer(x + layer.delta("other", x))
    assert_near("y", layer(x), y + layer.delta("default", y))


# One adapter per row

ROWS = ["default", "other", "__base__", "default"]


def hooked(model: PeftModel) -> list[torch.nn.Module]:
    """Modules that still hear of adapter names; the base model itself has the hook that contracts the trains."""
    return [module for module in model.get_base_model().modules() if module._forward_pre_hooks][1:]


def expected_rows(model: PeftModel, inputs: dict[str, Tensor], rows: list[str]) -> Tensor:
    single = {name: alone(model, inputs, name) for name in set(rows)}
    return torch.stack([single[name][k] for k, name in enumerate(rows)])


# DeBERTa sends the embeddings of distances, which belong to no row, through query_proj: what changes its weight
# cannot be told the rows.
# Its norm of them computes without adapters then; see test_norms.py.
NO_ROWS = {("deberta-v2", method, norms) for method in ("rep", "shared") for norms in (True, False)}
NORM_OF_NO_ROW = {("deberta-v2", "adp", True)}
EVERY = [(f, m, norms) for f in OPTIONS for m in CONFIGS for norms in (True, False)]


@pytest.mark.parametrize(
    ("family", "method", "train_norms"), [case for case in EVERY if case not in NO_ROWS | NORM_OF_NO_ROW]
)
def test_a_mixed_batch_equals_the_single_runs(family, method, train_norms):
    model, inputs = pair(family, method, train_norms=train_norms)
    model.double()
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))
    assert not hooked(model)


@pytest.mark.filterwarnings("ignore:a norm of .* belong to no row:UserWarning")
@pytest.mark.parametrize(("family", "method", "train_norms"), sorted(NO_ROWS))
def test_a_mixed_batch_is_refused_where_the_host_loses_the_rows(family, method, train_norms):
    model, inputs = pair(family, method, train_norms=train_norms)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, inputs, adapter_names=ROWS)
    assert not hooked(model)


class PositionsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x.transpose(0, 1)).transpose(0, 1))


@every_method
def test_a_mixed_batch_is_refused_where_positions_come_before_rows(method, monkeypatch):
    """With four positions and four rows nothing else would tell."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    options = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    xlnet = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlnet", **options))
    inputs: list[dict[str, Tensor]] = [{"x": torch.randn(4, 4, 16)}, {"input_ids": torch.arange(16).view(4, 4)}]
    for base, target, kwargs in zip((PositionsFirst(), xlnet), ("linear1", "ff.layer_1"), inputs, strict=True):
        model = get_peft_model(base, config_for(method, target_modules=[target])).eval()
        model.add_adapter("other", config_for(method, target_modules=[target]))
        with pytest.raises(InputError, match="get positions in the first dimension"):
            model(**kwargs, adapter_names=ROWS)


@every_method
def test_the_rows_reach_a_model_that_peft_calls_in_another_way(method):
    """PEFT passes ``adapter_names`` on to MPT, which takes any argument and ignores it."""
    options = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16, "vocab_size": 64}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **options)).eval()
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model, inputs = get_peft_model(base, config_for(method, **options)).eval(), inputs_for("CAUSAL_LM")
    trained(model).add_adapter("other", config_for(method, **options))
    model.set_adapter("other")
    trained(model, seed=2).double()
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))


@every_method
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize(
    "heads",
    [("tensorized", "tensorized"), ("tensorized", "frozen"), ("frozen", "tensorized_only"), ("dense", "tensorized")],
)
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_adapters_of_a_mixed_batch_may_train_different_things(family, heads, train_norms, active, method):
    second = {"train_norms": False, "train_head": heads[1]}
    model, inputs = pair(family, method, train_norms=train_norms, train_head=heads[0], second=second)
    model.set_adapter(active)
    expected = expected_rows(model, inputs, ROWS)
    model.set_adapter(active)
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected)


@every_method
@pytest.mark.parametrize("dense", [False, True])  # adp as on a GPU
@pytest.mark.parametrize("where", ["after", "before"])
def test_the_rows_of_a_mixed_batch_are_computed_together(method, dense, where, monkeypatch):
    monkeypatch.setattr(fused, "one_matrix_pays", lambda _: dense)
    options = {"insert_before": ["o_proj"]} if (method, where) == ("adp", "before") else {}
    model, inputs = pair("llama", method, train_norms=False, tensor_rank=3, **options)
    model.double()
    expected = expected_rows(model, inputs, ROWS)
    for one_by_one in ("_contract_alone", "_rows_by_adapter"):
        monkeypatch.setattr(f"loretta.tuners.layer.LorettaLayer.{one_by_one}", None)
    monkeypatch.setattr("loretta.tuners.shared.layer.SharedLinear._contract_alone", None)
    for _ in range(2):
        assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected)
    assert not torch.equal(logits(model, inputs), expected)  # which the active adapter computes alone again


@every_method
def test_adapters_of_a_mixed_batch_may_have_different_targets(method):
    options = {"target_modules": ["q_proj", "o_proj"]}
    model, inputs = pair("llama", method, **options, second={"target_modules": ["v_proj", "o_proj"]})
    assert_near("logits", logits(model, inputs, adapter_names=ROWS), expected_rows(model, inputs, ROWS))


@every_method
@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_mixed_batch_generates_as_the_single_runs(family, num_beams, method):
    model, inputs = pair(family, method)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": 10**6}  # never: rows of one length

    def generate(**how) -> Tensor:
        return model.generate(**inputs, **options, **how)

    with model.disable_adapter():
        single = {"__base__": generate()}
    for name in ("other", "default"):
        model.set_adapter(name)
        single[name] = generate()
    expected = torch.stack([single[name][k] for k, name in enumerate(ROWS)])
    assert not torch.equal(expected, single["default"])
    assert torch.equal(generate(adapter_names=ROWS), expected)
    config = GenerationConfig(**options, num_return_sequences=num_beams)
    several = model.generate(**inputs, generation_config=config, adapter_names=ROWS)
    assert torch.equal(several[::num_beams], expected)


def test_samples_of_one_row_are_of_its_adapter():
    model, inputs = pair("llama", "rep")
    # of each step only the best token: samples are the greedy ones
    options = {"max_new_tokens": 4, "eos_token_id": 10**6, "pad_token_id": 0, "do_sample": True, "top_k": 1}
    once = model.generate(**inputs, **options, adapter_names=ROWS)
    twice = model.generate(**inputs, **options, adapter_names=ROWS, num_return_sequences=2)
    assert torch.equal(twice, once.repeat_interleave(2, dim=0))


@every_method
def test_bad_mixed_batches_are_refused(method):
    model, inputs = pair("llama", method)
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        logits(model, inputs, adapter_names=["default", "nobody", "default", "default"])
    with pytest.raises(ValueError, match="3 and 4"):
        logits(model, inputs, adapter_names=["default"] * 3)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        logits(model, inputs, adapter_names=ROWS)
    assert not hooked(model)


def test_a_mixed_batch_is_refused_while_an_adapter_is_merged():
    model, inputs = pair("llama", "rep", train_norms=False)
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        logits(model, inputs, adapter_names=ROWS)


@every_method
def test_layer_status_of_two_adapters(method):
    model, _ = pair("llama", method)
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False}


@every_method
@pytest.mark.parametrize(("family", "again"), [("roberta", None), *(("llama", again) for again in CONFIGS)])
def test_a_model_that_is_wrapped_again_starts_anew(family, again, method):
    """PEFT resets the trains of such an adapter, and would go on with its norms, its head and its other targets."""
    targets = {"roberta": ["query", "key"], "llama": ["q_proj", "v_proj"]}[family]
    model, inputs = wrap(family, method, target_modules=targets)
    expected = logits(build(family)[0], inputs)
    trained(model)
    options = {"task_type": natural_task(family), "target_modules": targets[:1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second time
        second = get_peft_model(model.get_base_model(), config_for(again or method, **options)).eval()
    assert torch.equal(logits(second, inputs), expected)
    fresh = get_peft_model(build(family)[0], config_for(again or method, **options))
    assert {n: p.shape for n, p in trainable(second).items()} == {n: p.shape for n, p in trainable(fresh).items()}
    assert second.state_dict().keys() == fresh.state_dict().keys()
    loss_of(second.train(), inputs).backward()
    assert all(parameter.grad is not None for parameter in trainable(second).values())
