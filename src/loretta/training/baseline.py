"""Whether a run's answers beat the best answer that reads no text."""

import numpy as np
from scipy.stats import binomtest, t

from loretta.record import RunRecord
from loretta.tasks import metrics

CORRELATIONS = ("spearman", "pearson", "mcc")  # mcc: Pearson's correlation of two classes written as 0 and 1
CHANCE = 0.05  # above this probability a difference may be chance


def beats_baseline(record: RunRecord) -> bool | None:
    """Whether a run scores better than what needs no text; None where there is nothing to compare with."""
    answers, values = record.answers, record.scores
    if answers is None or record.metric not in answers.baseline or record.metric not in values:
        return None
    # any scores that are not all the same have a correlation
    metric = "mse" if "mse" in values and "mse" in answers.baseline else record.metric
    score, baseline = values[metric], answers.baseline[metric]
    return score > baseline if metrics.higher_is_better(metric) else score < baseline


def chance_of(record: RunRecord) -> float | None:
    """The probability that the constant answer is right as often as the run (McNemar's exact test, one side).

    Of a correlation it is that of answers which have none (Student's t). None for entities and sets of labels, which
    no count of right answers scores.
    """
    if record.answers is None:
        return None
    if record.metric in CORRELATIONS:
        score = record.scores[record.metric]
        free = record.answers.rows - 2
        return float(t.sf(score * np.sqrt(free / max(1 - score**2, 1e-12)), free)) if free > 0 else None
    if (
        not record.answers.confusion
        or record.kind not in ("classification", "choice")
        or "train" not in record.label_counts
    ):
        return None
    matrix, most = np.array(record.answers.confusion), int(np.argmax(record.label_counts["train"]))
    wins = int(np.trace(matrix) - matrix[most, most])  # right where the constant is wrong
    losses = int(matrix[most].sum() - matrix[most, most])
    return float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0
