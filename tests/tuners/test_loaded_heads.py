"""Where a head comes from: a loaded one stays what it was, a random one is in the adapter's file."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    SplinterConfig,
    SplinterForQuestionAnswering,
    Wav2Vec2ForSequenceClassification,
)
from tuners.families import OPTIONS, build, config_of, inputs_for, logits, randomise
from tuners.heads import HEADS, HOW, WITH_HIDDEN
from tuners.wrapped import config_for, every_method, trainable, trained

from loretta import get_peft_model
from loretta.errors import InputError

TINY = {
    "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4},
    "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
    "xlm": {"vocab_size": 64, "emb_dim": 32, "n_layers": 1, "n_heads": 4},
    "flaubert": {"vocab_size": 64, "emb_dim": 32, "n_layers": 1, "n_heads": 4},
    "eurobert": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mask_token_id": 3,
    },
    "modernbert-decoder": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "wav2vec2": {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "conv_dim": (16, 16),
        "conv_stride": (5, 4),
        "conv_kernel": (8, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 16,
    },
}


TARGETS = {"distilbert": "q_lin", "xlnet": "ff.layer_1", "xlm": "q_lin", "flaubert": "q_lin"}


ROOMS = [*WITH_HIDDEN, *TINY]  # of models whose heads have more than a final layer


def model_class(family: str, task: str) -> type:
    if family == "wav2vec2":
        return Wav2Vec2ForSequenceClassification
    return {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}[task]


def make(family: str, task: str = "SEQ_CLS", *, seed: int = 0) -> nn.Module:
    config = AutoConfig.for_model(family, num_labels=3, **TINY[family]) if family in TINY else config_of(family)
    config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        cls = model_class(family, task)
        return (cls(config) if family == "wav2vec2" else cls.from_config(config)).eval()


def load(family: str, folder: Path, task: str = "SEQ_CLS", *, seed: int = 0) -> nn.Module:
    """From a checkpoint. What it lacks is random, by ``seed``."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        return model_class(family, task).from_pretrained(folder, num_labels=3).eval()


def options(family: str, method: str, **more):
    targets = {} if family in HEADS else {"target_modules": [TARGETS.get(family, "q_proj")]}
    return config_for(method, **{"task_type": "SEQ_CLS", **targets, **more})


def outputs(family: str, model: nn.Module) -> Tensor:
    if family == "wav2vec2":
        with torch.no_grad():
            return model(input_values=torch.sin(torch.arange(3200.0)).reshape(2, 1600)).logits
    ids = inputs_for("SEQ_CLS")
    return logits(model, {"input_ids": ids["input_ids"]} if family in TINY else ids)


@pytest.fixture
def loaded(tmp_path):
    """A function that saves a model of a family, its head trained by somebody, and loads it anew."""

    def build_and_load(family: str) -> nn.Module:
        model = make(family)
        randomise(model.parameters(), seed=0)
        model.save_pretrained(tmp_path / family)
        return load(family, tmp_path / family)

    return build_and_load


@every_method
@pytest.mark.parametrize("train_head", HOW)
@pytest.mark.parametrize("family", ROOMS)
def test_a_loaded_head_stays_what_it_was(family, train_head, method, loaded, tmp_path, caplog):
    base = loaded(family)
    expected = outputs(family, base)
    with caplog.at_level(logging.INFO, logger="loretta.tuners.heads"):
        model = get_peft_model(base, options(family, method, train_head=train_head)).eval()
    assert torch.equal(outputs(family, model), expected)
    if train_head.startswith("tensorized") and family not in ("xlm", "flaubert"):  # which have no hidden layer
        assert "a train is added to it" in caplog.text
    changed = outputs(family, trained(model))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(family), tmp_path / "adapter").eval()
    assert torch.equal(outputs(family, again), changed)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [key for key in saved if "base_weight" in key]  # the base model brings it


@every_method
@pytest.mark.parametrize("train_head", HOW)
@pytest.mark.parametrize("family", ROOMS)
def test_what_is_random_is_in_the_adapters_file(family, train_head, method, tmp_path, caplog):
    make(family).base_model.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.INFO, logger="loretta.tuners.heads"):
        model = get_peft_model(load(family, tmp_path / "base", seed=1), options(family, method, train_head=train_head))
    if train_head.startswith("tensorized") and family not in ("bert", "xlm", "flaubert", "modernbert-decoder"):
        assert "a train that starts as its TT-SVD" in caplog.text
        assert "a train is added" not in caplog.text
    expected = outputs(family, trained(model).eval())
    model.save_pretrained(tmp_path / "adapter")
    other = load(family, tmp_path / "base", seed=2)
    assert torch.equal(outputs(family, PeftModel.from_pretrained(other, tmp_path / "adapter").eval()), expected)


@every_method
@pytest.mark.parametrize("train_head", HOW)
def test_what_is_random_beside_the_labels_of_tokens_is_saved(train_head, method, tmp_path):
    make("modernbert").base_model.save_pretrained(tmp_path / "base")
    base = load("modernbert", tmp_path / "base", "TOKEN_CLS", seed=1)
    config = options("modernbert", method, task_type="TOKEN_CLS", train_head=train_head)
    model = trained(get_peft_model(base, config)).eval()
    expected = outputs("modernbert", model)
    model.save_pretrained(tmp_path / "adapter")
    other = load("modernbert", tmp_path / "base", "TOKEN_CLS", seed=2)
    assert torch.equal(outputs("modernbert", PeftModel.from_pretrained(other, tmp_path / "adapter").eval()), expected)


@every_method
def test_a_head_without_a_layer_of_a_known_name_is_saved(method, tmp_path):
    """Splinter's answers come from layers of its own, of which PEFT knows no name."""
    config = SplinterConfig(**{**OPTIONS["bert"], "question_token_id": 5})
    SplinterForQuestionAnswering(config).base_model.save_pretrained(tmp_path / "base")

    def load(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            return SplinterForQuestionAnswering.from_pretrained(tmp_path / "base").eval()

    def answers(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**inputs_for("TOKEN_CLS")).start_logits

    model = get_peft_model(load(1), options("bert", method, task_type="QUESTION_ANS", target_modules=["query"]))
    expected = answers(trained(model).eval())
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(answers(PeftModel.from_pretrained(load(2), tmp_path / "adapter").eval()), expected)


@every_method
@pytest.mark.parametrize("way", ["trained", "copied", "state dict"])
@pytest.mark.parametrize("family", ["roberta", "deberta", "modernbert", "modernbert-decoder", "distilbert"])
def test_a_head_of_unknown_origin_stays_what_it_was_and_is_saved(family, way, method, tmp_path):
    make(family).base_model.save_pretrained(tmp_path / "base")
    base = load(family, tmp_path / "base", seed=1).train()
    if way == "trained":
        optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
        base(**inputs_for("SEQ_CLS"), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        base.zero_grad()
    elif way == "copied":
        base = copy.deepcopy(base)
    else:
        randomised = make(family, seed=5)
        randomise(randomised.parameters(), seed=5)
        base.load_state_dict(randomised.state_dict())
    expected = outputs(family, base.eval())
    body = {name: value.clone() for name, value in base.base_model.state_dict().items()}
    model = get_peft_model(base, options(family, method)).eval()
    assert torch.equal(outputs(family, model), expected)
    expected = outputs(family, trained(model))
    model.save_pretrained(tmp_path / "adapter")
    other = load(family, tmp_path / "base", seed=2)
    other.base_model.load_state_dict(body)
    assert torch.equal(outputs(family, PeftModel.from_pretrained(other, tmp_path / "adapter").eval()), expected)


@every_method
def test_an_adapter_beside_a_loaded_head_is_refused_where_the_head_is_random(method, loaded, tmp_path):
    model = get_peft_model(loaded("roberta"), options("roberta", method))
    model.save_pretrained(tmp_path / "adapter")
    make("roberta").base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="brings 'classifier', which is random here"):
        PeftModel.from_pretrained(load("roberta", tmp_path / "base"), tmp_path / "adapter")


@every_method
def test_a_head_in_half_precision_holds_its_trains_in_float32(method):
    base, inputs = build("roberta", "SEQ_CLS", dtype=torch.bfloat16)
    expected = logits(base, inputs)
    model = get_peft_model(base, options("roberta", method)).eval()
    assert torch.equal(logits(model, inputs), expected)
    train = model.get_base_model().classifier.modules_to_save["default"].dense
    assert train.cores.values.dtype == torch.float32
    assert logits(trained(model), inputs).dtype == torch.bfloat16
    if method != "adp":
        assert {parameter.dtype for parameter in model.merge_and_unload().parameters()} == {torch.bfloat16}


@every_method
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_transformers_switches_heads_off_and_on(family, method):
    model, inputs = build(family, "SEQ_CLS")
    plain = logits(model, inputs)
    model.add_adapter(options(family, method, train_head="tensorized_only"))
    expected, names = logits(trained(model).eval(), inputs), set(trainable(model))
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)
    assert not trainable(model)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), expected)
    assert set(trainable(model)) == names


@every_method
def test_a_loaded_pooler_is_pretrained_even_with_a_bias_of_zeros(method, tmp_path):
    from transformers import BertForSequenceClassification, BertModel

    base = BertModel(build("bert")[0].config)
    assert not base.pooler.dense.bias.any()
    base.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = build("bert")[1]
    expected = logits(model, inputs)
    wrapped = get_peft_model(model, config_for(method, task_type="SEQ_CLS")).eval()
    # the train changes the pooler instead of standing in for it: at the start nothing changes
    assert torch.equal(logits(wrapped, inputs), expected)


@every_method
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_base_that_is_loaded_later_is_the_one_that_a_head_changes(family, method, tmp_path):
    """PEFT puts the weights of a base into a wrapped model, as after FSDP's wrapping."""
    make(family).save_pretrained(tmp_path / "base")
    other = randomised(load(family, tmp_path / "base"), seed=3)
    model = trained(get_peft_model(load(family, tmp_path / "base"), options(family, method)).eval())
    assert equal(get_base_model_state_dict(model), load(family, tmp_path / "base").state_dict())
    set_base_model_state_dict(model, other.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(outputs(family, loaded.eval()), outputs(family, model))


def randomised(model: nn.Module, *, seed: int) -> nn.Module:
    randomise(model.parameters(), seed=seed)
    return model


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
@every_method
def test_a_loaded_adapter_does_not_make_the_base_random(method, tmp_path):
    """transformers marks what it loads: beside its marks all of a base made from a config was taken for a head."""
    model, _ = build("llama", "SEQ_CLS")
    model.add_adapter(config_for(method, task_type="SEQ_CLS"), "first")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    model.add_adapter(config_for(method, task_type="SEQ_CLS"), "third")
    copied = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert copied == ["score"]
