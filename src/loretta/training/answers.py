"""What a run answers on the split that scores it, beside the best that can be answered without reading a text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from scipy.stats import binomtest

from loretta.record import Answers, Mistake, RunRecord
from loretta.tasks import metrics
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.trainer import TwoRateTrainer

MISTAKES = 10  # kept of each run
LONGEST = 300  # characters kept of a text that was answered wrongly
CHANCE = 0.05  # above this probability a difference may be chance


def label_counts(task: Task | PromptedTask) -> dict[str, list[int]]:
    """Rows of each class in each split; empty for what has no classes."""
    if not task.label_names:
        return {}
    return {
        split: [found[k] for k in range(len(task.label_names))]
        for split in ("train", "validation", "test")
        if (data := getattr(task, split)) is not None
        for found in [Counter(_golds(task, data))]
    }


def _golds(task: Task | PromptedTask, data: Any) -> list[int]:
    """The class, or the place of the right option, of each example."""
    if isinstance(task, PromptedTask):
        return [example.correct[0] for example in data if example.correct]
    return list(data["label"])


def describe_answers(task: Task | PromptedTask, split: str, rows: Sequence[Mapping[str, Any]]) -> Answers | None:
    """The answers of ``rows``, those of ``predictions.jsonl``; None where every example has answers of its own."""
    if isinstance(task, PromptedTask):
        return _choices(task, split, rows)
    data, train = getattr(task, split), task.train
    texts = [" | ".join(words) for words in zip(*(data[column] for column in task.columns), strict=True)]
    if task.kind == "regression":
        mean = float(np.mean(train["label"]))
        errors = [abs(row["score"] - row["gold"]) for row in rows]
        mistakes = [
            Mistake(
                text=texts[k][:LONGEST], gold=f"{rows[k]['gold']:g}", answer=f"{rows[k]['score']:.4g}", size=errors[k]
            )
            for k in sorted(range(len(rows)), key=lambda k: -errors[k])[:MISTAKES]
            if errors[k] > 0
        ]  # fmt: skip
        return Answers(
            split=split,
            rows=len(rows),
            constant=f"the mean of train, {mean:.4g},",
            baseline=metrics.compute(task.metrics, [mean] * len(data), list(data["label"])),
            mistakes=mistakes,
        )
    most = Counter(train["label"]).most_common(1)[0][0]
    wrong = [k for k, row in enumerate(rows) if row["label"] != row["gold"]]
    mistakes = [
        Mistake(
            text=texts[k][:LONGEST], gold=rows[k]["gold"], answer=rows[k]["label"], size=_finite(rows[k]["probability"])
        )
        for k in sorted(wrong, key=lambda k: -_finite(rows[k]["probability"]))[:MISTAKES]
    ]
    found = Counter(row["label"] for row in rows)
    return Answers(
        split=split,
        rows=len(rows),
        constant=f"{task.label_names[most]!r}, the most frequent class of train,",
        baseline=metrics.compute(task.metrics, [most] * len(data), list(data["label"])),
        confusion=_confusion(task.label_names, [row["gold"] for row in rows], [row["label"] for row in rows]),
        only=next(iter(found)) if len(found) == 1 else None,
        mistakes=mistakes,
    )


def _choices(task: PromptedTask, split: str, rows: Sequence[Mapping[str, Any]]) -> Answers | None:
    examples = getattr(task, split)
    if task.kind != "choice":
        return None
    place = Counter(_golds(task, task.train)).most_common(1)[0][0]
    if any(len(example.options) <= place for example in examples):
        return None
    names = {example.options[place].strip() for example in examples}
    alike = len(names) == 1
    constant = f"{names.pop()!r}, the most frequent answer" if alike else f"option {place + 1}, the most frequent one"
    wrong = [k for k, row in enumerate(rows) if row["option"] != row["gold"]]
    sure = [_probability(row["log_probabilities"]) for row in rows]
    answered = {row["option"] for row in rows}
    return Answers(
        split=split,
        rows=len(rows),
        constant=f"{constant} of train,",
        baseline=task.score([place] * len(examples), examples),
        only=answered.pop() if alike and len(answered) == 1 else None,
        mistakes=[
            # the end of a prompt is what is asked
            Mistake(text=examples[k].prompt[-LONGEST:], gold=rows[k]["gold"], answer=rows[k]["option"], size=sure[k])
            for k in sorted(wrong, key=lambda k: -sure[k])[:MISTAKES]
        ],
    )


def _probability(log_probabilities: Sequence[float]) -> float:
    """Of the likeliest option among all of them."""
    values = np.array(log_probabilities)
    return _finite(float(np.exp(values.max() - np.logaddexp.reduce(values))))


def _confusion(names: Sequence[str], golds: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(golds, answers, labels=list(names)).tolist()


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def base_perplexity(trainer: TwoRateTrainer, examples: Any, split: str) -> Answers | None:
    """The perplexity of the base model on ``examples``; None where the method has changed the base itself."""
    model = trainer.model
    if not isinstance(model, PeftModel):
        return None
    with model.disable_adapter():
        loader = trainer.get_eval_dataloader(examples)
        output = trainer.evaluation_loop(loader, "Base model", prediction_loss_only=True, metric_key_prefix="base")
    loss = float((output.metrics or {})["base_loss"])
    return Answers(
        split=split,
        rows=len(examples),
        constant="the base model without the adapter",
        baseline={"loss": loss, "perplexity": math.exp(min(loss, 700))},
    )


def beats_baseline(record: RunRecord) -> bool | None:
    """Whether a run scores better than what needs no text; None where there is nothing to compare with."""
    answers = record.answers
    values = record.validation if record.test is None else record.test
    if answers is None or record.metric not in answers.baseline or record.metric not in values:
        return None
    # any scores that are not all the same have a correlation
    metric = "mse" if "mse" in values and "mse" in answers.baseline else record.metric
    score, baseline = values[metric], answers.baseline[metric]
    return score > baseline if metrics.higher_is_better(metric) else score < baseline


def chance_of(record: RunRecord) -> float | None:
    """The probability that the constant answer is right as often as the run (McNemar's exact test, one side).

    None where the answers have no classes, or both are always right about the same rows.
    """
    if record.answers is None or not record.answers.confusion or "train" not in record.label_counts:
        return None
    matrix, most = np.array(record.answers.confusion), int(np.argmax(record.label_counts["train"]))
    wins = int(np.trace(matrix) - matrix[most, most])  # right where the constant is wrong
    losses = int(matrix[most].sum() - matrix[most, most])
    return float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else None
