import math

import numpy as np
import pytest

from loretta.tasks.metrics import compute, higher_is_better

# 3 true positives, 1 false positive, 2 false negatives, 2 true negatives
PREDICTED = [1, 1, 1, 1, 0, 0, 0, 0]
EXPECTED = [1, 1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 5 / 8),
        ("f1", 2 * 3 / (2 * 3 + 1 + 2)),
        ("macro_f1", (6 / 9 + 4 / 7) / 2),
        ("mcc", (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)),
    ],
)
def test_two_classes_by_hand(name, value):
    assert compute([name], PREDICTED, EXPECTED) == {name: pytest.approx(value, rel=1e-12)}


def test_f1_counts_class_1_as_the_positive_one():
    assert compute(["f1"], [1, 0, 0], [1, 1, 0])["f1"] == pytest.approx(2 / 3)
    assert compute(["f1"], [0, 1, 1], [0, 0, 1])["f1"] == pytest.approx(2 / 3)
    assert compute(["f1"], [0, 0, 0, 1], [0, 0, 0, 0])["f1"] == 0.0  # class 0's would be 6/7


def test_three_classes_by_hand():
    predicted, expected = [0, 0, 1, 2], [0, 1, 1, 1]
    # class 0: 2/3, class 1: 2/4, class 2 is predicted once and never right
    assert compute(["macro_f1"], predicted, expected)["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # deviations from the means: (-1.5, -.5, .5, 1.5) and (-2.5, -1.5, -.5, 4.5)
        ("pearson", (3.75 + 0.75 - 0.25 + 6.75) / math.sqrt(5 * 29)),
        ("spearman", 1.0),
        ("mse", (0 + 0 + 0 + 16) / 4),
    ],
)
def test_scores_by_hand(name, value):
    assert compute([name], [1, 2, 3, 4], [1, 2, 3, 8])[name] == pytest.approx(value, rel=1e-12)


def test_spearman_with_one_pair_swapped():
    # 1 - 6 * (1 + 1) / (4 * (16 - 1))
    assert compute(["spearman"], [10, 30, 20, 40], [1, 2, 3, 4])["spearman"] == pytest.approx(1 - 12 / 60)


def test_names_come_back_in_the_order_asked_as_plain_floats():
    scores = compute(("f1", "accuracy"), np.array(PREDICTED), np.array(EXPECTED))
    assert list(scores) == ["f1", "accuracy"]
    assert {type(score) for score in scores.values()} == {float}


@pytest.mark.parametrize("name", ["mcc", "spearman", "pearson"])
@pytest.mark.parametrize(
    ("predicted", "expected"), [([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([1, 1, 1], [1, 1, 1]), ([1], [1])]
)
def test_a_constant_side_scores_zero_without_a_warning(name, predicted, expected):
    assert compute([name], predicted, expected) == {name: 0.0}


def test_nothing_positive_scores_zero_f1_without_a_warning():
    assert compute(["f1", "macro_f1"], [0, 0], [0, 0]) == {"f1": 0.0, "macro_f1": 1.0}


def test_nearly_constant_scores_do_not_warn():
    nearly = [1.0, 1.0 + 2e-16, 1.0]
    assert -1 <= compute(["pearson"], nearly, [1.0, 2.0, 3.0])["pearson"] <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_scores_nan(bad):
    scores = compute(["spearman", "pearson", "mse"], [1.0, bad, 2.0], [1.0, 2.0, 3.0])
    assert all(math.isnan(score) for score in scores.values())


def test_half_precision_scores_do_not_overflow():
    assert compute(["mse"], np.array([300, 0], np.float16), np.array([0, 0], np.float16)) == {"mse": 45_000.0}


def test_all_metrics_but_errors_are_better_when_higher():
    ups = [name for name in ("accuracy", "f1", "macro_f1", "mcc", "spearman", "pearson") if higher_is_better(name)]
    assert len(ups) == 6
    assert not higher_is_better("mse")
    assert not higher_is_better("perplexity")


@pytest.mark.parametrize(
    ("names", "predicted", "expected", "pieces"),
    [
        (["acuracy"], [0], [0], ["'acuracy'", "did you mean 'accuracy'?", "'spearman'"]),
        (["perplexity"], [0], [0], ["'perplexity'", "loss"]),
        (["accuracy"], [0, 1], [0], ["(2,)", "(1,)"]),
        (["accuracy"], [], [], ["at least one row"]),
        (["f1"], [0, 2], [0, 1], ["class 2", "'macro_f1'"]),
    ],
)
def test_predictions_that_cannot_be_scored_are_refused(refused, names, predicted, expected, pieces):
    refused(lambda: compute(names, predicted, expected), *pieces)


def test_direction_of_an_unknown_metric_is_refused(refused):
    refused(lambda: higher_is_better("bleu"), "'bleu'")
