"""What is published: the pages say what the result files say, and each row of those says how it came about."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest

from loretta import LorettaSharedConfig
from loretta.training.methods import METHODS

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import board  # noqa: E402
import evidence  # noqa: E402
import methods  # noqa: E402
import protocol  # noqa: E402
import rates  # noqa: E402
import verdicts  # noqa: E402
from tables import filled  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    found = evidence.rows()
    assert found
    return found


def test_a_section_is_what_the_result_files_say(rows):
    for page, sections in evidence.pages(rows):
        text = page.read_text()
        old = [name for name, content in sections.items() if filled(text, name, content) != text]
        assert old == [], f"{page}: make tables"


MADE = re.compile(r"<!-- ([^:\n]+): make tables -->\n.*?<!-- end of \1 -->", re.DOTALL)


def differences(text):
    """Figures with an interval, each as its size and half its interval."""
    some = re.findall(r"(\d*\.\d+)\s*±\s*(\d*\.\d+)", text)
    return {(float(middle), float(half)) for middle, half in some}


@pytest.mark.parametrize("page", [evidence.PAGE, evidence.CHOOSING], ids=lambda page: page.name)
def test_a_difference_that_the_text_names_is_in_a_table(page):
    texts = [page.read_text() for page in (evidence.PAGE, evidence.CHOOSING)]
    tables = {figure for text in texts for table in MADE.finditer(text) for figure in differences(table[0])}
    named = differences(MADE.sub("", page.read_text()))
    assert named
    assert not named - tables


def test_a_row_says_how_it_came_about(rows):
    for row in rows:
        cell, counts = protocol.cell_of(row), row["rows"]
        assert {"torch", "transformers", "peft"} <= row["versions"].keys(), cell
        assert row["command"].startswith("python benchmarks/"), cell
        assert row["device"], cell
        assert row["trained"] >= 0 < counts["held_out"], cell
        if protocol.TASKS[row["task"]].kind == "glue":
            assert counts["held_out"] == round(protocol.HELD_OUT * (counts["train"] + counts["held_out"])), cell
        for scores in (row["held_out"], row["official"]):
            assert {len(of_seeds) for of_seeds in scores.values()} == {len(row["seeds"])}, cell
            assert sorted(map(float, scores)) == sorted(row["rates"]), cell


@pytest.mark.parametrize("name", ["adaptive", "answers", "forgetting", "instruct"])
def test_each_run_is_there_once_and_says_how_it_came_about(name):
    some = json.loads((evidence.RESULTS / f"{name}.json").read_text())
    assert len({protocol.cell_of(row) for row in some}) == len(some) > 5
    for row in some:
        assert {"torch", "transformers", "peft"} <= row["versions"].keys()
        assert row["device"] == "NVIDIA H200"
        assert row["command"].startswith("python benchmarks/")
        assert row["trained"] > 0 or row["method"] == methods.UNTRAINED


STARTS = {
    "rep": "rep", "adp": "adp + norms", "shared": "shared r=4 + norms", "compact": "compact + norms",
    "lora": "LoRA r=8", "norms": "norms", "shared of rank 1": "shared r=1",
}  # fmt: skip


@pytest.mark.parametrize(("name", "method"), STARTS.items())
def test_a_method_starts_at_the_rate_that_held_out_rows_of_both_encoders_liked_best(name, method, rows):
    boards, means = [board.Board(rows, model, "held_out") for model in list(verdicts.MODELS)[:2]], {}
    for rate in rates.ONE_RATES:
        of_models = [rates.at_rate([one.cells[method, task] for task in one.common], rate) for one in boards]
        if all(scores is not None for scores in of_models):
            means[float(rate)] = sum(scores.mean() for scores in of_models)
    rank_1 = LorettaSharedConfig(tensor_rank=1)
    own = METHODS["shared"].rate_of(rank_1) if name == "shared of rank 1" else METHODS[name].learning_rate
    assert own == max(means, key=means.__getitem__), means


@pytest.mark.parametrize(
    ("method", "rate"),
    [("LoRA r=8", 7.5e-4), ("shared r=1", 1.5e-3), *((f"shared r={rank}", 7.5e-4) for rank in (2, 4, 8))],
)
def test_on_a_decoder_twice_the_rate_is_better_in_the_mean_and_no_seed_fails(method, rate, rows):
    of_decoder = [row for row in rows if row["model"] == list(verdicts.MODELS)[2] and row["method"] == method]
    cells = [row for row in of_decoder if row.get("part", "front") == "front"]
    gains = []
    for row in cells:
        own, twice = row["held_out"].get(str(rate)), row["held_out"].get(str(2 * rate))
        if own is not None:
            worth = [np.exp(np.negative(x)) if row["metric"] == "loss" else np.array(x) for x in (own, twice)]
            gains.append(float((worth[1] - worth[0]).mean()))
            assert min(worth[1]) > np.median(worth[1]) - 0.15
    assert len(gains) >= 2
    assert np.mean(gains) > 0, gains


def test_the_picture_is_there():
    assert evidence.PICTURE.read_text().count("<svg") == 1
