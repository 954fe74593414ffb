"""Runs whose base is quantised: trained, recorded, scored and applied again, and refused in one sentence."""

import importlib.util
import json
import re

import pytest
import torch
from torch import nn
from training_data import sentences
from transformers import GPT2Config, GPT2LMHeadModel

from loretta.errors import InputError
from loretta.training.config import read_config
from loretta.training.data import load_config_task
from loretta.training.model import load_base
from loretta.training.predict import evaluate, load_run, predict
from loretta.training.run import train

PACKAGE = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao", "fp8": "torchao"}
every_form = pytest.mark.parametrize(
    "quantize",
    [
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(p) is None, reason=f"{name} needs {p}"))
        for name, p in PACKAGE.items()
    ],
)


def config(model, data, folder, **changes):
    options = {"model": model, "data": data, "text": "review", "label": "mood", "output": str(folder), "cpu": True}
    options |= {
        "max_steps": 4,
        "batch_size": 8,
        "max_length": 16,
        "learning_rate": 5e-2,
        "method_args": {"tensor_rank": 3},
    }
    return read_config(None, options | changes)


@pytest.fixture(scope="module")
def plain(bert, reviews, tmp_path_factory):
    """The record of a run whose base is in float32."""
    return train(config(bert, reviews, tmp_path_factory.mktemp("plain") / "run", max_steps=1))


@every_form
def test_a_run_is_recorded_and_loads_its_base_quantized_again(bert, reviews, plain, tmp_path, quantize):
    options = config(bert, reviews, tmp_path / quantize, quantize=quantize)
    record = train(options)
    assert json.loads((tmp_path / quantize / "run.json").read_text())["config"]["quantize"] == quantize
    assert record.parameters == plain.parameters
    run = load_run(tmp_path / quantize, cpu=True)
    assert run.model.base_model.model.is_quantized
    scores = evaluate(run, load_config_task(options), "validation")
    assert scores["accuracy"] == record.validation["accuracy"]
    assert {row["label"] for row in predict(run, [[text for text, _ in sentences(12)]])} <= {"pos", "neg"}


@every_form
def test_the_head_stays_in_its_float_form(bert, quantize):
    base = load_base(bert, "classification", label_names=("a", "b"), quantize=quantize, cpu=True)
    for head in (base.classifier, base.bert.pooler.dense):
        assert type(head) is nn.Linear
        assert type(head.weight) is nn.Parameter
        assert type(head.weight.data) is torch.Tensor


@pytest.mark.parametrize("quantize", ["nf4", "torchao-int8"])
def test_a_missing_package_is_named_with_its_mend(bert, quantize, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in PACKAGE.values() else find(name))
    words = f"needs the package {PACKAGE[quantize]}: pip install 'loretta-peft[quantize]'"
    with pytest.raises(InputError, match=re.escape(words)):
        load_base(bert, "classification", label_names=("a", "b"), quantize=quantize)


def test_an_unknown_form_is_refused_with_those_that_exist(bert, reviews, tmp_path):
    with pytest.raises(InputError, match=r"quantize='int4' must be 'nf4', 'fp4', 'int8', 'torchao-int8' or 'fp8'"):
        config(bert, reviews, tmp_path, quantize="int4")
    with pytest.raises(InputError, match="quantize='int4' is none of nf4, fp4, int8, torchao-int8, fp8"):
        load_base(bert, "classification", quantize="int4")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_model_that_stays_as_it_is_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="quantize='fp8' changes no layer of"):
        load_base(str(tmp_path), "language_modeling", quantize="fp8", cpu=True)
