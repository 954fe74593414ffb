"""Classification heads: what of them trains, where they start, and that the base keeps its own."""

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from safetensors.torch import load_file
from tolerances import assert_near
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    SplinterConfig,
    SplinterForQuestionAnswering,
    Wav2Vec2ForSequenceClassification,
)
from tt.trains import oracle
from tuners.families import OPTIONS, build, config_of, inputs_for, logits, randomise
from tuners.wrapped import config_for, every_method, trainable, trained, wrap

from loretta import get_peft_model
from loretta.errors import InputError
from loretta.layers.trains import TTLinear

N_CORES = 4  # of the planned 32 x 32 train: 8 x 4 | 4 x 8


def cores(name: str, *, bias: bool = True) -> set[str]:
    return {f"{name}.cores.values"} | ({f"{name}.bias"} if bias else set())


def dense(name: str, *, bias: bool = True) -> set[str]:
    return {f"{name}.weight"} | ({f"{name}.bias"} if bias else set())


# family -> (hidden layer, has a bias), (final layer, has a bias); "copy" stands where PEFT puts the adapter's copy
HEADS = {
    "bert": (("bert.pooler.dense.{copy}", True), ("classifier.{copy}", True)),
    "roberta": (("classifier.{copy}.dense", True), ("classifier.{copy}.out_proj", True)),
    "deberta": (("pooler.dense.{copy}", True), ("classifier.{copy}", True)),
    "deberta-v2": (("pooler.dense.{copy}", True), ("classifier.{copy}", True)),
    "electra": (("classifier.{copy}.dense", True), ("classifier.{copy}.out_proj", True)),
    "modernbert": (("head.dense.{copy}", False), ("classifier.{copy}", True)),
    "bart": (("classification_head.{copy}.dense", True), ("classification_head.{copy}.out_proj", True)),
    "t5": (("classification_head.{copy}.dense", True), ("classification_head.{copy}.out_proj", True)),
    "llama": (None, ("score.{copy}", False)),
    "gpt2": (None, ("score.{copy}", False)),
}
WITH_HIDDEN = [family for family, (hidden, _) in HEADS.items() if hidden]
STANDS_IN = [family for family in WITH_HIDDEN if family != "bert"]


def trained_head(model: nn.Module, method: str) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in trainable(model) if f".loretta_{method}_" not in name}


@every_method
@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only", "dense", "frozen"])
@pytest.mark.parametrize("family", HEADS)
def test_what_of_the_head_trains(family, train_head, method):
    hidden, final = (part and (part[0].format(copy="modules_to_save.default"), part[1]) for part in HEADS[family])
    expected = set()
    if hidden and train_head.startswith("tensorized"):
        expected |= cores(hidden[0], bias=hidden[1])
    if hidden and train_head == "dense":
        expected |= dense(hidden[0], bias=hidden[1])
    if train_head in ("tensorized", "dense"):
        expected |= dense(final[0], bias=final[1])
    model, _ = wrap(family, method, "SEQ_CLS", train_head=train_head, train_norms=False)
    assert trained_head(model, method) == expected


@every_method
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_switching_leaves_frozen_parts_frozen(family, method):
    model, _ = wrap(family, method, "SEQ_CLS", train_head="tensorized_only", train_norms=False)
    names = trained_head(model, method)
    model.add_adapter("other", config_for(method, task_type="SEQ_CLS", train_head="frozen", train_norms=False))
    model.set_adapter("other")
    assert trained_head(model, method) == set()
    model.set_adapter("default")
    assert trained_head(model, method) == names
    with model.disable_adapter():
        assert trained_head(model, method) == set()
    assert trained_head(model, method) == names
    model.set_requires_grad("default", False)
    model.set_requires_grad("default", True)
    assert trained_head(model, method) == names


@every_method
def test_a_language_models_head_is_never_trained(method):
    for train_head in ("tensorized", "dense"):
        model, _ = wrap("llama", method, "CAUSAL_LM", train_head=train_head, train_norms=False)
        assert trained_head(model, method) == set()


@every_method
def test_without_a_task_type_no_head_is_touched(method):
    base, inputs = build("bert", "SEQ_CLS")
    expected = logits(base, inputs)
    model = get_peft_model(base, config_for(method, train_norms=False))
    assert trained_head(model, method) == set()
    assert torch.equal(logits(model, inputs), expected)


# Starts


@every_method
@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only"])
def test_a_pretrained_pooler_starts_as_no_change_at_all(train_head, method):
    base, inputs = build("bert", "SEQ_CLS")
    seen = {}
    for name, model in (("base", base), ("adapter", wrap("bert", method, "SEQ_CLS", train_head=train_head)[0])):
        inner = model if name == "base" else model.get_base_model()
        hook = inner.dropout.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        logits(model, inputs)
        hook.remove()
    assert seen["base"].std() > 0.1
    assert torch.equal(seen["adapter"], seen["base"])


@every_method
def test_the_change_of_a_pretrained_pooler_is_what_the_cores_moved(method):
    model, _ = wrap("bert", method, "SEQ_CLS")
    pooler = model.get_base_model().bert.pooler.dense
    start = oracle(list(pooler.modules_to_save["default"].cores), pooler.modules_to_save["default"].cores.shape)
    trained(model)
    layer, weight = pooler.modules_to_save["default"], pooler.original_module.weight.double().T
    change_IO = oracle(list(layer.cores), layer.cores.shape) - start
    x = torch.randn(5, 32)
    expected = x.double() @ (weight + change_IO) + pooler.original_module.bias + layer.bias
    assert_near("pooler", pooler(x), expected.float())
    assert layer.bias.any()


def with_fresh_head(family: str, method: str, **options) -> PeftModel:
    """An adapter on a base model with a head that transformers has just made."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        model = AutoModelForSequenceClassification.from_config(config_of(family)).eval()
        randomise(model.base_model.parameters(), seed=0)
        return get_peft_model(model, config_for(method, task_type="SEQ_CLS", **options)).eval()


def without_adapter(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with model.disable_adapter():
        return logits(model, inputs)


@every_method
@pytest.mark.parametrize("family", STANDS_IN)
def test_a_train_of_full_rank_stands_in_for_the_dense_layer_exactly(family, method):
    inputs = inputs_for("SEQ_CLS")
    full = with_fresh_head(family, method, tensor_rank=32)
    expected = without_adapter(full, inputs)
    assert_near("logits", logits(full, inputs), expected)
    cut = with_fresh_head(family, method, tensor_rank=2)
    assert (logits(cut, inputs) - expected).norm() > 1e-2 * expected.norm()


@every_method
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("family", STANDS_IN)
def test_a_train_of_lower_rank_is_as_near_as_a_truncated_svd_can_be(family, rank, method):
    model = with_fresh_head(family, method, tensor_rank=rank)
    name = HEADS[family][0][0]
    inner = model.get_base_model()
    layer = inner.get_submodule(name.format(copy="modules_to_save.default"))
    original = inner.get_submodule(name.format(copy="original_module"))
    weight_IO = original.weight.detach().double().T
    assert isinstance(layer, TTLinear)
    assert [core.shape[2] for core in layer.cores][:-1] == [rank] * (N_CORES - 1)
    error = (oracle(list(layer.cores), layer.cores.shape) - weight_IO).norm().item()
    # Oseledets 2011, corollary 2.4: the error lies between the worst cut's and the root of their summed squares
    modes, cut_errors = layer.cores.shape.modes, []
    for cut in range(1, N_CORES):
        values = torch.linalg.svdvals(weight_IO.reshape(math.prod(modes[:cut]), -1))
        cut_errors.append(values[rank:].norm().item())
    assert max(cut_errors) - 1e-5 <= error <= math.hypot(*cut_errors) + 1e-5
    assert layer.bias is None if original.bias is None else torch.equal(layer.bias, original.bias)


@every_method
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_cores_of_a_head_are_of_one_size(family, method):
    # an optimiser that takes steps of one size everywhere needs cores of one size
    model, _ = wrap(family, method, "SEQ_CLS", tensor_rank=2)
    layer = next(module for module in model.modules() if isinstance(module, TTLinear))
    norms = [core.norm().item() for core in layer.cores]
    assert norms == pytest.approx([norms[0]] * N_CORES, rel=1e-4)


@every_method
@pytest.mark.parametrize("family", WITH_HIDDEN)
def test_the_head_follows_the_shapes_and_rank_of_the_config(family, method):
    model, _ = wrap(family, method, "SEQ_CLS", tensor_rank=2, shapes={"32x32": [32, 2, 16]})
    layer = next(module for module in model.modules() if isinstance(module, TTLinear))
    assert layer.cores.shape.modes == (32, 2, 16)
    assert layer.cores.shape.ranks == (1, 2, 2, 1)


# The base keeps its own


@every_method
@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only", "dense", "frozen"])
@pytest.mark.parametrize("family", HEADS)
def test_the_base_keeps_its_head(family, train_head, method):
    base, inputs = build(family, "SEQ_CLS")
    values = {name: value.clone() for name, value in base.state_dict().items()}
    expected = logits(base, inputs)
    model, _ = wrap(family, method, "SEQ_CLS", train_head=train_head)
    trained(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    now = model.unload().state_dict()
    assert list(now) == list(values)
    assert all(torch.equal(now[name], value) for name, value in values.items())


# Other tasks


@every_method
@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("train_head", ["tensorized", "frozen"])
def test_heads_of_other_tasks(family, task, train_head, method):
    auto = {"TOKEN_CLS": AutoModelForTokenClassification, "QUESTION_ANS": AutoModelForQuestionAnswering}[task]
    model = get_peft_model(
        auto.from_config(config_of(family)),
        config_for(method, task_type=task, train_head=train_head, train_norms=False),
    )
    final = "score" if family == "llama" else "classifier"
    final = "qa_outputs" if task == "QUESTION_ANS" else final
    expected = dense(f"{final}.modules_to_save.default") if train_head == "tensorized" else set()
    assert trained_head(model, method) == expected
    out = model(input_ids=torch.arange(5, 17).reshape(2, 6))
    assert (out.logits if task == "TOKEN_CLS" else out.start_logits).shape[:2] == (2, 6)


@every_method
@pytest.mark.parametrize("train_head", ["tensorized", "tensorized_only", "dense", "frozen"])
def test_distilberts_pre_classifier_is_its_hidden_layer(train_head, method):
    config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    model = get_peft_model(
        DistilBertForSequenceClassification(config),
        config_for(method, task_type="SEQ_CLS", train_head=train_head, train_norms=False),
    )
    hidden, final = "pre_classifier.modules_to_save.default", "classifier.modules_to_save.default"
    expected = {
        "tensorized": cores(hidden) | dense(final),
        "tensorized_only": cores(hidden),
        "dense": dense(hidden) | dense(final),
        "frozen": set(),
    }
    assert trained_head(model, method) == expected[train_head]


@every_method
def test_regression_and_many_labels(method):
    for labels in (1, 7):
        model, inputs = wrap("roberta", method, "SEQ_CLS", base={"num_labels": labels})
        assert logits(trained(model), inputs).shape == (4, labels)


@every_method
def test_a_head_that_the_user_names_too_is_copied_once(method):
    plain, _ = wrap("roberta", method, "SEQ_CLS")
    named, _ = wrap("roberta", method, "SEQ_CLS", modules_to_save=["classifier"])
    assert trainable(named).keys() == trainable(plain).keys()


# Where a head comes from

HOW = ("tensorized", "tensorized_only", "dense", "frozen")
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
    if train_head.startswith("tensorized") and family not in ("bert", "xlm", "flaubert"):
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
@pytest.mark.parametrize("family", ["roberta", "deberta", "modernbert", "distilbert"])
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
def test_a_train_that_stood_in_for_a_loaded_layer_still_does(method, loaded, tmp_path):
    """Adapters were once trained so, and their files do not say of what origin the head was."""
    base = loaded("roberta")
    model = get_peft_model(copy.deepcopy(base), options("roberta", method, train_norms=False))
    inner = model.get_base_model().classifier.modules_to_save["default"]
    inner.set_submodule("dense", TTLinear.from_dense(base.classifier.dense, inner.dense.cores.shape))
    expected = outputs("roberta", trained(model).eval())
    model.peft_config["default"]._origins_found = None
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded("roberta"), tmp_path / "adapter").eval()
    assert torch.equal(outputs("roberta", again), expected)


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
