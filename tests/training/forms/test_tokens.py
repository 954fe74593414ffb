"""Tags of tokens: which piece has the tag, what is scored, and a run from its command to its answers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_refused, call
from draws import seed_torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tolerances import assert_near
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from loretta.record import RunRecord
from loretta.tasks import load_task
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.forms.tokens import best_tags, first_pieces, score_sequences, score_tags, tags_of_words, tokenize
from loretta.training.model import load_base, load_tokenizer, wrap

DATA = Path(__file__).parents[3] / "docs" / "data" / "names.jsonl"


def test_the_first_piece_has_the_tag_and_a_token_is_read_as_after_a_blank():
    """Bytes in pairs: "Mara" is " M", "ar", "a" behind another token, and its blank belongs to it."""
    pairs = ["Ġ", "M", "a", "r", "s", "b", "ĠM", "ar"]
    pieces = Tokenizer(models.BPE({p: k for k, p in enumerate(pairs)}, [("Ġ", "M"), ("a", "r")]))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="Ġ", add_prefix_space=False)
    found = tokenize(tokenizer, [["as", "Mara"], ["b"]], 5)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found["input_ids"]] == [
        ["Ġ", "a", "s", "ĠM", "ar"],
        ["Ġ", "b"],
    ]
    assert found.word_ids(0) == [0, 0, 0, 1, 1]
    # a tokenizer that splits before it looks at bytes, as Qwen's, and one of LLaMA's that does neither
    split = pre_tokenizers.Split(Regex(r" ?\w+|\S"), "isolated")
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    later = tokenize(PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="Ġ"), [["as", "Mara"], ["b"]], 5)
    assert (later["input_ids"], later.word_ids(0)) == (found["input_ids"], found.word_ids(0))
    blanks = [normalizers.Prepend("Ġ"), normalizers.Replace(" ", "Ġ")]
    pieces.pre_tokenizer, pieces.normalizer = None, normalizers.Sequence(blanks)
    later = tokenize(PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="Ġ"), [["as", "Mara"], ["b"]], 5)
    assert (later["input_ids"], later.word_ids(0)) == (found["input_ids"], found.word_ids(0))
    assert first_pieces(found.word_ids(0), [7, 8]) == [7, -100, -100, 8, -100]
    assert first_pieces([None, 0, 0, 2, None], [7, 8, 9]) == [-100, 7, -100, 9, -100]
    assert tags_of_words([None, 0, 0, 2, None], [4, 0, 4, 1, 4], 4, ["O", "X"]) == ["O", None, "X", None]


def test_entities_are_scored_whole():
    """Two of three answers are right, and two of four entities are found: kind and both ends must fit."""
    task = load_task(DATA)
    ids = {name: k for k, name in enumerate(task.label_names)}
    gold = ["B-PER I-PER O B-LOC", "O B-LOC I-LOC", "B-PER"]
    said = ["B-PER I-PER O O", "O B-LOC O", "B-PER"]
    rows = [[[ids[tag] for tag in row.split()] for row in rows] for rows in (said, gold)]
    scores = score_sequences(task, *rows)
    assert (scores["entity_precision"], scores["entity_recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert scores["entity_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert scores["accuracy"] == pytest.approx(6 / 8)
    # the same through logits, with a piece that has no tag
    logits = torch.zeros(1, 3, len(ids))
    logits[0, 0, ids["B-PER"]] = logits[0, 1, ids["B-LOC"]] = logits[0, 2, ids["O"]] = 1
    labels = np.array([[ids["B-PER"], -100, ids["O"]]])
    assert score_tags(task, best_tags(logits).numpy(), labels)["entity_f1"] == 1
    logits[0, 1, 0] = np.inf
    assert score_tags(task, best_tags(logits).numpy(), labels)["entity_f1"] == 1
    logits[0, 0, 0] = np.nan
    best = best_tags(logits)
    assert all(np.isnan(value) for value in score_tags(task, best.numpy(), labels).values())
    assert tags_of_words([0, None, 1], best[0].tolist(), 3, task.label_names) == [None, "O", None]


@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_the_loss_is_that_of_first_pieces_alone(method, bert, tmp_path):
    """Of an update of several batches too: a tag counts the same in each."""
    config = RunConfig(model=bert, data=str(DATA), method=method, cpu=True, output=str(tmp_path), batch_size=4)
    task, tokenizer = load_config_task(config), load_tokenizer(bert)
    seed_torch(0)
    base = load_base(bert, task.kind, label_names=task.label_names)
    model = wrap(base, method, task.kind, {}).double().eval()
    assert any("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    trainer = make_trainer(encode_splits(config, task, tokenizer), model, tmp_path)
    losses = []
    for tokens, tags in zip(task.train["tokens"], task.train["tags"], strict=True):
        logits = model(input_ids=torch.tensor([[2, *tokenizer.convert_tokens_to_ids(tokens), 3]])).logits[0, 1:-1]
        losses.append(cross_entropy(logits, torch.tensor(tags), reduction="none"))
    rows = [{k: v for k, v in row.items() if k != "words"} for row in trainer.train_dataset]
    parts = [trainer.data_collator(rows[:3]), trainer.data_collator(rows[3:])]
    count = torch.tensor(sum(map(len, losses)))
    got = sum(trainer.compute_loss(model, dict(part), num_items_in_batch=count) for part in parts)
    assert_near("loss", got, torch.cat(losses).mean())


def test_a_run_from_its_command_to_its_answers(bert, capsys, tmp_path):
    run = tmp_path / "run"
    status, out, err = call(
        capsys, "train", "--model", bert, "--data", DATA, "--test", DATA, "--cpu", "--epochs", 2, "--lr", "1e-2",
        "--max-length", 8, "-o", run,
    )  # fmt: skip
    assert status == 0, err
    assert "names.jsonl: token classification; in train 'O' " in out
    assert "8 of the 20 texts are longer than max_length=8 tokens" in out
    assert "the most frequent tag of train, scores entity_f1 0.0000" in out
    record = RunRecord.load(run / "run.json")
    assert (record.kind, record.metric) == ("token_classification", "entity_f1")
    assert sum(record.label_counts["test"]) == sum(
        len(json.loads(line)["tags"]) for line in DATA.read_text().splitlines()
    )
    assert "share wrong" in (run / "report.html").read_text()
    words = [len(json.loads(line)["tokens"]) for line in DATA.read_text().splitlines()]
    cut = f"note: {sum(count + 2 > 8 for count in words)} of the {len(words)} texts are longer than the 8 tokens"
    status, out, err = call(capsys, "eval", run, "--split", "test", "--cpu", "--json")
    assert cut in err, "with [CLS] and [SEP]"
    found = json.loads(out)
    assert {name: found[name] for name in record.test} == pytest.approx(record.test, rel=1e-5)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    status, out, err = call(capsys, "predict", run, DATA, "--cpu", "--json")
    assert cut in err
    again = json.loads(out)
    assert [row["predicted_tags"] for row in again] == [row["tags"] for row in rows]
    assert all(len(row["predicted_tags"]) == len(row["tokens"]) for row in again)
    assert again[0]["predicted_tags"][6:] == [None, None], "behind max_length, whose ends are [CLS] and [SEP]"
    status, out, _ = call(capsys, "predict", run, "--text", "a film", "--cpu", "--json")
    assert [len(row["tags"]) for row in json.loads(out)] == [2]


def test_what_cannot_be_trained_is_refused(bert, capsys, monkeypatch, tmp_path):
    data = ["train", "--model", bert, "--data", DATA, "--cpu", "-o", tmp_path / "run"]
    status, _, err = call(capsys, *data, "--method", "prompt")
    assert_refused(status, err, ["its head reads every token", "try prefix"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = call(capsys, *data)
    assert_refused(status, err, ["seqeval, which is not installed: pip install 'loretta-peft[seqeval]'"])
