"""Trained norms: each adapter's change of weight and bias, held in float32 and added when the norm computes."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from tolerances import assert_as_near, assert_near
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from tuners.families import OPTIONS, build, logits, loss_of, randomise
from tuners.matrix import base_of, options_for, wrapped
from tuners.pairs import expected_rows, pair
from tuners.wrapped import config_for, every_method, replica_of, take_reference, trainable, trained, wrap

import loretta
from loretta import get_peft_model
from loretta.tuners.norms import TrainedNorm, is_norm

HALF = {"dtype": torch.bfloat16}
WEIGHTS = "adapter_model.safetensors"
# the norm of DeBERTa's embeddings of distances, which no row of a batch owns
OF_NO_ROW = "deberta.encoder.LayerNorm"


def changes(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trainable(model).items() if "_norm_" in name}


def norms(model: nn.Module) -> dict[str, TrainedNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedNorm)}


def with_changed_norms(base: nn.Module, model: PeftModel, *names: str) -> nn.Module:
    """The base model with what the named adapters change written into its norms."""
    with torch.no_grad():
        for path, norm in norms(model.get_base_model()).items():
            for name in names:
                for parameter, change in norm.change(name).items():
                    base.get_submodule(path).get_parameter(parameter).add_(change)
    return base


@every_method
@pytest.mark.parametrize("family", OPTIONS)
def test_a_change_is_added_to_the_base(family, method):
    model, inputs = wrap(family, method, train_head="dense")
    base, _ = build(family)
    found = {name for name, module in base.named_modules() if is_norm(module)}
    # a norm that is random in the head (ModernBERT's) is saved and trained whole, as the rest of the head
    copied = {
        name for name, module in model.get_base_model().named_modules() if isinstance(module, ModulesToSaveWrapper)
    }
    assert set(norms(model.get_base_model())) == found - copied != set()
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    randomise(changes(model).values(), seed=3)
    assert_near("logits", logits(model, inputs), logits(with_changed_norms(base, model, "default"), inputs))


@every_method
def test_changes_of_several_active_adapters_add_up(method):
    model, inputs = wrap("gpt2", method)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    randomise(changes(model).values(), seed=3)
    expected = logits(with_changed_norms(build("gpt2")[0], model, "default", "other"), inputs)
    assert_near("logits", logits(model, inputs), expected)


def test_the_groups_of_any_library_are_norms_too():
    class MyRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor, *, eps: float = 0.0) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.scale

    for base, shape in ((MyRMSNorm(), (3, 8)), (nn.GroupNorm(2, 8), (3, 8, 5)), (nn.LayerNorm(8, bias=False), (3, 8))):
        assert is_norm(base)
        norm, x = TrainedNorm(copy.deepcopy(base)), torch.randn(shape)
        norm.update_layer("default", "loretta_rep_")
        norm.set_adapter("default")
        assert torch.equal(norm(x), base(x))
        randomise(norm.change("default").values(), seed=3)
        for name, change in norm.change("default").items():
            base.get_parameter(name).data += change.detach()
            assert torch.equal(getattr(norm, name), base.get_parameter(name))  # who reads it past the module
        assert_near(type(base).__name__, norm(x), base(x))
    assert not is_norm(nn.LayerNorm(8, elementwise_affine=False))


@every_method
def test_a_head_named_after_its_norm_is_no_norm(method):
    """transformers has a RobertaPreLayerNormLMHead, with a bias beside its layers."""
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta-prelayernorm", **OPTIONS["roberta"])).eval()
    model = get_peft_model(base, config_for(method, target_modules="all-linear", task_type="CAUSAL_LM"))
    norms = [name for name, module in base.named_modules() if isinstance(module, TrainedNorm)]
    assert "lm_head.layer_norm" in norms
    assert "lm_head" not in norms
    model.unload()


def test_the_base_is_not_written_to_while_it_computes():
    """Another thread may be computing with it."""
    model, inputs = wrap("llama", "rep")
    norm = next(iter(norms(trained(model)).values()))
    own, seen = norm.base_layer.weight, []
    norm.base_layer.register_forward_hook(lambda *_: seen.append(norm.base_layer.weight is own))
    logits(model, inputs)
    assert seen == [True]


def test_a_forward_bound_to_the_base_sees_the_change():
    model, inputs = wrap("llama", "rep")
    expected = logits(trained(model), inputs)
    for norm in norms(model).values():
        add_hook_to_module(norm.base_layer, ModelHook())  # accelerate binds its forward to the instance
    assert torch.equal(logits(model, inputs), expected)


@every_method
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_replicas_of_data_parallel(family, method):
    """Their parameters are plain attributes: they have no ``parameters()``."""
    model, inputs = wrap(family, method)
    replica = replica_of(trained(model))
    assert not list(replica.parameters())
    assert_near("logits", logits(replica, inputs), logits(model, inputs))


def test_bias_all_does_not_train_the_bias_of_a_trained_norm_twice():
    model, _ = wrap("bert", "rep", bias="all")
    assert not any(p.requires_grad for norm in norms(model).values() for p in norm.base_layer.parameters())
    assert any(name.endswith("intermediate.dense.bias") for name in trainable(model))


@every_method
@pytest.mark.parametrize("as_many_distances_as_rows", [False, True])
def test_a_norm_of_no_row_computes_without_adapters_in_a_mixed_batch(as_many_distances_as_rows, method):
    # rep also refuses query_proj, which reads the same embeddings
    options = {"target_modules": ["value_proj"], "train_head": "frozen"}
    base = {"position_buckets": 2} if as_many_distances_as_rows else {}
    model, inputs = pair("deberta-v2", method, base=base, second={"tensor_rank": 3}, **options)
    model.double()
    rows = ["default", "other", "__base__", "default"]
    assert as_many_distances_as_rows == (len(rows) == len(model.get_base_model().deberta.encoder.rel_embeddings.weight))
    with pytest.warns(UserWarning, match="belong to no row"):
        got = logits(model, inputs, adapter_names=rows)
    with torch.no_grad():
        for change in (c for name in ("default", "other") for c in _of_no_row(model).change(name).values()):
            change.zero_()
    assert_near("logits", got, expected_rows(model, inputs, rows))


def _of_no_row(model: PeftModel) -> TrainedNorm:
    return norms(model.get_base_model())[OF_NO_ROW]


# Precision


def moved(model: nn.Module, inputs: dict[str, Tensor], *, steps: int = 20) -> dict[str, float]:
    """By kind, which share of the numbers that got a gradient has another value after some steps of AdamW."""
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-4, weight_decay=0.0)
    reached = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        for name, parameter in trainable(model).items():
            reached[name] |= parameter.grad != 0
        optimizer.step()
    counts: dict[str, list[int]] = {}
    for name, parameter in trainable(model).items():
        kind = "norms" if "_norm_" in name else "cores"
        found = counts.setdefault(kind, [0, 0])
        found[0] += int((parameter != before[name])[reached[name]].sum())
        found[1] += int(reached[name].sum())
    return {kind: changed / total for kind, (changed, total) in counts.items()}


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_nothing_of_a_small_step_is_lost(family, way, method):
    model, inputs = base_of(family, **HALF)
    options = options_for(family, method)
    if way == "add_adapter":
        model.add_adapter(options)
    else:
        model = loretta.get_peft_model(model, options)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    shares = moved(model, inputs)
    assert shares["norms"] > 0.999
    assert shares["cores"] > 0.999


@every_method
@pytest.mark.parametrize("way", ["data", "to"])
def test_a_change_survives_a_cast(way, method):
    model, inputs = wrapped("llama", method, base=HALF)
    if way == "to":
        model.to(torch.bfloat16)
    else:
        for parameter in trainable(model).values():
            parameter.data = parameter.data.to(torch.bfloat16)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="cast to half precision") as seen:
        assert moved(model.train(), inputs)["norms"] > 0.999
    assert len(seen) == 1


@every_method
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_model_computes_on_in_its_own_dtype(family, method):
    model, inputs = wrapped(family, method, base=HALF, train_head="dense")
    base, _ = base_of(family, **HALF)
    assert logits(model, inputs).dtype == torch.bfloat16
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    randomise(changes(model).values(), seed=3)
    # rounded once, when they are added
    for path, norm in norms(model.get_base_model()).items():
        for name, change in norm.change("default").items():
            parameter = base.get_submodule(path).get_parameter(name)
            parameter.data = (parameter.data.float() + change.detach()).bfloat16()
    assert torch.equal(logits(model, inputs), logits(base, inputs))


@every_method
def test_they_are_saved_and_loaded_as_they_are(method, tmp_path):
    model, inputs = wrapped("llama", method, base=HALF)
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    saved = {name: value for name, value in load_file(tmp_path / WEIGHTS).items() if "_norm_" in name}
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(base_of("llama", **HALF)[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again.eval(), inputs), expected)
        again.set_adapter("default")
        for mine, its in zip(changes(model).values(), changes(again).values(), strict=True):
            assert torch.equal(mine, its)


@every_method
def test_rows_of_a_mixed_batch_in_half_precision(method):
    model, inputs = pair("llama", method, base=HALF)
    rows = ["default", "other", "default", "other"]
    alone, exact = expected_rows(model, inputs, rows), expected_rows(copy.deepcopy(model).float(), inputs, rows)
    assert_as_near("logits", logits(model, inputs, adapter_names=rows), exact, beside=(alone, exact))


def test_a_merged_model_has_one_dtype():
    model, inputs = wrapped("llama", "rep", base=HALF)
    got, exact = logits(trained(model), inputs), logits(copy.deepcopy(model).float(), inputs)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert_as_near("logits", logits(merged, inputs), exact, beside=(got, exact))


@every_method
def test_without_autocast_they_stay_in_the_dtype_of_the_base(method):
    model, _ = wrapped("llama", method, base=HALF, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}


@every_method
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_reference_that_trl_copies_is_the_adapter(family, method):
    model, inputs = wrap(family, method)
    expected = logits(trained(model), inputs)
    take_reference(model)
    assert torch.equal(logits(model.eval(), inputs), expected)


@every_method
def test_every_layer_of_an_adapter_says_how_wide_it_is(method):
    """PEFT's own layers do, and tools that walk through tuner layers read it."""
    model, _ = wrap("gpt2", method)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert {(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, TrainedNorm)} == {(32, 32)}
    assert all(layer.in_features and layer.out_features for layer in layers)


@every_method
@pytest.mark.parametrize("family", OPTIONS)
def test_the_trainer_decays_none_of_them_as_none_of_the_base(family, method):
    """Whatever they are called: GPT-2's ln_1 has no name that the Trainer knows."""
    model, _ = wrap(family, method)
    assert changes(model)
    assert not changes(model).keys() & set(Trainer.get_decay_parameter_names(None, model))
    assert "NormChange()" in str(model)
