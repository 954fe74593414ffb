"""Scores of predictions against references, by name."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loretta.errors import InputError
from loretta.wording import listed, nearest, quoted

LOWER_IS_BETTER = ("mse", "perplexity")  # perplexity is exp(loss), which the trainer computes
OF_ENTITIES = ("entity_f1", "entity_precision", "entity_recall")  # of sequences of tags, by of_entities()
OF_PAIRS = ("rewards/accuracies", "rewards/margins")  # of pairs of answers, as TRL names them


def compute(names: Sequence[str], predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Score predictions of shape (rows,) against references of the same shape; with several labels (rows, labels).

    ``accuracy``, ``f1`` (of two classes; class 1 is the positive one), ``macro_f1`` and ``mcc`` take class ids;
    ``spearman``, ``pearson`` and ``mse`` take scores; ``micro_f1``, ``macro_f1`` and ``accuracy`` (all labels of a row
    are right) take several labels, each 0 or 1. All are fractions or coefficients, not percent.

    A metric is 0.0 where it is undefined because all predictions or all references are the same: the correlations, also
    those of a single row, ``mcc``, and ``f1`` without any positive. Predictions that are not finite make every metric
    of scores NaN, so that a diverged run never looks good.

    Raises InputError: an unknown metric, shapes that differ, no rows, or class ids beyond 1 for ``f1``.

    Source: scikit-learn for the classes and the mean squared error, SciPy for the correlations.
    """
    for name in names:
        if name not in _COMPUTE:
            higher_is_better(name)  # an unknown name is refused there
            source = {**dict.fromkeys(OF_ENTITIES, "entities"), **dict.fromkeys(OF_PAIRS, "pairs")}.get(
                name, "the loss"
            )
            raise InputError(f"metric {quoted(name)} comes from {source}: compute() cannot tell it from predictions")
    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.shape != expected.shape or predicted.ndim not in (1, 2) or not len(predicted):
        raise InputError(
            f"metrics need two lists of the same length with at least one row, "
            f"got shapes {predicted.shape} and {expected.shape}"
        )
    return {name: float(_COMPUTE[name](predicted, expected)) for name in names}


def of_entities(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of entities in rows of tags (B-PER, I-PER, O): kind, first and last token must be right.

    Source: seqeval, whose default scores as the CoNLL-2000 script does.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    scores = zip(OF_ENTITIES, (f1_score, precision_score, recall_score), strict=True)
    return {name: float(score(list(references), list(predictions), zero_division=0)) for name, score in scores}


def higher_is_better(name: str) -> bool:
    """Whether a larger value of the metric is the better one. Raises InputError for an unknown metric."""
    if name not in (*_COMPUTE, *LOWER_IS_BETTER, *OF_ENTITIES, *OF_PAIRS):
        names = (*_COMPUTE, "perplexity")
        raise InputError(f"unknown metric {quoted(name)}{nearest(name, names)}: give one of {listed(names)}")
    return name not in LOWER_IS_BETTER


def metric_range(name: str) -> tuple[float, float]:
    """The lowest and the highest value that a metric (or "loss") can have."""
    if name in ("mcc", "spearman", "pearson"):
        return -1.0, 1.0
    return {
        "rewards/margins": (-math.inf, math.inf),
        "mse": (0.0, math.inf),
        "loss": (0.0, math.inf),
        "perplexity": (1.0, math.inf),
    }.get(name, (0.0, 1.0))


def _of_classes(function: str, predicted: NDArray, expected: NDArray, **options: Any) -> float:
    from sklearn import metrics

    return getattr(metrics, function)(expected, predicted, **options)


def _f1(predicted: NDArray, expected: NDArray) -> float:
    beyond = sorted(set(np.union1d(predicted, expected).tolist()) - {0, 1})
    if beyond:
        raise InputError(f"metric 'f1' is for the classes 0 and 1, got class {beyond[0]}: take 'macro_f1'")
    return _of_classes("f1_score", predicted, expected, zero_division=0.0)


def _mcc(predicted: NDArray, expected: NDArray) -> float:
    return 0.0 if _constant(predicted, expected) else _of_classes("matthews_corrcoef", predicted, expected)


def _mse(predicted: NDArray, expected: NDArray) -> float:
    from sklearn.metrics import mean_squared_error

    if not np.isfinite(predicted).all():
        return math.nan
    return mean_squared_error(expected.astype(np.float64), predicted.astype(np.float64))  # float16 overflows at 65,504


def _correlation(function: str, predicted: NDArray, expected: NDArray) -> float:
    from scipy import stats

    if not np.isfinite(predicted).all():
        return math.nan
    if _constant(predicted, expected):
        return 0.0
    with warnings.catch_warnings():
        # the first scores of a model differ in their last digits only: the coefficient is imprecise, but a number
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return getattr(stats, function)(predicted.astype(np.float64), expected.astype(np.float64)).statistic


def _constant(*arrays: NDArray) -> bool:
    return any((array == array[0]).all() for array in arrays)


_COMPUTE: dict[str, Callable[[NDArray, NDArray], float]] = {
    "accuracy": partial(_of_classes, "accuracy_score"),
    "f1": _f1,
    "macro_f1": partial(_of_classes, "f1_score", average="macro", zero_division=0.0),
    "micro_f1": partial(_of_classes, "f1_score", average="micro", zero_division=0.0),
    "mcc": _mcc,
    "spearman": partial(_correlation, "spearmanr"),
    "pearson": partial(_correlation, "pearsonr"),
    "mse": _mse,
}
