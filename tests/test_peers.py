"""The peers of benchmarks/peers.py have the sizes that their papers give at RoBERTa-base's shape."""

import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from loretta.training.model import wrap

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("peers", BENCHMARKS / "peers.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("name", "of_a_layer", "of_all"),
    [
        ("VeRA r=1024", 2 * (1024 + 768), 0),  # 0.043 million
        ("FourierFT n=1000", 2 * 1000, 0),  # 0.024 million
        ("Uni-LoRA d=23040", 0, 23_040),  # 0.023 million
        # a bank of 0.023 million; logits of 3 parts of 4 rows and columns of both matrices
        ("VB-LoRA h=90, b=256", 2 * 2 * 4 * 3 * 90, 90 * 256),
        # one number for each output of six linear layers
        ("RoAd", 5 * 768 + 3072, 0),
        ("BEFT", 768, 0),
        ("prompt 20", 0, 20 * 768),
        ("prefix 20", 20 * 2 * 768, 0),
    ],
)
def test_a_peer_trains_as_many_numbers_as_published(peers, name, of_a_layer, of_all):
    config = BertConfig(
        vocab_size=32, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=1
    )
    method = next(method for method in peers.PEERS if method.name == name)
    model = wrap(BertForSequenceClassification(config), method.method, "classification", method.options)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
    assert sum(trained.values()) == of_a_layer + of_all
