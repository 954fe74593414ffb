"""Several labels a text: the loss, the constant answer to beat, and a run from its command to its answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call
from sklearn.metrics import f1_score
from tolerances import assert_near

from loretta.record import RunRecord
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.model import load_base, load_tokenizer, wrap

DATA = Path(__file__).parents[3] / "docs" / "data" / "topics.jsonl"
NAMES = ["boats", "prices", "weather"]


@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_the_loss_is_binary_and_a_row_counts_the_same_in_every_batch(method, bert, tmp_path):
    config = RunConfig(model=bert, data=str(DATA), label="labels", method=method, cpu=True, output=str(tmp_path))
    task, tokenizer = load_config_task(config), load_tokenizer(bert)
    model = wrap(load_base(bert, task.kind, label_names=task.label_names), method, task.kind, {}).double().eval()
    trainer = make_trainer(encode_splits(config, task, tokenizer), model, tmp_path)
    expected = []
    for text, labels in zip(task.train["text"], task.train["label"], strict=True):
        p = model(**tokenizer(text, return_tensors="pt")).logits[0].sigmoid()
        expected += [-(p_k if there else 1 - p_k).log() for p_k, there in zip(p, labels, strict=True)]
    rows = list(trainer.train_dataset)
    parts = [trainer.data_collator(rows[:3]), trainer.data_collator(rows[3:])]
    parts = [{**part, "labels": part["labels"].double()} for part in parts]
    count = torch.tensor(3 * len(rows))
    got = sum(trainer.compute_loss(model, dict(part), num_items_in_batch=count) for part in parts)
    assert_near("loss", got, torch.stack(expected).mean())


def test_a_run_from_its_command_to_its_answers(bert, capsys, tmp_path):
    run = tmp_path / "run"
    status, out, err = call(
        capsys, "train", "--model", bert, "--data", DATA, "--label", "labels", "--test", DATA, "--cpu", "--epochs", 2,
        "--lr", "1e-2", "--max-length", 16, "-o", run,
    )  # fmt: skip
    assert status == 0, err
    assert "topics.jsonl: multi label of column 'text' by column 'labels'; in train 'boats' 4" in out
    record = RunRecord.load(run / "run.json")
    assert (record.kind, record.metric, record.label_names) == ("multi_label", "micro_f1", NAMES)
    assert record.label_counts["test"] == [5, 4, 4]
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert [row["gold"] for row in rows] == [row["labels"] for row in given]
    gold, said = (np.array([[name in row[key] for name in NAMES] for row in rows]) for key in ("gold", "labels"))
    for average in ("micro", "macro"):
        expected = f1_score(gold, said, average=average, zero_division=0)
        assert record.test[f"{average}_f1"] == pytest.approx(expected)
    assert record.test["accuracy"] == pytest.approx((gold == said).all(1).mean())
    # no answer without a text scores better on train than the one that is compared with
    words = record.answers.constant
    named = np.array([[repr(name) in words for name in NAMES]] * len(rows))
    assert record.answers.baseline["micro_f1"] == pytest.approx(f1_score(gold, named, average="micro"))
    status, out, _ = call(capsys, "eval", run, "--split", "test", "--cpu", "--json")
    found = json.loads(out)
    assert {name: found[name] for name in ("micro_f1", "accuracy")} == pytest.approx(
        {name: record.test[name] for name in ("micro_f1", "accuracy")}
    )
    status, out, _ = call(capsys, "predict", run, DATA, "--cpu", "--json", "--probabilities")
    again = json.loads(out)
    assert [row["predicted_labels"] for row in again] == [row["labels"] for row in rows]
    assert all((row["probability_boats"] > 0.5) == ("boats" in row["predicted_labels"]) for row in again)
