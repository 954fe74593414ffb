"""Scores of answers in words, as SQuAD and DROP define them."""

import re
import string
from collections.abc import Sequence

from loretta.tasks.prompted.base import Example

JOINT = " and "  # between the spans of one answer, where they are written as one text

Bag = frozenset[str]

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_squad(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """``f1`` and ``exact_match`` of SQuAD from 0 to 1: the best over an example's gold answers, averaged over examples.

    Case, punctuation and articles do not count. Source: torchmetrics.
    """
    from torchmetrics.functional.text import squad

    scores = squad(
        [{"prediction_text": text, "id": str(at)} for at, text in enumerate(predictions)],
        [
            # the metric does not look at where the answers start
            {"answers": {"text": list(example.answers), "answer_start": [0] * len(example.answers)}, "id": str(at)}
            for at, example in enumerate(examples)
        ],
    )
    return {name: float(scores[name]) / 100 for name in ("f1", "exact_match")}


def score_drop(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """``f1`` and ``exact_match`` of DROP from 0 to 1: the best over an example's gold answers, averaged over examples.

    A prediction is one text. Where the gold answer has several spans, the prediction is split at "and".
    """
    pairs = [
        [_score(prediction, spans) for spans in example.spans]
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    n = len(pairs)
    return {
        "f1": sum(max(f1 for f1, _ in golds) for golds in pairs) / n,
        "exact_match": sum(max(exact for _, exact in golds) for golds in pairs) / n,
    }


def _score(prediction: str, gold: Sequence[str]) -> tuple[float, float]:
    # a gold span may hold an "and" of its own: both sides are split, so that the gold text scores 1
    several = len(gold) > 1
    predicted = prediction.split(JOINT) if several else [prediction]
    return drop_scores(predicted, JOINT.join(gold).split(JOINT) if several else gold)


def drop_scores(predicted: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of the spans of one prediction with those of one gold answer; at least one span each.

    Spans are bags of words without case, articles and punctuation, numbers by their value. Every gold span is paired
    with at most one predicted span so that the sum of the pairs' F1 is greatest; a pair scores 0 where the gold span
    has numbers and the predicted one has none of them. The sum is divided by the larger count of spans and rounded to
    two decimals. A date is a span: its words.

    Source: the rules of the official evaluation (Dua et al. 2019), with its rounding.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    predicted_words, gold_words = ([_words(span) for span in spans] for spans in (predicted, gold))
    exact = len(predicted) == len(gold) and set(predicted_words) == set(gold_words)
    f1_GP = np.array([[_pair_f1(frozenset(p), frozenset(g)) for p in predicted_words] for g in gold_words])
    best = np.zeros(max(f1_GP.shape))
    pairs = linear_sum_assignment(f1_GP, maximize=True)
    best[pairs[0]] = f1_GP[pairs]
    # NumPy rounds as the official script does: 0.225 to 0.22, where Python rounds to 0.23
    return float(np.round(best.mean(), 2)), float(exact)


def _pair_f1(predicted: Bag, gold: Bag) -> float:
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    common = len(predicted & gold)
    # a bag is empty where there was nothing but articles and punctuation: all of its words count as right
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _words(span: str) -> tuple[str, ...]:
    """The words that count, split at blanks and hyphens."""
    words = (ARTICLES.sub(" ", _normal(word.lower())) for word in re.split("[ -]", span))
    return tuple(" ".join(words).split())


def _normal(word: str) -> str:
    if not _is_number(word):
        word = word.translate(NO_PUNCTUATION)
    return str(float(word)) if _is_number(word) else word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
