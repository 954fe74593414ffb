"""Adapters without PEFT's wrapper: injected, through the methods of transformers' models, and by the auto classes."""

import itertools
import shutil
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)
from tuners.families import build, config_of, inputs_for, logits, randomise
from tuners.matrix import (
    GENERATIVE,
    adapted,
    base_of,
    every_family,
    every_hosted,
    options_for,
    wrapped,
)
from tuners.wrapped import CONFIGS, config_for, every_method, own_trains, trainable, trained

from loretta import get_peft_model
from loretta.errors import InputError

# PEFT warns of a second adapter that is added without its wrapper, and transformers adds every one so
beside_another = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


with_norms = pytest.mark.parametrize("train_norms", [False, True])


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
    model.set_adapter("second")
    model.load_adapter(tmp_path, adapter_name="third")  # beside others it is the active one, with its head
    assert torch.equal(logits(model.eval(), inputs), expected["first"])


def forms(method: str) -> dict[str, dict]:
    """Options of one method whose files have other tensors."""
    start = {} if method == "shared" else {"denoised": {"init_weights": "denoised"}}
    return {"plain": {}, "no norms": {"train_norms": False}, "scales": {"train_scales": ["keys"]}, **start}


@every_method
def test_a_file_that_is_not_its_configs_is_refused_where_transformers_loads_it(method, tmp_path):
    """transformers reports what is missing and computes with the rest: with no train where the method is another."""
    others = {f"{other} {form}": (other, options) for other in CONFIGS for form, options in forms(other).items()}
    others["lora"] = ("lora", {})
    for name, (other, options) in others.items():
        config = LoraConfig() if other == "lora" else config_for(other, **options)
        trained(get_peft_model(base_of("llama")[0], config)).save_pretrained(tmp_path / name)
    model, inputs = base_of("llama")
    plain = logits(model.eval(), inputs)
    for form, name in itertools.product(forms(method), others):
        if form != "plain" and others[name][0] != method:
            continue  # no key of another method is known, whatever the form
        own, mixed = f"{method} {form}", tmp_path / "mixed"
        shutil.copytree(tmp_path / name, mixed, dirs_exist_ok=True)
        shutil.copy(tmp_path / own / "adapter_config.json", mixed)
        if name == own:
            model.load_adapter(mixed)
            assert not torch.equal(logits(model, inputs), plain)
            model.delete_adapter("default")
            continue
        with pytest.raises(InputError, match=r"mixed' (lacks|also holds) \d+ tensors? \('.*loretta_"):
            model.load_adapter(mixed)
        assert torch.equal(logits(model, inputs), plain)
        assert not any(".default." in key for key in model.state_dict())


@every_method
def test_rows_of_tokens_that_two_modules_share_are_loaded_by_transformers(method, tmp_path):
    """They lie in the file once, and transformers reports the other name as missing."""
    base = lambda: build("llama", tie_word_embeddings=True)  # noqa: E731
    model, inputs = base()
    model = trained(get_peft_model(model, config_for(method, trainable_token_indices=[1, 2]))).eval()
    model.save_pretrained(tmp_path)
    again, _ = base()
    assert any("lm_head" in key for key in again.load_adapter(tmp_path).missing_keys)
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))


@every_method
def test_an_adapter_with_nan_is_refused_where_transformers_loads_it(method, tmp_path):
    model = get_peft_model(base_of("llama")[0], config_for(method))
    next(value for key, value in model.named_parameters() if f"loretta_{method}_" in key).data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    again, inputs = base_of("llama")
    plain = logits(again.eval(), inputs)
    with pytest.raises(InputError, match=r"holds NaN or infinity in '.*values'"):
        again.load_adapter(tmp_path)
    assert torch.equal(logits(again, inputs), plain)


@every_method
def test_biases_of_a_head_are_saved_once(method, tmp_path):
    """PEFT saves those of its copy a second time, which transformers refuses to write."""
    model, inputs = base_of("bert")
    add(model, "default", options_for("bert", method, bias="all"), seed=1)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of("bert")[0], tmp_path).eval(), inputs), expected)
    again, _ = base_of("bert")
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again.eval(), inputs), expected)


@beside_another
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@every_method
@pytest.mark.parametrize("bias", ["all", "only"])
def test_trained_biases_train_with_their_adapter_and_are_named_where_it_is_left(method, bias):
    def told(do) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            do()
        return sum("stay as the adapter 'first' has trained them" in str(warning.message) for warning in caught)

    model, _ = base_of("bert")
    options = {"train_head": "frozen"}
    bias = f"loretta_{method}_only" if bias == "only" else bias
    model.add_adapter(options_for("bert", method, bias=bias, **options), adapter_name="first")
    first = set(trainable(model))
    assert any(name.endswith("base_layer.bias") for name in first)
    assert told(lambda: model.add_adapter(options_for("bert", method, **options), adapter_name="second")) == 1
    assert not [name for name in trainable(model) if ".second" not in name]
    assert told(lambda: model.set_adapter("first")) == 0
    assert set(trainable(model)) == first
    assert told(model.disable_adapters) == 1
    assert told(model.enable_adapters) == 0
    assert told(lambda: model.set_adapter("second")) == 1
    assert not [name for name in trainable(model) if ".second" not in name]
    model.set_adapter("first")
    assert told(lambda: model.delete_adapter("first")) == 1
    assert not [name for name in trainable(model) if ".second" not in name]


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
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@every_method
def test_layers_go_on_with_the_same_adapter_where_transformers_deletes_the_active_one(method):
    model, inputs = base_of("llama")
    for seed, (name, target) in enumerate((("third", "k_proj"), ("second", "v_proj"), ("first", "q_proj"))):
        add(model, name, options_for("llama", method, target_modules=[target], train_norms=False), seed=seed)
    model.set_adapter("second")
    second = logits(model, inputs)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model, inputs), second)


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


@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_a_class_without_the_head_of_an_adapter_is_named_with_the_one_that_has_it(method, tmp_path):
    base, inputs = build("bert", "SEQ_CLS")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config_for(method, task_type="SEQ_CLS")).eval())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"or with its head: it holds .* load it with .* as AutoModelForSequenceCl"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
