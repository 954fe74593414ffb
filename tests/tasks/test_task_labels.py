from decimal import Decimal
from pathlib import Path

import pytest

from loretta.tasks.base import Known
from loretta.tasks.labels import decide, doubts, known_scheme

TRAIN, OTHER = Path("train.csv"), Path("val.csv")


def scheme_of(cells, kind=None):
    return decide(cells, kind=kind, column="label", path=TRAIN)


@pytest.mark.parametrize(
    ("cells", "names", "ids"),
    [
        (["pos", "neg", "pos"], ("neg", "pos"), [1, 0, 1]),
        (["10", "9", "2"], ("2", "9", "10"), [2, 1, 0]),
        ([10, 9, -1], ("-1", "9", "10"), [2, 1, 0]),
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
        (["1", "1.0", "0"], ("0", "1"), [1, 1, 0]),
        ([" pos", "pos ", "neg"], ("neg", "pos"), [1, 1, 0]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([True, "False", "unknown"], ("False", "True", "unknown"), [1, 0, 2]),
        (["a", 1, "a"], ("1", "a"), [1, 0, 1]),
        (["007", "10", "007"], ("007", "10"), [0, 1, 0]),
        # ids of other programs, which are one number in float64
        (["1000000000000000001", "1000000000000000000"], ("1000000000000000000", "1000000000000000001"), [1, 0]),
        ([2**63 + 1, 2**63, 2**63 + 1], ("9223372036854775808", "9223372036854775809"), [1, 0, 1]),
        ([Decimal(10**20 + 1), Decimal(10**20)], ("100000000000000000000", "100000000000000000001"), [1, 0]),
        ([Decimal("NaN"), "a"], ("NaN", "a"), [0, 1]),
    ],
)
def test_classes_are_sorted_and_numbered(cells, names, ids):
    scheme = scheme_of(cells)
    assert (scheme.kind, scheme.names) == ("classification", names)
    assert scheme.encode(cells, OTHER) == ids


@pytest.mark.parametrize("cells", [["0.5", "1", "2e0"], [0.5, 1, 2.0], [Decimal("0.5"), Decimal(1), Decimal(2)]])
def test_fractions_are_scores(cells):
    scheme = scheme_of(cells)
    assert (scheme.kind, scheme.names) == ("regression", ())
    encoded = scheme.encode(cells, OTHER)
    assert encoded == [0.5, 1.0, 2.0]
    assert {type(score) for score in encoded} == {float}


def test_the_kind_can_be_given():
    assert scheme_of(["1", "2", "1"], "regression").encode(["1", "2"], OTHER) == [1.0, 2.0]
    assert scheme_of(["0.5", "1.5"], "classification").names == ("0.5", "1.5")
    assert len(scheme_of([str(n) for n in range(60)], "classification").names) == 60


def test_fifty_whole_numbers_are_classes_and_fifty_one_must_be_told(refused):
    assert scheme_of(list(range(50))).kind == "classification"
    pieces = ("'label'", "'train.csv'", "51", "--kind classification", "--kind regression")
    refused(lambda: scheme_of(list(range(51))), *pieces)


@pytest.mark.parametrize(
    ("cells", "kind", "pieces"),
    [
        (["same", "same"], None, ["'same'", "'train.csv'", "two different labels"]),
        ([0.5, 0.5], None, ["0.5", "two different labels"]),
        (["1", "2", "N/A", "3", "n.a."], None, ["'N/A'", "row 3", "2 such rows", "--kind classification"]),
        (["1", "good"], "regression", ["'good'", "row 2", "'train.csv'"]),
        ([1, True, 2], "regression", ["True", "row 2"]),
        (["1", "inf", "2"], "regression", ["'inf'", "row 2"]),
        ([1.0, float("inf"), 2.5], "regression", ["inf", "row 2"]),
        ([1, 10**400, 2], "regression", ["100000", "row 2", "finite"]),
        # one label as JSON writes truth, and as other programs do
        ([True, False, 1, False], None, ["row 3", "1 stands beside true", "write all labels in one way"]),
        ([False, True, True, "0"], None, ["row 4", "'0' stands beside false"]),
        (["yes", False, "no", "false"], None, ["row 4", "'false' stands beside false"]),
        ([0, 1, 0.0, True, 1], "classification", ["row 1", "0 stands beside true"]),
    ],
)
def test_labels_that_cannot_be_trained_are_refused(refused, cells, kind, pieces):
    refused(lambda: scheme_of(cells, kind), *pieces)


def test_labels_that_training_has_not_are_refused(refused):
    scheme = scheme_of(["pos", "neg"])
    cells = ["pos", "neutral", "neutral", "mixed"]
    refused(lambda: scheme.encode(cells, OTHER), "'val.csv'", "'train.csv'", "'neutral' in 2 rows", "'mixed' in 1 row")


def test_a_word_among_number_classes_is_unseen(refused):
    refused(lambda: scheme_of(["0", "1"]).encode(["0", "two"], OTHER), "'two' in 1 row", "'val.csv'")


def test_an_id_that_differs_in_the_last_of_its_digits_is_unseen(refused):
    scheme = scheme_of(["1000000000000000001", "2"])
    refused(lambda: scheme.encode(["1000000000000000000"], OTHER), "1000000000000000000")


def test_many_unseen_labels_are_counted(refused):
    refused(lambda: scheme_of(["a", "b"]).encode([f"z{n}" for n in range(9)], OTHER), "and 4 other labels")


def test_a_word_among_scores_is_refused(refused):
    refused(lambda: scheme_of([0.5, 1.5]).encode([1.0, "bad"], OTHER), "'bad'", "row 2", "'val.csv'")


def test_what_looks_like_a_mistake_in_the_classes_is_named():
    assert doubts(["neg", "pos"], [3, 4]) == []
    assert doubts(["-1", "0", "1"], [3, 4, 5]) == [], "a sign is no punctuation"
    assert doubts(["1", "1.5", "2"], [3, 4, 5]) == doubts(["False", "True"], [3, 4]) == []
    numbers = ["007", "0", "1", "1.0", "7", "False", "TRUE", "x"]
    assert doubts(numbers, [2] * 8) == [
        f"the classes {words} read alike: are they one?"
        for words in ("'007' and '7'", "'0' and 'False'", "'1' and '1.0' and 'TRUE'")
    ]
    names, counts = ["NaN", "Negative", "negative", "not so good", "not-so good.", "odd"], [2, 3, 4, 5, 6, 1]
    said = doubts(names, counts)
    assert said[:2] == [
        "the classes 'Negative' and 'negative' read alike: are they one?",
        "the classes 'not so good' and 'not-so good.' read alike: are they one?",
    ]
    assert said[2] == "the class 'NaN' (2 rows) reads like a missing value"
    assert said[3].endswith("which cannot be both trained and validated: 'odd'")
    assert len(said) == 4
    alike = ["ｎｅｇ", "neg", "caf\u00e9", "cafe\u0301", "pos\u200b", "pos"]
    assert doubts(alike, [2] * 6) == [
        "the classes 'ｎｅｇ' and 'neg' read alike: are they one?",
        r"the classes 'caf\xe9' and 'cafe\u0301' read alike: are they one?",
        r"the classes 'pos\u200b' and 'pos' read alike: are they one?",
    ]


@pytest.mark.parametrize(
    "cells", [[1, "None", 2, 1], ["1", "2", "None"], [1, 2.0, 3], ["007", "7"], [True, "maybe", True]]
)
def test_what_was_trained_reads_as_it_did_then(cells):
    then = decide(cells, kind="classification", column="label", path=OTHER)
    known = Known(data="train.csv", label_names=then.names)
    now = known_scheme(known, "classification", column="label")
    assert now.names == then.names
    assert now.encode(cells, OTHER) == then.encode(cells, OTHER)
