"""What a run says of itself: each number against one that is computed from the data by hand."""

import csv
import json
import math

import numpy as np
import pytest
from scipy.stats import pearsonr
from training_data import config_for, sentences

from loretta.cli.following import last_step
from loretta.errors import InputError
from loretta.record import Answers, ParameterCounts, Point, RunRecord
from loretta.studies.configs import total_steps
from loretta.training.baseline import beats_baseline, chance_of
from loretta.training.data import load_config_task
from loretta.training.lines import last_lines, next_step, progress_line
from loretta.training.run import train


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("review", "mood"), *rows])
    return str(path)


def test_the_first_lines_say_what_is_trained_on_what(bert, tmp_path, capsys):
    rows = [*sentences(40), ("a film " + "very " * 30 + "good", "pos"), ("the plot", "Pos")]
    data, other = write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", [*sentences(10), ("a cast", "neg")])
    said: list[str] = []
    config = config_for(bert, data, tmp_path / "run", validation=other, epochs=1.5, accumulate=2)
    record = train(config, say=said.append)
    text = "\n".join(said)
    assert "in train 'pos' 21, 'neg' 20, 'Pos' 1" in text
    assert f"train 42 rows ('{data}'), validation 11 rows ('{other}'), no test" in text
    assert "'Pos' and 'pos' read alike" in text
    assert "1 of the 53 texts are longer than max_length=16 tokens" in text
    assert text.count("10 of the 11 validation rows have a text that is in train") == 1
    assert f"{record.parameters.trainable:,} of {record.parameters.total:,} parameters are trained" in text
    assert "learning rate 0.01" in text
    # 6 batches of 8 make 3 updates, one and a half epochs of which are 5
    assert total_steps(config.model_dump()) == max(point.step for point in record.history) == 5
    assert "5 steps (1.67 epochs of 3) of 16 rows each" in text
    assert max(point.step for point in record.history) == 5
    assert "step 3: validation loss" in text, "nobody watches a bar here"
    assert capsys.readouterr().out == ""


def test_the_answers_are_counted(bert, reviews, tmp_path):
    record = train(config_for(bert, reviews, tmp_path / "run", epochs=2))
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    labels = dict(sentences(96))
    assert all(labels[row["text"]] == row["gold"] for row in rows)
    by_hand = [
        [sum((row["gold"], row["label"]) == (g, x) for row in rows) for x in ("neg", "pos")] for g in ("neg", "pos")
    ]
    answers = record.answers
    assert answers.confusion == by_hand
    assert answers.rows == len(rows) == record.sizes["validation"]
    assert (by_hand[0][0] + by_hand[1][1]) / len(rows) == pytest.approx(record.validation["accuracy"])
    assert answers.baseline["accuracy"] == 0.5
    assert record.label_counts["validation"] == [sum(row["gold"] == name for row in rows) for name in ("neg", "pos")]
    wrong = sorted((row["probability"] for row in rows if row["label"] != row["gold"]), reverse=True)
    assert [mistake.size for mistake in answers.mistakes] == pytest.approx(wrong[:10])
    from loretta import report

    page = report.render([record])
    for words in ("Confusion matrix (validation)", "Classes"):
        assert words in page
    assert all(mistake.text in page for mistake in answers.mistakes)


def test_scores_stand_beside_the_mean_and_perplexity_beside_the_base_model(bert, llama, tmp_path):
    scores = [(text, (1.25 if label == "pos" else 0.25) + k / 100) for k, (text, label) in enumerate(sentences(40))]
    record = train(config_for(bert, write(tmp_path / "a.csv", scores), tmp_path / "r", epochs=1))
    rows = [json.loads(line) for line in (tmp_path / "r" / "predictions.jsonl").read_text().splitlines()]
    kept = {row["text"] for row in rows}
    mean = sum(score for text, score in scores if text not in kept) / (40 - len(rows))
    assert record.answers.baseline["mse"] == pytest.approx(sum((row["gold"] - mean) ** 2 for row in rows) / len(rows))
    assert record.answers.mistakes[0].size == pytest.approx(max(abs(r["gold"] - r["score"]) for r in rows))

    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _ in sentences(200)))
    options = {"text": None, "label": None, "epochs": 1, "learning_rate": 1e-12}
    record = train(config_for(llama, str(tmp_path / "text.txt"), tmp_path / "lm", **options))
    # nothing was moved, so the base model is what was trained
    assert record.answers.baseline["perplexity"] == pytest.approx(record.validation["perplexity"], rel=1e-4)


def test_an_encoder_is_not_trained_to_go_on_with_a_text(bert, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _ in sentences(40)))
    with pytest.raises(InputError, match=r"is an encoder.*give a decoder"):
        train(config_for(bert, str(tmp_path / "text.txt"), tmp_path / "run", text=None, label=None))
    assert not (tmp_path / "run").exists()


def record_of(*, confusion, losses=(0.7, 0.6), best=2, evaluations=2, **more) -> RunRecord:
    right = confusion[0][0] + confusion[1][1]
    total = sum(map(sum, confusion))
    history = [Point(step=k + 1, epoch=k + 1, split="train", values={"loss": x}) for k, x in enumerate(losses)]
    last = len(losses)
    steps = [last - k for k in range(evaluations)]
    history += [Point(step=k, epoch=k, split="validation", values={"accuracy": 0.5}) for k in steps]
    only = {0: "b", 1: "a"}.get(next((k for k in (0, 1) if not confusion[0][k] + confusion[1][k]), 2))
    answers = Answers(
        split="validation", rows=total, constant="'a'", baseline={"accuracy": sum(confusion[0]) / total},
        confusion=confusion, only=only,
    )  # fmt: skip
    return RunRecord(
        config={"model": "m", "data": "d.csv", "method": "rep", "learning_rate": 1e-3, "label": "my label"},
        command="", versions={},
        model="m", task="d.csv", method="rep", kind="classification", seed=0, device="cpu", sizes={},
        label_names=["a", "b"], label_counts={"train": [30, 20]}, answers=answers, metric="accuracy",
        higher_is_better=True, parameters=ParameterCounts(cores=1, biases=0, norms=0, head=0, other=0, total=9),
        adapter_bytes=1, train_seconds=1, peak_memory_bytes=1, history=history, best_step=best,
        validation={"accuracy": right / total}, test=None, **more,
    )  # fmt: skip


def test_the_advice_follows_from_the_numbers():
    majority = record_of(confusion=[[30, 0], [20, 0]])
    assert beats_baseline(majority) is False
    assert "every answer is the same: 'a'" in last_lines(majority)
    assert "raise the rate, --lr 0.0015" in next_step(majority)
    assert "lower the rate, --lr 0.00033" in next_step(record_of(confusion=[[30, 0], [20, 0]], losses=(0.7, 3.0)))
    assert "not finite" in next_step(record_of(confusion=[[30, 0], [20, 0]], losses=(0.7, math.nan)))
    # shared of rank 1 starts above its method's 7.5e-4
    of_rank = {"config": {"model": "m", "data": "d.csv", "method": "shared"}, "learning_rate": 1.5e-3}
    assert "raise the rate, --lr 0.0045" in next_step(majority.model_copy(update=of_rank))
    # 3 rows won, 1 lost: the probability of at least 3 heads of 4
    little = record_of(confusion=[[29, 1], [17, 3]])
    assert chance_of(little) == pytest.approx(5 / 16)
    assert "may be chance (p = 0.31" in next_step(little)
    correlated = little.model_copy(update={"metric": "spearman", "validation": {"spearman": 0.2}})
    x, rest = np.tile([1.0, -1.0], 25), np.repeat([1.0, -1.0, 0.0], [24, 24, 2])  # at right angles, of mean 0
    y = 0.2 * x / np.linalg.norm(x) + np.sqrt(1 - 0.2**2) * rest / np.linalg.norm(rest)
    assert chance_of(correlated) == pytest.approx(pearsonr(x, y, alternative="greater").pvalue)
    assert chance_of(little.model_copy(update={"metric": "entity_f1", "kind": "token_classification"})) is None
    good = [[29, 1], [1, 19]]
    assert "--epochs 6 may score higher" in next_step(record_of(confusion=good))
    assert "step 2 of 6 was the best" in next_step(record_of(confusion=good, losses=[0.5] * 6, evaluations=3))
    last = next_step(record_of(confusion=good, losses=[0.5] * 3, best=2))
    assert last.endswith("loretta compare --model m --data d.csv --label 'my label'")


@pytest.mark.parametrize(("losses", "fitted"), [((0.5, 0.4, 0.6), True), ((0.6, 0.5, 0.4), False)])
def test_a_score_that_stands_still_while_its_loss_falls_is_not_called_overfitting(losses, fitted):
    record = record_of(confusion=[[29, 1], [1, 19]], losses=[0.5] * 6)
    points = [
        Point(step=k, epoch=k, split="validation", values={"loss": x}) for k, x in zip((2, 4, 6), losses, strict=True)
    ]
    trained = [point for point in record.history if point.split == "train"]
    told = next_step(record.model_copy(update={"history": [*trained, *points]}))
    assert ("fitted the training rows alone" in told) == fitted


def test_a_line_of_progress_is_found_in_a_log(tmp_path):
    assert progress_line(10, 1200, 0.5, 3725) == "step 10 of 1,200, loss 0.5000, 1:02:05 left"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "s0.log").write_text(
        f"hello\n{progress_line(1, 9, None, 5)}\n{progress_line(2, 9, 1, 5)}\nmore\n"
    )
    assert last_step(tmp_path, "a/s0") == "step 2 of 9, loss 1.0000, 0:00:05 left"
    assert last_step(tmp_path, "a/s1") is None


def test_a_start_that_was_trained_on_what_is_held_out_now_is_named(bert, reviews, tmp_path):
    first = config_for(bert, reviews, tmp_path / "first", max_steps=1)
    train(first)
    trained = set(load_config_task(first).train["text"])
    other = write(tmp_path / "other.csv", [("another film", "pos"), ("another plot", "neg")])
    for changes, is_seen in (({}, False), ({"seed": 1}, True), ({"seed": 1, "validation": other}, False)):
        task = load_config_task(first.model_copy(update={"start_from": str(tmp_path / "first"), **changes}))
        assert bool(trained & set(task.validation["text"])) == is_seen
        assert any("from which the training starts, was trained on rows" in note for note in task.notes) == is_seen
