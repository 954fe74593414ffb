"""What a task type means for a model: PEFT and transformers say it themselves."""

import pytest
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, BertConfig
from tuners.families import build
from tuners.wrapped import config_for, every_method

from loretta import InputError
from loretta.tuners.task_types import AUTO_CLASSES, FINAL_LAYERS, base_class, count_labels, is_final, is_final_layer

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


@pytest.mark.parametrize("task", FINAL_LAYERS)
def test_the_final_layers_are_those_that_peft_saves(task):
    model = getattr(transformers, AUTO_CLASSES[task]).from_config(BertConfig(**TINY))
    saved = get_peft_model(model, LoraConfig(task_type=task, target_modules=["query"])).modules_to_save
    assert saved == {*FINAL_LAYERS[task]} - {"classification_head"}
    assert any(is_final(name, task) for name, _ in model.named_modules())


def test_other_tasks_have_no_final_layer():
    assert not any(is_final("classifier", task) for task in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"))


@pytest.mark.parametrize(("task", "name"), AUTO_CLASSES.items())
def test_transformers_has_every_class(task, name):
    assert hasattr(transformers, name)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification"),
        ({"auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers.models.bert"}},
         "BertModel"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "UNet", "parent_library": "diffusers.models"}}, None),
        ({"task_type": None, "auto_mapping": None}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_class_of_a_saved_adapters_base(config, name):
    assert base_class(config) == name


@pytest.mark.parametrize(
    ("name", "final"),
    [
        ("base_model.model.classifier.modules_to_save.default.weight", True),
        ("base_model.model.classifier.modules_to_save.default.out_proj.weight", True),
        ("base_model.model.score.modules_to_save.default.weight", True),
        ("classifier.weight", True),
        ("classifier.out_proj.weight", True),
        ("classifier.dense.weight", False),
        ("model.decoder.layers.0.self_attn.out_proj.weight", False),
        ("base_model.model.classifier.modules_to_save.default.dense.cores.values", False),
        ("base_model.model.bert.pooler.dense.modules_to_save.default.cores.values", False),
        ("base_model.model.bert.encoder.layer.0.output.LayerNorm.modules_to_save.default.weight", False),
    ],
)
def test_what_counts_as_the_final_layer(name, final):
    assert is_final_layer(name) is final


def test_labels_are_the_rows_of_the_final_layer():
    prefix = "base_model.model.classifier.modules_to_save.default"
    assert count_labels({f"{prefix}.dense.weight": (8, 8), f"{prefix}.out_proj.weight": (3, 8)}) == 3
    assert count_labels({f"{prefix}.bias": (3,), "base_model.model.score.weight": (5, 8)}) == 5
    assert count_labels({"base_model.model.q.lora_A.weight": (8, 8)}) == 0


BODY = "this .*Model is loaded without.*: load it as"


@every_method
@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("targets", [None, "all-linear"])  # names by their ends, or whole, as compact has them
def test_an_adapter_that_writes_is_not_loaded_on_a_body(targets, family, task, method, tmp_path):
    base, _ = build(family)
    given = {} if targets is None else {"target_modules": targets}
    get_peft_model(base, config_for(method, task_type=task, **given)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{BODY} {AUTO_CLASSES[task]}"):
        PeftModel.from_pretrained(AutoModel.from_config(base.config), tmp_path)
    with pytest.raises(InputError, match=f"{BODY} {AUTO_CLASSES[task]}"):
        get_peft_model(AutoModel.from_config(base.config), config_for(method, task_type=task))
    PeftModel.from_pretrained(build(family)[0], tmp_path)


def test_an_adapter_without_a_task_names_the_class_that_it_was_made_on(tmp_path):
    base, _ = build("llama")
    get_peft_model(base, config_for("rep")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"or this is not its base model, .* as LlamaForCausalLM$"):
        PeftModel.from_pretrained(AutoModel.from_config(base.config), tmp_path)


def test_a_wrapped_model_has_what_its_base_has():
    """PEFT and others ask by hasattr."""
    body = get_peft_model(AutoModel.from_config(build("llama")[0].config), config_for("rep"))
    whole = get_peft_model(build("llama")[0], config_for("rep"))
    assert [hasattr(model.base_model, "prepare_inputs_for_generation") for model in (body, whole)] == [False, True]
