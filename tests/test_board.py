"""Comparisons of methods: on which seeds, over which tasks, and what a difference is called."""

import math
import pathlib
import sys

import numpy as np
import pytest
from scipy.stats import sem
from scipy.stats import t as student

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import board  # noqa: E402
import evidence  # noqa: E402
import predictions  # noqa: E402
import protocol  # noqa: E402
import rates  # noqa: E402
import verdicts  # noqa: E402


def row_of(method, family, trained, scores, task="cola", norms=False):
    """A row with one rate, at which the held-out and the official scores are the same."""
    by_rate = {"0.001": scores}
    return {
        "model": "all-MiniLM-L6-v2", "task": task, "method": method, "family": family, "norms": norms, "metric": "mcc",
        "trained": trained, "head": 10, "held_out": by_rate, "official": by_rate, "seeds": [0, 1, 2],
    }  # fmt: skip


BOARD = [
    row_of("LoRA r=1", "LoRA", 1_000, [0.1, 0.2, 0.3]),
    row_of("LoRA r=2", "LoRA", 4_000, [0.3, 0.4, 0.5]),
    row_of("compact", "LoRETTA", 2_000, [0.05, 0.16, 0.24]),
    row_of("compact", "LoRETTA", 2_000, [0.0, 0.0, 0.0], task="mrpc"),
    row_of("LoRA r=1", "LoRA", 1_000, [0.2, 0.2, 0.2], task="mrpc"),
]


def test_scores_between_two_counts_are_straight_in_the_logarithm_of_the_count():
    cola = board.Board([row for row in BOARD if row["task"] == "cola"], "all-MiniLM-L6-v2", "held_out")
    assert cola.by_count(2_000, ["LoRA r=1", "LoRA r=2"]).tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert cola.by_count(8_000, ["LoRA r=1", "LoRA r=2"]) is None
    assert cola.by_count(4_050, ["LoRA r=1", "LoRA r=2"]).tolist() == [0.3, 0.4, 0.5]  # as good as the same count


def test_a_mean_is_of_the_same_tasks_for_all():
    both = board.Board(BOARD, "all-MiniLM-L6-v2", "held_out")
    assert both.common == ["cola", "mrpc"]
    assert {method: scores.tolist() for method, scores in both.complete().items()} == {
        "LoRA r=1": pytest.approx([0.15, 0.2, 0.25]),
        "compact": pytest.approx([0.025, 0.08, 0.12]),
    }


@pytest.mark.parametrize(
    "change", [{"epochs": 5}, {"length": 64}, {"rows": {"train": 1}}], ids=["epochs", "length", "rows"]
)
def test_rows_that_were_not_trained_alike_are_not_put_side_by_side(change):
    some = [{**row, "epochs": 3, "length": 24, "rows": {"train": 2}} for row in BOARD]
    assert protocol.alike(some) == some
    with pytest.raises(ValueError, match=f"{next(iter(change))} on mrpc of all-MiniLM-L6-v2: .* compact, .* LoRA r=1"):
        protocol.alike([some[4], {**some[3], **change}])
    protocol.alike([some[4], {**some[3], **change, "part": "long"}])  # another part is compared with its own


def test_methods_are_compared_on_the_seeds_that_all_of_them_have_each_with_itself():
    """One row has more seeds, in another order; the other task has one seed less."""
    long = {**row_of("norms", "base", 500, [0.9, 0.2, 0.7, 0.1, 0.3]), "seeds": [4, 1, 3, 0, 2]}
    short = [{**row, "seeds": [1, 2]} for row in BOARD if row["task"] == "mrpc"]
    short = [{**row, **{key: {"0.001": [0.4, 0.6]} for key in ("held_out", "official")}} for row in short]
    cola = protocol.same_seeds([BOARD[0], BOARD[2], long])
    assert (cola[-1]["seeds"], cola[-1]["held_out"]) == ([1, 0, 2], {"0.001": [0.2, 0.1, 0.3]})
    made = board.Board([BOARD[0], BOARD[2], long, *short], "all-MiniLM-L6-v2", "held_out")
    assert (made.seeds(["norms"]), made.seeds()) == ("5", "2 to 5")
    assert dict(made.gap_on("cola", "norms", "LoRA r=1").round(12)) == {0: 0, 1: 0, 2: 0}
    assert dict(made.complete()["LoRA r=1"]) == pytest.approx({1: 0.3, 2: 0.45})
    assert dict(made.gap("compact", "LoRA r=1").round(12)) == {1: -0.02, 2: -0.03}
    assert made.gap("norms", "LoRA r=1") is None  # norms were not run on mrpc
    assert rates.one_rate_table([{**row, "held_out": {"0.0015": row["held_out"]["0.001"]}} for row in [*cola, *short]])
    with pytest.raises(ValueError, match="all-MiniLM-L6-v2, cola have no seed in common"):
        protocol.same_seeds([long, {**long, "seeds": [5, 6, 7, 8, 9]}])


def test_the_best_within_a_size_is_chosen_on_the_seeds_that_all_who_fit_have():
    """By the third seed, which "rep" lacks, "compact" would be the best; what is too large or diverged is none."""
    rows = [
        row_of("compact", "LoRETTA", 2_000, [0.1, 0.2, 0.9]),
        {**row_of("rep", "LoRETTA", 2_000, [0.2, 0.3]), "seeds": [0, 1]},
        row_of("adp", "LoRETTA", 2_000, [None, 0.9, 0.9]),
        row_of("LoRA r=1", "LoRA", 1_000, [0.0, 0.1, 0.3]),
        {**row_of("LoRA r=8", "LoRA", 9_000, [0.7]), "seeds": [0]},
    ]
    made = board.Board(rows, "all-MiniLM-L6-v2", "held_out")
    assert made.best_within(2_000) == ("rep", "LoRA r=1")
    assert dict(made.gap("compact", "LoRA r=1").round(12)) == {0: 0.1, 1: 0.1, 2: 0.6}
    assert made.best_within(9_000) == ("rep", "LoRA r=8")
    assert made.best_within(500) == (None, None)


@pytest.mark.parametrize(
    ("differences", "word"),
    [([0.1, 0.11, 0.12], "better"), ([-0.1, -0.11, -0.12], "worse"), ([0.1, -0.1, 0.05], "level"), ([0.1], "level")],
)
def test_a_difference_counts_where_its_interval_leaves_zero_out(differences, word):
    assert board.verdict(differences) == word


@pytest.mark.parametrize(
    ("differences", "expected", "word"),
    [
        ([0.001, -0.001, 0.002], "level", "held"), ([0.1, -0.1, 0.0], "level", "open"),
        ([0.1, 0.11, 0.12], "level", "refuted"), ([0.1, 0.11, 0.12], "worse", "refuted"),
        ([-0.1, -0.11, -0.12], "worse", "held"), ([0.1, -0.1, 0.0], "better", "open"),
        ([0.001, -0.001, 0.002], "within .01", "held"), ([0.1, 0.11, 0.12], "within .01", "refuted"),
        ([-0.1, -0.11, -0.12], "within .01", "refuted"), ([0.1, -0.1, 0.0], "within .01", "open"),
        ([-0.1, -0.11, -0.12], "not above .01", "held"), ([0.1, 0.11, 0.12], "not above .01", "refuted"),
    ],
)  # fmt: skip
def test_a_prediction_holds_is_refuted_or_stays_open(differences, expected, word):
    assert predictions.judged(differences, expected) == word


def test_the_rule_for_the_default_asks_for_every_model_and_one_sure_difference():
    def rows(model, gaps):
        both = (("compact + norms", [0.5, 0.5, 0.5]), ("shared r=4 + norms", [0.5 + gap for gap in gaps]))
        return [{**row_of(name, "LoRETTA", 900, scores), "model": model} for name, scores in both]

    sure, unsure, lower = [0.02, 0.021, 0.022], [0.1, -0.05, 0.01], [-0.1, 0.05, 0.01]
    said = [
        verdicts.default_rule(rows("all-MiniLM-L6-v2", sure) + rows("all-mpnet-base-v2", more))
        for more in (unsure, lower)
    ]
    assert ["takes the place" in said[0], "compact stays" in said[1]] == [True, True]
    assert "compact stays" in verdicts.default_rule(rows("all-MiniLM-L6-v2", unsure))


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.001, -0.001, 0.002], "confirmed ("), ([-0.01, -0.011, -0.012], "confirmed, but below ("),
        ([-0.1, -0.11, -0.12], "refuted ("), ([0.1, -0.1, 0.0], "open ("),
    ],
)  # fmt: skip
def test_what_is_as_good_within_the_margin_and_surely_below_is_said_to_be_below(differences, word):
    assert verdicts.said(differences, verdicts.MARGIN, strictly=False).startswith(word)


def test_a_section_that_loretta_loses_says_so_first():
    assert verdicts.verdict_sentence("all-MiniLM-L6-v2", "cola", BOARD).startswith(
        "LoRETTA loses here: compact (2,000)"
    )
    lower = [{**row, "task": "stories", "metric": "loss"} for row in BOARD if row["task"] == "cola"]
    assert verdicts.verdict_sentence("all-MiniLM-L6-v2", "stories", lower).startswith("LoRETTA wins here")


def test_a_task_that_no_method_learns_says_so():
    rows = [{**row, "task": "rte", "metric": "accuracy"} for row in BOARD if row["task"] == "cola"]
    assert "No method is above the constant answer" in verdicts.verdict_sentence("all-MiniLM-L6-v2", "rte", rows)
    better = [row_of("LoRA r=8", "LoRA", 9_000, [0.6, 0.61, 0.62], task="rte")]
    assert "constant" not in verdicts.verdict_sentence("all-MiniLM-L6-v2", "rte", rows + better)


def test_a_lower_loss_is_the_better_one_and_counts_as_a_probability_in_a_mean():
    losses = [{**row, "task": "stories", "metric": "loss"} for row in BOARD if row["task"] == "cola"]
    texts = board.Board(losses, "all-MiniLM-L6-v2", "held_out", ["stories"])
    assert texts.complete()["compact"].tolist() == pytest.approx([math.exp(-x) for x in (0.05, 0.16, 0.24)])
    assert texts.best_within(5_000) == ("compact", "LoRA r=1")
    table = evidence.size_table("all-MiniLM-L6-v2", losses, "held_out", "stories")
    line = " ".join(next(line for line in table.splitlines() if line.startswith("| 5,000")).split())
    # .05, .04 and .06 less
    half = student.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert f"compact (2,000) | 0.150 ± {interval_half([0.05, 0.16, 0.24]):.3f} " in line
    assert f"+0.050 ± {half:.3f} | better" in line


def interval_half(values):
    low, high = student.interval(0.95, len(values) - 1, loc=np.mean(values), scale=sem(values))
    return (high - low) / 2
