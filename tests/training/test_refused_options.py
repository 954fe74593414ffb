"""Options of a method that could not be, or with which nothing would be learned, are refused in one sentence."""

import pytest
import torch
from training_data import config_for
from tuners.families import build

from loretta.errors import InputError, OutOfMemory
from loretta.training import model as models
from loretta.training.model import wrap
from loretta.training.run import train

HUGE = 99_999
TOO_LARGE = {
    ("compact", "tensor_rank"): "a rank of 99999 needs .* beside a matrix of",
    ("compact", "r"): "a bottleneck of 99999 needs",
    ("rep", "tensor_rank"): "a rank of 99999 needs",
    ("adp", "tensor_rank"): "a rank of 99999 needs",
    ("adp", "bottleneck_size"): "a bottleneck of 99999 needs",
    ("adapters", "tensor_rank"): "'bert.pooler.dense': a train of rank 99999 needs",
    ("shared", "tensor_rank"): "a rank of 99999 needs",
    ("lora", "r"): "r=99999 needs .* beside a matrix of",
    ("peft:vera", "r"): "r=99999 needs",
    ("peft:loha", "r"): "r=99999 needs",
    ("prefix", "num_virtual_tokens"): "num_virtual_tokens=99999: it reads 512 tokens at most.*give fewer",
    ("prompt", "num_virtual_tokens"): "num_virtual_tokens=99999: it reads 512 tokens",
    ("p-tuning", "num_virtual_tokens"): "num_virtual_tokens=99999: it reads 512 tokens",
    ("p-tuning", "encoder_hidden_size"): "encoder_hidden_size=99999 needs .* beside its own",
}
NOTHING = [
    ("lora", {"lora_alpha": 0}, "lora_alpha=0 scales the adapter to nothing, so that it learns nothing"),
    ("peft:loha", {"alpha": 0}, "alpha=0 scales"),
    ("peft:fourierft", {"scaling": 0.0}, "scaling=0.0 scales"),
    ("peft:vera", {"d_initial": 0}, "d_initial=0 scales"),
    ("compact", {"lora_alpha": 0}, "lora_alpha=0 scales"),
    ("lora", {"lora_dropout": 1.0}, "lora_dropout=1.0 must be at least 0 and below 1"),
    ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be a whole number of at least 1"),
    ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be"),
    ("p-tuning", {"num_virtual_tokens": -3}, "num_virtual_tokens=-3 must be"),
    ("p-tuning", {"encoder_hidden_size": 0}, "encoder_hidden_size=0 must be"),
]
NOT_THERE = [
    *((name, {"layers_to_transform": 99}, "no layer 99: give some of its 2, 0 to 1$")
      for name in ("compact", "adp", "shared", "lora", "peft:vera")),
    ("lora", {"layers_to_transform": [0, 7]}, "no layer 7: give"),
    ("lora", {"layers_to_transform": [0], "layers_pattern": "h"}, r"no layer 0 under .*: no module has a number there"),
    *((name, {"target_modules": "quer"}, r"'quer'\]? .*did you mean 'query'")
      for name in ("compact", "lora", "ia3", "norms", "peft:vera")),
    ("lora", {"target_modules": ["foo", "bar"]}, "target_modules: the model has no module 'bar'"),
    ("lora", {"target_modules": ".*foo"}, r"target_modules: the model has no module '\.\*foo'"),
    ("lora", {"rank_pattern": {"quer": 3}}, "rank_pattern: the model has no module 'quer' .did you mean 'query'"),
    ("compact", {"alpha_pattern": {"foo": 3}}, "alpha_pattern: the model has no module 'foo'"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "option"), TOO_LARGE)
def test_a_size_that_no_model_could_hold_is_refused_before_memory_is_taken(method, option, bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", method=method, method_args={option: HUGE})
    with pytest.raises(InputError, match=TOO_LARGE[method, option]) as refused:
        train(config)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "options", "words"), NOTHING + NOT_THERE)
def test_options_with_which_nothing_would_be_done_are_refused(method, options, words):
    base, _ = build("bert")
    with pytest.raises(InputError, match=words) as refused:
        wrap(base, method, "classification", options)
    assert not hasattr(base, "peft_config")
    assert not str(refused.value).endswith("...")


def test_targets_of_several_families_are_taken_where_one_is_there():
    base, _ = build("bert")
    wrap(base, "lora", "classification", {"target_modules": ["query", "q_proj"]})
    assert hasattr(base.bert.encoder.layer[0].attention.self.query, "lora_A")


def test_layers_and_patterns_that_are_there_are_taken():
    options = {"layers_to_transform": [1], "rank_pattern": {"1.attention.self.query": 2, ".*value": 3}}
    model = wrap(build("bert")[0], "lora", "classification", options)
    ranks = {
        name.rpartition(".")[2]: layer.r["default"] for name, layer in model.named_modules() if hasattr(layer, "r")
    }
    assert ranks == {"query": 2, "value": 3}


def test_an_adapter_that_does_not_fit_the_memory_is_told_of_its_own_sizes(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(models, "get_peft_model", full)
    with pytest.raises(OutOfMemory, match=r"too small for the adapter of method 'lora' .*: give smaller sizes"):
        wrap(build("bert")[0], "lora", "classification", {})
