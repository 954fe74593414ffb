"""Scores worked out by hand."""

import dataclasses

import pytest

from loretta.tasks.prompted import PROMPTED, Example, PromptedTask
from loretta.tasks.prompted.answers import drop_scores, score_drop, score_squad


def task(name) -> PromptedTask:
    spec = PROMPTED[name]
    return PromptedTask(
        name=name,
        kind=spec.kind,
        train_as=spec.train_as,
        metrics=spec.metrics,
        label_names=spec.label_names,
        train=(),
        validation=(),
        test=(),
        scorer=spec.score,
    )


def choices(*labels):
    return [Example(prompt="", options=("a", "b", "c"), correct=(label,)) for label in labels]


def test_accuracy_and_macro_f1_of_cb():
    # class 0: 1 of 1 predicted is right, 1 of 2 found: F1 2/3; class 1: 1 of 2, 1 of 1: 2/3; class 2: 1 and 1
    scores = task("cb").score([0, 1, 1, 2], choices(0, 0, 1, 2))
    assert scores == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_accuracy_and_f1_of_wsc():
    # positive is "Yes", option 1: 1 right of 2 predicted, 1 of 3 found: F1 2*1/(2+3)
    assert task("wsc").score([1, 1, 0, 0], choices(1, 0, 1, 1)) == {"accuracy": 0.25, "f1": pytest.approx(2 / 5)}


@pytest.mark.parametrize("name", ["boolq", "copa", "sst2", "rte"])
def test_accuracy_is_the_share_of_right_choices(name):
    assert task(name).score([1, 1, 0], choices(1, 0, 0)) == {"accuracy": pytest.approx(2 / 3)}


def test_record_scores_the_text_of_the_chosen_entity():
    example = Example(
        prompt="",
        options=(" x",) * 4,
        correct=(1,),
        answers=("Benazir Bhutto",),
        entities=("Bhutto", "Benazir Bhutto", "the Benazir Bhutto", "CNN"),
    )
    # "Bhutto": precision 1, recall 1/2: F1 2/3; the article does not count; "CNN" has no word in common
    f1s, exacts = zip(*(task("record").score([at], [example]).values() for at in range(4)), strict=True)
    assert f1s == (pytest.approx(2 / 3), 1.0, 1.0, 0.0)
    assert exacts == (0.0, 1.0, 1.0, 0.0)


def test_record_takes_the_nearest_of_several_answers():
    example = Example(
        prompt="",
        options=(" x",) * 2,
        correct=(0,),
        answers=("Bhutto-Zardari", "Benazir Bhutto"),
        entities=("Bhutto-Zardari", "Bhutto"),
    )
    # SQuAD's rules drop the hyphen and join the words: nothing in common with the first answer
    assert task("record").score([1, 0], [example] * 2) == {"f1": pytest.approx((2 / 3 + 1) / 2), "exact_match": 0.5}


@pytest.mark.parametrize(
    ("prediction", "golds", "f1", "exact"),
    [
        ("The Eiffel Tower!", ("eiffel tower",), 1, 1),
        ("Eiffel", ("Eiffel Tower",), 2 / 3, 0),  # precision 1, recall 1/2
        ("in the big tower", ("Eiffel Tower",), 2 / 5, 0),  # 1 word in common of 3 and of 2
        ("tower tower", ("tower",), 2 / 3, 0),  # a word counts as often as it occurs: precision 1/2
        ("Rome", ("Paris", "in Rome"), 2 / 3, 0),  # the better answer counts
        ("", ("Rome",), 0, 0),
        ("1,000", ("1000",), 1, 1),  # punctuation goes, even inside numbers
    ],
)
def test_squad_scores_the_nearest_gold_answer_by_hand(prediction, golds, f1, exact):
    example = Example(prompt="", answers=golds)
    assert score_squad([prediction], [example]) == {"f1": pytest.approx(f1), "exact_match": exact}


def test_squad_means_over_examples():
    examples = [Example(prompt="", answers=(gold,)) for gold in ("a red fox", "a hen", "two cats")]
    # 1, 0 and 2/3
    assert task("squad").score(["red fox", "cow", "cats"], examples) == {
        "f1": pytest.approx((1 + 0 + 2 / 3) / 3),
        "exact_match": pytest.approx(1 / 3),
    }


def test_generated_text_counts_up_to_the_line_end():
    example = Example(prompt="", answers=("Rome",), spans=(("Rome",),))
    for name in ("squad", "drop"):
        assert task(name).score(["\n Rome \nQuestion: Who?"], [example]) == {"f1": 1.0, "exact_match": 1.0}


@pytest.mark.parametrize(
    ("predicted", "gold", "f1", "exact"),
    [
        # numbers by value
        (["3"], ["3.0"], 1, 1),
        (["1,000 yards"], ["1000"], 0.67, 0),  # 1 of 2 words, 1 of 1: 2/3, rounded
        (["$5"], ["5"], 1, 1),
        (["three"], ["3"], 0, 0),  # words are not numbers
        # a gold number that is not there: 0, whatever else agrees
        (["4 yards"], ["3 yards"], 0, 0),
        (["3 or 4 yards"], ["3 yards"], 0.67, 0),  # {3 or 4 yards}, {3 yards}: precision 2/4, recall 1
        (["3 yards"], ["yards"], 0.67, 0),  # no gold number, so a predicted one does not harm: 1/2 and 1
        # hyphens part words, articles and punctuation go
        (["65 yard"], ["65-yard"], 1, 1),
        (["The Dr."], ["dr"], 1, 1),
        (["New York City"], ["York"], 0.5, 0),  # precision 1/3, recall 1
        (["York York"], ["York"], 1, 0),  # a bag is a set of words, but the texts differ
        # dates are bags of words
        (["May 1, 1990"], ["1 May 1990"], 1, 0),
        (["May 1990"], ["1 May 1990"], 0.8, 0),  # 1990 agrees; precision 1, recall 2/3
        (["May 1991"], ["2 May 1990"], 0, 0),
        # several spans, in any order
        (["Lee", "Ray"], ["Ray", "Lee"], 1, 1),
        (["Ray"], ["Ray", "Lee"], 0.5, 0),  # one of two gold spans
        (["Ray", "Lee", "Moe"], ["Ray"], 0.33, 0),  # two predicted spans too many
        (["Ray", "Ray"], ["Ray", "Lee"], 0.5, 0),  # each predicted span pairs once
        (["3", "4"], ["3 yards", "5 yards"], 0.33, 0),  # 2/3 and 0, over two
        # nothing but an article
        (["the"], ["Ray"], 0, 0),
        (["the"], ["an"], 1, 1),
    ],
)
def test_drop_scores_by_hand(predicted, gold, f1, exact):
    assert drop_scores(predicted, gold) == (f1, exact)


def test_drop_pairs_the_spans_for_the_greatest_sum():
    # "x y" with "x y" is 1, which leaves "y" and "x" with 0: mean 1/2.
    # "y" with "x y" is 2/3 and "x y" with "x" is 2/3: mean 2/3
    assert drop_scores(["x y", "y"], ["x y", "x"]) == (0.67, 0)


def test_drop_parts_a_generated_text_where_the_gold_has_parts():
    two = Example(prompt="", answers=("Ray and Lee",), spans=(("Ray", "Lee"),))
    assert score_drop(["Lee and Ray"], [two]) == {"f1": 1.0, "exact_match": 1.0}
    assert score_drop(["Lee"], [two]) == {"f1": 0.5, "exact_match": 0.0}
    one = Example(prompt="", answers=("salt and pepper",), spans=(("salt and pepper",),))
    assert score_drop(["pepper and salt"], [one]) == {"f1": 1.0, "exact_match": 0.0}
    nested = Example(prompt="", answers=("salt and pepper and oil",), spans=(("salt and pepper", "oil"),))
    assert score_drop([nested.answers[0]], [nested]) == {"f1": 1.0, "exact_match": 1.0}


def test_drop_takes_the_best_answer_and_means_over_examples():
    example = Example(prompt="", answers=("3", "3 yards"), spans=(("3",), ("3 yards",)))
    other = dataclasses.replace(example, answers=("9",), spans=(("9",),))
    assert score_drop(["3 yards", "8"], [example, other]) == {"f1": 0.5, "exact_match": 0.5}


def test_scores_have_the_keys_of_the_metrics():
    gold = Example(prompt="", options=(" x",) * 3, correct=(0,), answers=("x",), entities=("x",) * 3, spans=(("x",),))
    for name, spec in PROMPTED.items():
        prediction = 0 if spec.kind == "choice" else "x"
        assert tuple(task(name).score([prediction], [gold])) == spec.metrics


@pytest.mark.parametrize(("predictions", "n"), [([], 0), ([0], 2)])
def test_predictions_that_are_not_as_many_as_the_examples_are_refused(refused, predictions, n):
    refused(lambda: task("boolq").score(predictions, choices(*[0] * n)), f"{len(predictions)} predictions", f"{n} ex")
