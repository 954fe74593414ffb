"""One label for a text or a pair: a class, or a score."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from pyarrow.compute import list_value_length
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from loretta.errors import InputError
from loretta.memory import is_out_of_memory
from loretta.record import Answers, Mistake
from loretta.tasks import metrics
from loretta.tasks.base import Task
from loretta.training.config import RunConfig
from loretta.training.forms.base import Asked, Data, Form, MakeTrainer, Recipe, Row, text_columns
from loretta.training.loaded import LoadedRun
from loretta.training.scores import logits_alone, named_values, score_logits
from loretta.training.trainer import TwoRateTrainer

MISTAKES = 10  # kept of each run
ENCODED_AT_ONCE = 1000  # rows
LONGEST = 300  # characters kept of a text that was answered wrongly


class Labels(Form):
    """Classification and regression."""

    unit, chosen_by = "rows", "metric"

    def encode(self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        data = getattr(task, split)

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            columns = [rows[column] for column in task.columns]
            return {**tokenizer(*columns, truncation=True, max_length=config.max_length), "labels": rows["label"]}

        return in_parts(data, encode)

    def lengths(self, data: Data) -> list[str]:
        return cut_words(data, self)

    def cut(self, data: Data, split: str) -> int:
        columns = [getattr(data.task, split)[name] for name in data.task.columns]
        whole = partial(data.tokenizer, verbose=False)
        return count_cut(lengths_of(data.splits[split]), data.config.max_length, columns, whole)

    def recipe(self, data: Data) -> Recipe:
        return scored_recipe(data, DataCollatorWithPadding(data.tokenizer), partial(score_logits, data.task))

    def counts(self, task: Task) -> dict[str, list[int]]:
        return count_classes(task, lambda data: data["label"][:])

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        output, task = trainer.predict(data.splits[split], metric_key_prefix=split), data.task
        rows = self.rows_of(torch.as_tensor(output.predictions), task.label_names)
        asked = zip(*(getattr(task, split)[column][:] for column in task.columns), strict=True)
        answered = [
            {**dict(zip(task.columns, words, strict=True)), "gold": gold, **row}
            for words, gold, row in zip(asked, self.golds_of(task, split), rows, strict=True)
        ]
        return named_values(output.metrics or {}, task, f"{split}_"), answered

    def rows_of(self, logits: Tensor, names: Sequence[str], *, all_of_them: bool = False) -> list[Row]:
        """(B, labels) logits -> a "label" and its "probability" each; without label names a "score" each.

        ``all_of_them`` adds "probability_NAME" of every class.
        """
        if not names:
            return [{"score": float(score)} for score in logits[:, 0]]
        probabilities = logits.float().softmax(-1)
        best = probabilities.max(-1)
        keys = [f"probability_{name}" for name in names] if all_of_them else []
        return [
            {"label": names[int(k)], "probability": float(p), **dict(zip(keys, each.tolist(), strict=False))}
            for p, k, each in zip(best.values, best.indices, probabilities, strict=True)
        ]

    def golds_of(self, task: Task, split: str) -> list[Any]:
        """The right answers of a split, in words."""
        labels = getattr(task, split)["label"][:]
        return [task.label_names[k] for k in labels] if task.label_names else list(labels)

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        describe = _of_scores if data.task.kind == "regression" else _of_classes
        return describe(data.task, split, rows)

    def evaluate(self, run: LoadedRun, task: Task, split: str, make_trainer: MakeTrainer) -> dict[str, float]:
        data = getattr(task, split)
        texts = [list(data[column]) for column in task.columns]
        return score_logits(task, torch.cat(list(logits_of_texts(run, texts))).numpy(), list(data["label"]))

    def predict(self, run: LoadedRun, asked: Asked, *, all_probabilities: bool, go_on: Any) -> Iterator[Row]:
        columns = text_columns(run.config)
        if len(asked) != len(columns):
            given = f"each example of the run has {' and '.join(map(repr, columns))}, got {len(asked)} texts of each"
            raise InputError(f"{given}: {'give the pair too' if len(asked) < len(columns) else 'leave the pair out'}")
        names = run.record.label_names
        if all_probabilities and not names:
            raise InputError(f"the run was trained on a {run.kind} task, which has scores: leave --probabilities out")
        for logits in logits_of_texts(run, asked):
            rows = self.rows_of(logits, names, all_of_them=all_probabilities)
            # the largest of numbers that are NaN is the first
            for row, is_one in zip(rows, logits.isfinite().all(-1).tolist(), strict=True):
                run.unanswered += not is_one
                yield row if is_one else dict.fromkeys(row)


def in_parts(data: Dataset, encode: Callable[[dict[str, list[Any]]], Mapping[str, Any]]) -> Dataset:
    """The rows of a split as ``encode`` gives them, some at a time: a tokenizer holds far more of a text than ids."""
    parts = [data[start : start + ENCODED_AT_ONCE] for start in range(0, len(data), ENCODED_AT_ONCE)]
    return concatenate_datasets([Dataset.from_dict(dict(encode(part))) for part in parts])


def scored_recipe(
    data: Data,
    collator: Any,
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    keep: Callable[[Any, Tensor | None], Tensor] = logits_alone,
) -> Recipe:
    """How to train what is scored by labels and by what an evaluation keeps of the outputs, for all of its rows."""

    def compute(prediction: Any) -> dict[str, float]:
        return score(prediction.predictions, prediction.label_ids)

    options = {
        "data_collator": collator,
        "compute_metrics": compute,
        "preprocess_logits_for_metrics": keep,
        "loss_is_mean": True,
        "lengths": lengths_of(data.splits["train"]),
    }
    return Recipe(trainer=TwoRateTrainer, options=options)


def lengths_of(examples: Dataset) -> list[int]:
    """Tokens of each example."""
    lengths: list[int] = list_value_length(examples.with_format("arrow")["input_ids"][:]).to_pylist()
    return lengths


def count_cut(
    lengths: Sequence[int], most: int, columns: Sequence[Sequence[Any]], whole: Callable[..., Mapping[str, Any]]
) -> int:
    """How many of the texts in ``columns`` had more than ``most`` tokens before they were cut to ``lengths``.

    ``whole`` gives the tokens of texts that are not cut; it is asked for those that are as long as may be.
    """
    full = [row for row, length in enumerate(lengths) if length >= most]
    return sum(len(ids) > most for ids in whole(*([c[k] for k in full] for c in columns))["input_ids"]) if full else 0


def cut_words(data: Data, form: Form) -> list[str]:
    """How many of the texts are cut, in a sentence."""
    most = data.config.max_length
    total, cut = sum(map(len, data.splits.values())), sum(form.cut(data, split) for split in data.splits)
    if not cut:
        return [f"no text is longer than max_length={most} tokens"]
    loses = "beginning" if data.tokenizer.truncation_side == "left" else "end"
    return [f"{cut:,} of the {total:,} texts are longer than max_length={most} tokens and lose their {loses}"]


def count_classes(task: Task, classes: Any) -> dict[str, list[int]]:
    """Rows of each class in each split; ``classes`` gives the class ids of a split."""
    if not task.label_names:
        return {}
    counts = {}
    for split in ("train", "validation", "test"):
        if (data := getattr(task, split)) is not None:
            found = Counter(classes(data))
            counts[split] = [found[k] for k in range(len(task.label_names))]
    return counts


@torch.inference_mode()
def logits_of_texts(run: LoadedRun, texts: Sequence[Sequence[str]]) -> Iterator[Tensor]:
    """(B, labels) logits in float32 on the CPU, batch by batch and in order; what does not fit is halved."""
    size, start = run.config.eval_batch_size, 0
    while start < len(texts[0]):
        columns = [list(column[start : start + size]) for column in texts]
        try:
            batch: Mapping[str, Tensor] = run.tokenizer(
                *columns, truncation=True, max_length=run.config.max_length, padding=True, return_tensors="pt"
            ).to(run.model.device)
            with run.as_trained():
                logits: Tensor = run.model(**batch).logits.float().cpu()
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            continue
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        run.cut += count_cut(
            mask.sum(1).tolist(), run.config.max_length, columns, partial(run.tokenizer, verbose=False)
        )
        yield logits
        start += size


def shown_texts(task: Task, split: str) -> list[str]:
    """The texts of each row as a reader is shown them."""
    data = getattr(task, split)
    return [" | ".join(words)[:LONGEST] for words in zip(*(data[column][:] for column in task.columns), strict=True)]


def _of_scores(task: Task, split: str, rows: Sequence[Mapping[str, Any]]) -> Answers:
    texts, mean = shown_texts(task, split), float(np.mean(task.train["label"][:]))
    errors = {k: error for k, row in enumerate(rows) if (error := abs(row["score"] - row["gold"])) > 0}
    return Answers(
        split=split,
        rows=len(rows),
        constant=f"the mean of train, {mean:.4g},",
        baseline=metrics.compute(task.metrics, [mean] * len(rows), getattr(task, split)["label"][:]),
        mistakes=worst(errors, lambda k: (texts[k], f"{rows[k]['gold']:g}", f"{rows[k]['score']:.4g}")),
    )


def _of_classes(task: Task, split: str, rows: Sequence[Mapping[str, Any]]) -> Answers:
    texts, golds = shown_texts(task, split), getattr(task, split)["label"][:]
    most = Counter(task.train["label"][:]).most_common(1)[0][0]
    wrong = {k: finite(row["probability"]) for k, row in enumerate(rows) if row["label"] != row["gold"]}
    return Answers(
        split=split,
        rows=len(rows),
        constant=f"{task.label_names[most]!r}, the most frequent class of train,",
        baseline=metrics.compute(task.metrics, [most] * len(rows), golds),
        confusion=confusion(task.label_names, [row["gold"] for row in rows], [row["label"] for row in rows]),
        only=only_one(row["label"] for row in rows),
        mistakes=worst(wrong, lambda k: (texts[k], rows[k]["gold"], rows[k]["label"])),
    )


def only_one(answers: Iterable[str]) -> str | None:
    """The answer, where all answers are the same."""
    found = set(answers)
    return found.pop() if len(found) == 1 else None


def worst(wrong: Mapping[int, float], shown: Callable[[int], tuple[str, str, str]]) -> list[Mistake]:
    """The worst wrong answers: ``wrong`` says of a row how wrong it is, ``shown`` its text, right answer and answer."""
    found = []
    for k in sorted(wrong, key=lambda k: -wrong[k])[:MISTAKES]:
        text, gold, answer = shown(k)
        found.append(Mistake(text=text, gold=gold, answer=answer, size=wrong[k]))
    return found


def confusion(names: Sequence[str], golds: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
    """Rows of each class (outer) by the class that was answered (inner)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(golds, answers, labels=list(names)).tolist()


def finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
