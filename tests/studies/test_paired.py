"""Differences on the same rows, and what a comparison then advises."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score
from study_data import finish

from loretta.record import Answers, RunRecord
from loretta.report.study import section_of
from loretta.studies import paired
from loretta.studies.compare import comparison, verdict
from loretta.studies.configs import Options
from loretta.studies.expansion import expand
from loretta.studies.paired import differences
from loretta.studies.results import collect
from loretta.studies.runner import write_study

GOLD = ["a", "b"] * 20


def answers(right: int) -> list[str]:
    """Right on the first ``right`` rows."""
    return [gold if k < right else "ab"[gold == "a"] for k, gold in enumerate(GOLD)]


def compared(root, given, *, metric="accuracy", baseline=0.5, parameters=None, model="bert-base"):
    """Results of methods -> the answers of each seed to GOLD, of which the score follows."""
    study = comparison("reviews.csv", list(given), seeds=3, settings={"label": "mood", "max_steps": 9})
    options = Options(models=(model,), seeds=3)
    runs = expand(study, options, root).runs
    write_study(root, study, options, runs, "")
    for run in runs:
        found = given[run.row][run.seed]
        score = f1_score(GOLD, found, pos_label="a") if metric == "f1" else np.mean(np.array(GOLD) == found)
        alone = Answers(split="validation", rows=len(GOLD), constant="'a'", baseline={metric: baseline})
        more = {
            "label_names": ["b", "a"],
            "metric": metric,
            "parameters": (parameters or {}).get(run.row, 100),
            "answers": alone,
        }
        finish(root, run, validation={metric: float(score)}, **more)
        rows = [{"text": f"text {k}", "gold": g, "label": x} for k, (g, x) in enumerate(zip(GOLD, found, strict=True))]
        (root / run.folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return collect(root)


def test_the_interval_is_of_the_same_rows_and_stays_in_the_range(tmp_path):
    results = compared(
        tmp_path, {"lora": [answers(40), answers(40), answers(40)], "ia3": [answers(k) for k in (0, 2, 4)]}
    )
    (pair,) = differences(results, tmp_path)
    assert (pair.best, pair.other, pair.seeds, pair.better, pair.rows) == ("lora", "ia3", 3, 3, 40)
    assert pair.mean == pytest.approx(1 - 2 / 40)
    # Student's interval over these three seeds alone reaches beyond 1
    assert 0.85 < pair.low < pair.mean < pair.high <= 1
    assert pair.clear
    found = verdict(results, [pair])
    assert (found.best, found.smallest, found.learned) == ("lora", "lora", True)
    assert "take lora: on 40 rows and 3 seeds every other method is clearly worse" in found.words


def test_the_width_is_that_of_the_binomial_where_seeds_agree(tmp_path):
    # 10 of 40 rows differ, in one direction: the standard error of the mean is sqrt(0.25 * 0.75 / 40) = 0.0685
    results = compared(tmp_path, {"lora": [answers(40)] * 3, "ia3": [answers(30)] * 3})
    (pair,) = differences(results, tmp_path)
    assert pair.mean == pytest.approx(0.25)
    assert pair.high - pair.low == pytest.approx(2 * 1.96 * 0.0685, rel=0.1)


def test_a_metric_of_all_rows_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(paired.RESAMPLES, False, 60)  # each takes six scores of scikit-learn's
    # of the class "b" wrong once more than of "a", which the record names the second and so the positive one
    given = {"lora": [answers(k) for k in (35, 37, 33)], "ia3": [answers(k) for k in (21, 23, 19)]}
    results = compared(tmp_path, given, metric="f1")
    (pair,) = differences(results, tmp_path)
    by_hand = [
        f1_score(GOLD, a, pos_label="a") - f1_score(GOLD, b, pos_label="a")
        for a, b in zip(given["lora"], given["ia3"], strict=True)
    ]
    assert pair.mean == pytest.approx(np.mean(by_hand))
    assert -1 <= pair.low < pair.mean < pair.high <= 1


def test_the_smallest_that_may_be_as_good_is_advised(tmp_path):
    given = {"lora": [answers(k) for k in (36, 38, 34)], "ia3": [answers(k) for k in (35, 37, 35)]}
    results = compared(tmp_path, given, parameters={"lora": 1000, "ia3": 50})
    pairs = differences(results, tmp_path)
    assert not pairs[0].clear
    found = verdict(results, pairs)
    assert (found.best, found.smallest) == ("lora", "ia3")
    assert "Advice: take ia3 (50 trained parameters): its distance to lora, +0.0083" in found.words
    assert section_of(results, tmp_path).verdict == found.words  # and so does the report


def test_nothing_learned_is_said_before_anything_else(tmp_path):
    results = compared(tmp_path, {"lora": [["a"] * 40] * 3, "ia3": [["b"] * 40] * 3})
    found = verdict(results, differences(results, tmp_path))
    assert (found.best, found.smallest, found.learned) == (None, None, False)
    assert found.words.startswith("Nothing was learned: the methods score accuracy 0.5000")
    assert "give more --max-steps, a higher --lr" in found.words, "these runs were given steps"
    without = [run.model_copy(update={"config": run.config | {"max_steps": None}}) for run in results.planned]
    longer = verdict(results.model_copy(update={"planned": tuple(without)})).words
    assert "give more --epochs, a higher --lr" in longer


def test_a_lucky_run_is_no_learning(tmp_path):
    """One run of three above the constant answer, and a mean above it that chance explains."""
    given = {"lora": [answers(k) for k in (21, 20, 19)], "ia3": [answers(k) for k in (22, 21, 20)]}
    results = compared(tmp_path, given)
    assert verdict(results).best == "ia3"  # nobody knows which answers were right: no confusion in the records
    for file in tmp_path.rglob("run.json"):
        record = RunRecord.load(file)
        right = round(40 * record.validation["accuracy"])
        matrix = [[10, 10], [30 - right, right - 10]]
        known = {"answers": record.answers.model_copy(update={"confusion": matrix}), "label_counts": {"train": [2, 1]}}
        file.write_text(record.model_copy(update=known).model_dump_json())
    found = verdict(collect(tmp_path))
    assert (found.best, found.learned) == (None, False)
    assert found.words.startswith("Nothing was learned beyond chance: the methods score accuracy 0.4750 to 0.5500")


def test_a_comparison_on_another_model_leaves_the_first_one_out(tmp_path):
    compared(tmp_path, {"lora": [answers(40)] * 3, "ia3": [answers(30)] * 3})
    results = compared(tmp_path, {"lora": [answers(36)] * 3}, model="roberta-base")
    assert [(cell.model, cell.row) for cell in results.final()] == [("roberta-base", "lora")]


def test_a_method_that_learned_nothing_is_named(tmp_path):
    results = compared(tmp_path, {"lora": [answers(40)] * 3, "ia3": [["a"] * 40] * 3})
    assert "Nothing was learned by ia3" in verdict(results, differences(results, tmp_path)).words


def test_other_rows_are_not_paired(tmp_path):
    results = compared(tmp_path, {"lora": [answers(40)] * 3, "ia3": [answers(30)] * 3})
    for file in tmp_path.rglob("ia3/*/predictions.jsonl"):
        file.write_text("\n".join(reversed(file.read_text().splitlines())))
    assert differences(results, tmp_path) == []


def test_runs_with_other_options_are_not_compared(tmp_path, capsys):
    """Those of an earlier command with fewer steps would stand in the same table."""

    def note(method: str, **sets) -> list[str]:
        study = comparison("reviews.csv", [method], seeds=1, settings={"label": "mood"})
        options = Options(models=("bert-base",), seeds=1, sets=sets)
        write_study(tmp_path, study, options, expand(study, options, tmp_path).runs, method)
        return [run["row"] for run in json.loads((tmp_path / "study.json").read_text())["planned"]]

    assert note("lora", max_steps=9) == ["lora"]
    assert note("ia3", **{"max_steps": 9, "ia3.feedforward_modules": []}) == ["lora", "ia3"]
    assert capsys.readouterr().err == ""
    assert note("norms", max_steps=90) == ["norms"]
    assert (
        "note: lora, ia3 of earlier commands had other options (max_steps was 9 and is 90)" in capsys.readouterr().err
    )
