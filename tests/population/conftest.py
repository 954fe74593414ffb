"""A model without dropout, and the options of short runs on it."""

import json

import pytest
from tiny_models import save_bert


@pytest.fixture(scope="module")
def steady_bert(tmp_path_factory):
    """Without dropout, whose draws differ between runs as between devices."""
    folder = save_bert(tmp_path_factory.mktemp("models") / "steady-bert", layers=2)
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    config["hidden_dropout_prob"] = config["attention_probs_dropout_prob"] = 0.0
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    return folder


@pytest.fixture
def options(steady_bert, reviews):
    return {
        "model": steady_bert,
        "data": reviews,
        "text": "review",
        "label": "mood",
        "cpu": True,
        "epochs": 2,
        "batch_size": 8,
        "logging_steps": 3,
        "method": "rep",
    }
