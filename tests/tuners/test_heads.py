"""Classification heads: what of them trains, where they start, and that the base keeps its own."""

import math

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from tolerances import assert_near
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from tt.trains import oracle
from tuners.families import build, config_of, inputs_for, logits, randomise
from tuners.heads import HEADS, WITH_HIDDEN, cores, dense, trained_head
from tuners.wrapped import config_for, every_method, trainable, trained, wrap

from loretta import get_peft_model
from loretta.layers.trains import TTLinear

N_CORES = 4  # of the planned 32 x 32 train: 8 x 4 | 4 x 8


STANDS_IN = [family for family in WITH_HIDDEN if family != "bert"]


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
