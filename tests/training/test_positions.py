"""Texts longer than a model has positions for are refused with the length that fits, and cut in what is asked later."""

import csv

import pytest
from commands import assert_refused, call
from training_data import config_for, sentences
from transformers import AutoConfig, AutoModel

from loretta.training.model import positions_of
from loretta.training.predict import load_run, predict
from loretta.training.run import train

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
LIMITS = {
    ("bert", "max_position_embeddings"): 24,
    ("roberta", "max_position_embeddings"): 22,
    ("mpnet", "max_position_embeddings"): 22,
    ("distilbert", "max_position_embeddings"): 24,
    ("gpt2", "n_positions"): 24,
    ("opt", "max_position_embeddings"): 24,
    ("llama", "max_position_embeddings"): None,
    ("modernbert", "max_position_embeddings"): None,
}


@pytest.mark.parametrize(("family", "key"), LIMITS)
def test_the_limit_is_the_last_length_that_the_model_computes(family, key):
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = AutoConfig.for_model(family, **{**SMALL, key: 24, **special})
    if family == "opt":
        config.ffn_dim, config.word_embed_proj_dim = 16, 16
    model = AutoModel.from_config(config).eval()
    limit = positions_of(model)
    assert limit == LIMITS[family, key]
    ids = model.dummy_inputs["input_ids"][:1, :1] * 0 + 5
    model(ids.repeat(1, limit or 30))
    if limit is not None:
        with pytest.raises((RuntimeError, IndexError)):
            model(ids.repeat(1, limit + 1))


def test_long_texts_are_refused_at_the_door_and_cut_where_they_come_later(bert, reviews, tmp_path, capsys):
    long = tmp_path / "long.csv"
    with long.open("w", newline="") as file:
        csv.writer(file).writerows([("review", "mood"), *sentences(40), ("a good film " * 300, "pos")])
    given = ["--text", "review", "--label", "mood", "--cpu", "--max-length", 2000, "-o", tmp_path / "no"]
    status, _, err = call(capsys, "train", "--model", bert, "--data", long, *given)
    assert_refused(status, err, ["has positions for 512 tokens, and the longest text has 902", "--max-length 512"])
    assert not (tmp_path / "no").exists()
    train(config_for(bert, reviews, tmp_path / "run", max_length=2000, max_steps=2))
    run = load_run(tmp_path / "run", cpu=True)
    whole, cut = predict(run, [["a good film " * 300]]), predict(run, [["a good film " * 170]])
    assert whole == cut


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_generator_takes_are_refused(seed, bert, reviews, tmp_path, capsys):
    with pytest.raises(ValueError, match="seed"):
        config_for(bert, reviews, tmp_path / "run", seed=seed)
    given = ["--data", reviews, "--model", bert, "--seed", seed]
    assert_refused(*call(capsys, "train", *given)[::2], ["seed="])


def test_a_run_is_resumed_or_replaced(bert, reviews, tmp_path, capsys):
    status, _, err = call(capsys, "train", "--model", bert, "--data", reviews, "--resume", "--overwrite")
    assert_refused(status, err, ["give one of them"])
