"""Each method of a published cell still fits its model: what its command would train is what the row says."""

import argparse
import pathlib
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MPNetConfig,
)

from loretta.training.methods import find_method, peft_config

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import forms  # noqa: E402
from cells import Cell  # noqa: E402
from methods import HIDDEN  # noqa: E402
from protocol import read_rows  # noqa: E402
from tables import RESULTS  # noqa: E402

# the sizes of the models of the evidence, with few words
MODELS = {
    "all-MiniLM-L6-v2": BertConfig(
        vocab_size=64, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    ),
    "all-mpnet-base-v2": MPNetConfig(vocab_size=64),
    "SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=0,
    ),
}  # fmt: skip
COUNTED = ["rep", "adp + norms", "compact v, MLP + scales", "shared r=2 last 5", "LoRA r=1 v", "IA3", "norms"]


def rows_of(model):
    """A row of each method that was run on a model."""
    rows = read_rows(sorted(RESULTS.glob("forms_*.json")) + sorted(RESULTS.glob("peers_*.json")))
    return {row["method"]: row for row in rows if row["model"] == model and row["part"] in ("front", "rates")}


@pytest.mark.parametrize("name", MODELS)
def test_a_measured_method_fits_its_model(name, tmp_path):
    folder = tmp_path / name
    MODELS[name].save_pretrained(folder)
    args = argparse.Namespace(model=folder, max_steps=None, limit=None, cpu=True)
    glue = name != "SmolLM2-135M-Instruct"
    build = (AutoModelForSequenceClassification if glue else AutoModelForCausalLM).from_config
    with torch.device("meta"):
        base = build(MODELS[name])
    counted = 0
    for method, row in rows_of(name).items():
        if not glue:  # rows that are not looked at
            (tmp_path / row["task"]).mkdir(exist_ok=True)
            for split in ("train", "validation"):
                (tmp_path / row["task"] / f"{split}.jsonl.gz").touch()
        cell = Cell(task=row["task"], method=method, rates=(1e-3,), seeds=(0,), epochs=1)
        (config,) = forms.configs_of(cell, args, tmp_path, tmp_path / "scratch")
        if find_method(config.method).config is None:
            continue
        kind = "SEQ_CLS" if glue else "CAUSAL_LM"
        adapted = peft_config(config.method, base, kind, config.method_args, config.head_policy)
        if method in COUNTED:
            with torch.device("meta"):
                trained = get_peft_model(build(MODELS[name]), adapted).named_parameters()
            head = ("score", "classifier", *HIDDEN)
            sizes = [p.numel() for key, p in trained if p.requires_grad and not any(part in key for part in head)]
            assert sum(sizes) == row["trained"], method
            counted += 1
    assert counted >= 5
