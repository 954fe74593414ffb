"""Both methods on every kind of model, through everything that users of PEFT and transformers do with an adapter."""

import copy
import pickle
import warnings

import pytest
import torch
from draws import seed_torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tolerances import assert_as_near, assert_gradients_near, assert_near
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from tuners.families import config_of, inputs_for, logits, loss_of, randomise
from tuners.matrix import (
    GENERATIVE,
    base_of,
    cast,
    every_family,
    every_hosted,
    options_for,
    wrapped,
)
from tuners.wrapped import every_method, own_trains, snapshot, trainable, trained

from loretta import PeftModel, get_peft_model
from loretta.tuners.layer import LorettaLayer

# PEFT warns of a second adapter that is added without its wrapper, and transformers adds every one so
beside_another = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

with_norms = pytest.mark.parametrize("train_norms", [False, True])


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LorettaLayer)}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad for name, parameter in trainable(model).items()}


def assert_merges(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    """In float64: a small model may blow up the rounding of float32."""
    inputs = cast(inputs, torch.float64)
    expected = logits(model.double(), inputs)
    assert_near("merged", logits(model.merge_and_unload(), inputs), expected)


# Injection without a wrapper


@every_method
@every_family
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injected_adapters_exchange_their_weights(family, method, low_cpu_mem_usage):
    model, inputs = base_of(family)
    assert inject_adapter_in_model(options_for(family, method), model) is model
    expected = logits(trained(model).eval(), inputs)
    weights = get_peft_model_state_dict(model)
    again, _ = base_of(family)
    inject_adapter_in_model(options_for(family, method), again, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.is_meta for name, p in again.named_parameters() if "loretta_" in name} == {low_cpu_mem_usage}
    assert not set_peft_model_state_dict(again, weights, low_cpu_mem_usage=low_cpu_mem_usage).unexpected_keys
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(logits(again.eval(), inputs), expected)


@own_trains
@every_family
def test_the_weights_alone_say_which_modules_to_adapt(family, method):
    *_, last = adapted(wrapped(family, method)[0].get_base_model())
    model, inputs = wrapped(family, method, exclude_modules=[last])
    expected = logits(trained(model), inputs)
    weights = get_peft_model_state_dict(model)
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    again, _ = base_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(options_for(family, method), again, state_dict=weights)
    assert list(adapted(again)) == list(adapted(model.get_base_model()))
    assert not set_peft_model_state_dict(again, weights).unexpected_keys
    assert torch.equal(logits(again.eval(), inputs), expected)


# What transformers offers on its own models


def add(model: nn.Module, name: str, config, *, seed: int) -> None:
    """Add an adapter as transformers does, which activates it, and pretend to have trained it."""
    model.add_adapter(config, adapter_name=name)
    randomise([p for n, p in model.named_parameters() if f".{name}" in n and p.requires_grad], seed=seed, scale=0.2)
    model.eval()


@beside_another
@every_method
@with_norms
@every_hosted
def test_the_methods_of_transformers_models(family, train_norms, method, tmp_path):
    model, inputs = base_of(family)
    expected = {}
    for seed, name in enumerate(("first", "second"), start=1):
        add(model, name, options_for(family, method, tensor_rank=seed + 1, train_norms=train_norms), seed=seed)
        assert model.active_adapters() == [name]
        expected[name] = logits(model, inputs)
    assert not torch.equal(expected["first"], expected["second"])
    model.set_adapter("first")
    assert torch.equal(logits(model, inputs), expected["first"])
    model.save_pretrained(tmp_path)
    again, _ = base_of(family)
    again.load_adapter(tmp_path, adapter_name="third")
    assert torch.equal(logits(again.eval(), inputs), expected["first"])


@every_method
@with_norms
@pytest.mark.parametrize("family", GENERATIVE)
def test_switching_off_and_on_through_transformers(family, train_norms, method):
    model, inputs = base_of(family)
    plain = logits(model, inputs)
    add(model, "first", options_for(family, method, train_norms=train_norms), seed=1)
    expected = logits(model, inputs)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), expected)


@beside_another
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@every_method
@with_norms
@every_hosted
def test_deleting_through_transformers(family, train_norms, method):
    model, inputs = base_of(family)
    plain = logits(model, inputs)
    add(model, "first", options_for(family, method, train_norms=train_norms), seed=1)
    add(model, "second", options_for(family, method, tensor_rank=2, train_norms=train_norms), seed=2)
    second = logits(model, inputs)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert not any(".first" in name for name in model.state_dict())
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), second)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), plain)


@beside_another
@every_method
@pytest.mark.parametrize("train_norms", [True, False])
def test_only_the_adapter_that_transformers_added_last_trains(train_norms, method):
    model, _ = base_of("bert")
    for name in ("first", "second"):
        add(model, name, options_for("bert", method, train_norms=train_norms), seed=1)
    assert not [name for name in trainable(model) if ".second" not in name]


@beside_another
@every_method
def test_transformers_switches_between_adapters_with_and_without_norms(method):
    model, inputs = base_of("llama")
    seen = {}
    for name, train_norms in (("with", True), ("without", False)):
        add(model, name, options_for("llama", method, train_norms=train_norms), seed=1)
        trained(model, seed=2)
        seen[name] = logits(model, inputs)
    for name in ("with", "without", "with"):
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), seen[name])


# From the adapter's folder alone


@pytest.mark.parametrize(
    ("family", "auto", "base_auto", "task"),
    [
        *((family, AutoPeftModelForCausalLM, AutoModelForCausalLM, "CAUSAL_LM") for family in ("gpt2", "llama", "opt")),
        *((family, AutoPeftModelForSeq2SeqLM, AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM") for family in ("t5", "bart")),
        *(
            (family, AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification, "SEQ_CLS")
            for family in ("bert", "modernbert", "deberta-v2", "llama")
        ),
        ("bert", AutoPeftModelForTokenClassification, AutoModelForTokenClassification, "TOKEN_CLS"),
        ("bert", AutoPeftModelForQuestionAnswering, AutoModelForQuestionAnswering, "QUESTION_ANS"),
        ("bert", AutoPeftModelForFeatureExtraction, AutoModel, "FEATURE_EXTRACTION"),
    ],
)
@every_method
def test_the_auto_classes_find_base_and_adapter(family, auto, base_auto, task, method, tmp_path):
    base_auto.from_config(config_of(family)).save_pretrained(tmp_path / "base")
    base = base_auto.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, options_for(family, method, task_type=task))).eval()
    model.save_pretrained(tmp_path / "adapter")
    inputs = inputs_for("SEQ_2_SEQ_LM" if task == "SEQ_2_SEQ_LM" else "CAUSAL_LM")
    with torch.no_grad():
        expected = model(**inputs)[0]
        again = auto.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(**inputs)[0], expected)
        # and transformers' own class
        assert torch.equal(base_auto.from_pretrained(tmp_path / "adapter").eval()(**inputs)[0], expected)


# Tied embeddings

every_generative = pytest.mark.parametrize("family", GENERATIVE)
tied_target = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")


@every_generative
def test_a_merged_model_keeps_its_tie(family, tmp_path):
    model, inputs = wrapped(family, "rep", base={"tie_word_embeddings": True})
    expected = logits(trained(model).double(), inputs)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_near("logits", logits(again, inputs), expected)


@tied_target
@every_generative
@every_method
def test_an_adapter_on_a_tied_output_layer_works_unmerged(family, method, tmp_path):
    base = {"tie_word_embeddings": True}
    model, inputs = wrapped(family, method, base=base, target_modules=["lm_head"])
    plain = logits(base_of(family, **base)[0], inputs)
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(base_of(family, **base)[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)
    assert torch.equal(logits(model.unload(), inputs), plain)


@tied_target
@every_generative
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_into_a_tied_output_layer_is_refused(family, how):
    model, inputs = wrapped(family, "rep", base={"tie_word_embeddings": True}, target_modules=["lm_head"])
    expected = logits(trained(model), inputs)
    with pytest.raises(ValueError, match="tied"):
        getattr(model, how)()
    assert torch.equal(logits(model, inputs), expected)


@every_generative
def test_an_untied_output_layer_merges(family, tmp_path):
    base, inputs = base_of(family, tie_word_embeddings=True)
    output = base.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    base.config.tie_word_embeddings = False
    model = trained(get_peft_model(base, options_for(family, "rep", target_modules=["lm_head"]))).eval()
    expected = logits(model, inputs)
    assert_near("logits", logits(model.merge_and_unload(), inputs), expected)


# Which modules, and what of them


@own_trains
@every_family
def test_patterns_come_back_with_the_adapter(family, method, tmp_path):
    first, *_, last = adapted(wrapped(family, method)[0].get_base_model())
    patterns = {"rank_pattern": {first: 2}, "exclude_modules": [last]}
    if method == "rep":
        patterns["alpha_pattern"] = {first: 5}
    model, inputs = wrapped(family, method, **patterns)
    layers = adapted(model.get_base_model())
    assert last not in layers
    ranks = {name: layer.placements["default"].down.ranks[1] for name, layer in layers.items()}
    assert ranks == {name: 2 if name == first else 3 for name in layers}
    if method == "rep":
        assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
            name: 5 / 2 if name == first else 16 / 3 for name in layers
        }
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(family)[0], tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(again, inputs), expected)
    if method == "rep":
        assert_merges(again, inputs)


# where the blocks lie; in T5 each of them holds parts that are numbered too
BLOCKS = {"gpt2": "h", "bert": "layer", "t5": "block", "deberta-v2": "layer", "mlp": "blocks"}


@every_method
@every_family
def test_layers_to_transform(family, method):
    every = list(adapted(wrapped(family, method)[0].get_base_model()))
    blocks = BLOCKS.get(family, "layers")
    model, inputs = wrapped(family, method, layers_to_transform=[1], layers_pattern=blocks)
    assert list(adapted(model.get_base_model())) == [name for name in every if f"{blocks}.1." in name]
    assert logits(trained(model), inputs).isfinite().all()


WHOLE = {
    "gpt2": "mlp.c_fc",
    "llama": "up_proj",
    "opt": "fc1",
    "bert": "intermediate.dense",
    "t5": "wi",
    "bart": "fc1",
    "modernbert": "Wi",
    "deberta-v2": "intermediate.dense",
    "mlp": "head",
}


@every_method
@every_family
def test_modules_to_save(family, method, tmp_path):
    base, inputs = base_of(family)
    plain, values = logits(base, inputs), snapshot(base)
    whole = {name for name, _ in base.named_modules() if name.endswith(WHOLE[family])}
    model, _ = wrapped(family, method, modules_to_save=[WHOLE[family]], train_norms=False)
    copies = {name.partition(".modules_to_save.default")[0] for name in trainable(model) if "modules_to_save" in name}
    assert whole <= {name.removeprefix("base_model.model.") for name in copies}
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(family)[0], tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    if method == "rep":
        assert_merges(again, inputs)
    now = model.unload().state_dict()
    changed = {name.rpartition(".")[0] for name, value in values.items() if not torch.equal(now[name], value)}
    assert changed == whole  # PEFT leaves what the user asked to train where it is


# Gradient checkpointing


quiet_checkpointing = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
DROPOUT = {"rep": {"lora_dropout": 0.2}, "adp": {"adapter_dropout": 0.2}, "shared": {"lora_dropout": 0.2}}


def checkpoint(model: PeftModel, *, use_reentrant: bool) -> None:
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if isinstance(base, PreTrainedModel):
        model.enable_input_require_grads()


@quiet_checkpointing
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["opt", "deberta-v2", "mlp"])
@every_method
def test_checkpointed_blocks_draw_the_same_dropout(family, use_reentrant, init_weights, method):
    train_norms = (family, use_reentrant) != ("deberta-v2", True)
    results = []
    for checkpointing in (False, True):
        model, inputs = wrapped(family, method, init_weights=init_weights, train_norms=train_norms, **DROPOUT[method])
        trained(model.double()).train()
        if checkpointing:
            checkpoint(model, use_reentrant=use_reentrant)
        seed_torch(3)
        results.append(gradients(model, cast(inputs, torch.float64)))
    plain, checkpointed = results
    assert all(grad is not None and grad.any() for grad in plain.values())
    assert_gradients_near(checkpointed, plain)


@quiet_checkpointing
@every_method
def test_reentrant_checkpoints_of_deberta_refuse_the_trained_norm_of_distances(method):
    # transformers passes the normed embeddings of the distances around the checkpoint, whatever trains the norm
    model, inputs = wrapped("deberta-v2", method)
    checkpoint(trained(model).train(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(model, inputs)


# Precision


def with_and_without(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with model.disable_adapter():
        base = logits(model, inputs)
    return {"base": base, "adapter": logits(model, inputs)}


def assert_adapter_as_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """With its adapter a model loses what its dtype costs, beside twice what it loses without."""
    assert_as_near("logits", got["adapter"], expected["adapter"], beside=(got["base"], expected["base"]))


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@every_method
@every_family
@pytest.mark.parametrize(
    ("dtype", "autocast_adapter_dtype"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)],
    ids=["bfloat16", "float16", "bfloat16 throughout"],
)
def test_a_base_in_half_precision(family, dtype, autocast_adapter_dtype, method):
    model, inputs = wrapped(family, method, base={"dtype": dtype}, autocast_adapter_dtype=autocast_adapter_dtype)
    trained(model, scale=0.05)
    kept = {p.dtype for name, p in trainable(model).items() if ".loretta_" in name}
    assert kept == {torch.float32 if autocast_adapter_dtype else dtype}
    # the same numbers, computed with in float32
    expected = with_and_without(copy.deepcopy(model).float(), cast(inputs, torch.float32))
    assert_adapter_as_near(with_and_without(model, inputs), expected)
    for name, grad in gradients(model, inputs).items():
        assert grad.isfinite().all(), name
        assert grad.any(), name


@every_method
@every_family
@HALF
def test_autocast(family, dtype, method):
    model, inputs = wrapped(family, method)
    trained(model, scale=0.05)
    expected = with_and_without(model, inputs)
    with torch.autocast("cpu", dtype=dtype):
        got = with_and_without(model, inputs)
        loss = loss_of(model, inputs)
    assert_adapter_as_near(got, expected)
    loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_method
@every_family
def test_to_another_dtype_and_back(family, method):
    model, inputs = wrapped(family, method)
    expected = with_and_without(trained(model, scale=0.05), inputs)
    wide = logits(model.to(torch.float64), cast(inputs, torch.float64))
    assert_near("float64", wide.float(), expected["adapter"])
    assert torch.equal(logits(model.to(torch.float32), inputs), expected["adapter"])
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_adapter_as_near(with_and_without(model, cast(inputs, torch.bfloat16)), expected)


@every_method
@every_family
def test_to_another_device(family, method):
    model, _ = wrapped(family, method)
    layer = next(iter(adapted(model).values()))
    x = torch.randn(3, 5, layer.in_features)
    shape = layer(x).shape
    model.to("meta")
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert layer(x.to("meta")).shape == shape


# Copies


@every_method
@every_family
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(family, way, method):
    model, inputs = wrapped(family, method)
    trained(model)
    model(**inputs)  # a graph is pending, which no copy can take along
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    gradients(twin, inputs)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained(twin, seed=9)
    changed = logits(twin, inputs)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model, inputs), expected)
    with torch.no_grad():
        for mine, its in zip(trainable(model).values(), trainable(twin).values(), strict=True):
            mine.copy_(its)
    assert torch.equal(logits(model, inputs), changed)


# Merging again and again


@every_family
def test_merging_and_unmerging_again_and_again(family):
    model, inputs = wrapped(family, "rep")
    inputs = cast(inputs, torch.float64)
    expected, values = logits(trained(model).double(), inputs), snapshot(model)
    for _ in range(8):
        model.merge_adapter()
        assert_near("merged", logits(model, inputs), expected)
        model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), expected)
    for name, value in model.state_dict().items():
        assert_near(name, value, values[name])


@every_family
def test_an_adapter_added_to_a_merged_model(family):
    model, inputs = wrapped(family, "rep")
    inputs = cast(inputs, torch.float64)
    expected = logits(trained(model).double(), inputs)
    plain = logits(base_of(family, dtype=torch.float64)[0], inputs)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", options_for(family, "rep", tensor_rank=2))
    model.double()
    assert_near("default", logits(model, inputs), expected)
    model.set_adapter("other")
    trained(model, seed=5)
    other = logits(model, inputs)
    model.set_adapter("default")
    assert_near("default", logits(model, inputs), expected)
    with model.disable_adapter():
        assert_near("base", logits(model, inputs), plain)
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), other)


# Generation


@every_method
@pytest.mark.parametrize("family", GENERATIVE)
def test_the_cache_changes_nothing_of_what_is_generated(family, method):
    model, inputs = wrapped(family, method)
    model.double()  # so that rounding decides between no two tokens
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}
    untrained = model.generate(**inputs, **options)
    trained(model)
    cached, plain = (model.generate(**inputs, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, untrained)


# The Trainer of transformers


@pytest.mark.parametrize(("family", "method"), [("bert", "rep"), ("bert", "adp"), ("gpt2", "rep"), ("t5", "adp")])
def test_the_trainer_resumes_from_a_checkpoint(family, method, tmp_path):
    inputs = base_of(family)[1]
    labels = torch.tensor([0, 1, 1, 0]) if family == "bert" else inputs.get("decoder_input_ids", inputs["input_ids"])
    rows = [{**{name: value[k] for name, value in inputs.items()}, "labels": labels[k]} for k in range(4)]

    def train(save_strategy: str, **how) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            save_steps=1,
            save_strategy=save_strategy,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model, _ = wrapped(family, method)
        Trainer(model=model, args=arguments, train_dataset=rows).train(**how)
        return trainable(model)

    whole = train("steps")
    resumed = train("no", resume_from_checkpoint=tmp_path / "checkpoint-1")
    fresh = trainable(wrapped(family, method)[0])
    assert list(resumed) == list(whole)
    for name, parameter in whole.items():
        assert torch.equal(resumed[name], parameter), name
        assert not torch.equal(fresh[name], parameter), name


@every_method
@pytest.mark.parametrize("family", ["gpt2", "bert", "mlp"])
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
def test_autocast_leaves_a_base_in_double_precision_alone(family, init_weights, method):
    model, inputs = wrapped(family, method, base={"dtype": torch.float64}, init_weights=init_weights)
    trained(model)
    inputs, found = cast(inputs, torch.float64), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss_of(model, inputs).backward()
            found.append((logits(model, inputs), {name: p.grad for name, p in trainable(model).items()}))
        model.zero_grad()
    (ref, ref_gradients), (got, gradients) = found
    assert_near("logits", got, ref)
    assert_gradients_near(gradients, ref_gradients)
