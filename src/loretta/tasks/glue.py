"""The eight GLUE tasks of the LoRETTA paper, from the Hub or from a folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loretta.errors import InputError
from loretta.tasks.base import Kind, Task
from loretta.tasks.sources import load_official
from loretta.wording import listed, nearest, quoted

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueTask:
    """One task as the Hub has it. The sizes are rows of the official splits."""

    columns: tuple[str, ...]
    label_names: tuple[str, ...]  # in the order of the Hub's ids; () for scores
    metrics: tuple[str, ...]
    train_rows: int
    validation_rows: int
    validation_split: str = "validation"

    @property
    def kind(self) -> Kind:
        return "classification" if self.label_names else "regression"


# Metrics as in the LoRETTA paper (Yang et al., NAACL 2024, arXiv:2402.11417): matched accuracy for MNLI,
# Matthews' correlation for CoLA, F1 for MRPC and QQP, Spearman's correlation for STS-B, accuracy for the
# others.
GLUE: Mapping[str, GlueTask] = MappingProxyType({
    "mnli": GlueTask(columns=("premise", "hypothesis"), label_names=("entailment", "neutral", "contradiction"),
                     metrics=("accuracy",), train_rows=392_702, validation_rows=9_815,
                     validation_split="validation_matched"),
    "sst2": GlueTask(columns=("sentence",), label_names=("negative", "positive"),
                     metrics=("accuracy",), train_rows=67_349, validation_rows=872),
    "mrpc": GlueTask(columns=("sentence1", "sentence2"), label_names=("not_equivalent", "equivalent"),
                     metrics=("f1", "accuracy"), train_rows=3_668, validation_rows=408),
    "cola": GlueTask(columns=("sentence",), label_names=("unacceptable", "acceptable"),
                     metrics=("mcc",), train_rows=8_551, validation_rows=1_043),
    "qnli": GlueTask(columns=("question", "sentence"), label_names=("entailment", "not_entailment"),
                     metrics=("accuracy",), train_rows=104_743, validation_rows=5_463),
    "qqp": GlueTask(columns=("question1", "question2"), label_names=("not_duplicate", "duplicate"),
                    metrics=("f1", "accuracy"), train_rows=363_846, validation_rows=40_430),
    "rte": GlueTask(columns=("sentence1", "sentence2"), label_names=("entailment", "not_entailment"),
                    metrics=("accuracy",), train_rows=2_490, validation_rows=277),
    "stsb": GlueTask(columns=("sentence1", "sentence2"), label_names=(),
                     metrics=("spearman", "pearson"), train_rows=5_749, validation_rows=1_500),
})  # fmt: skip


def load(name: str, *, data_dir: Path | None = None) -> Task:
    """One GLUE task; ``test`` is None, because GLUE keeps the labels of its test split to itself.

    With ``data_dir`` the rows come from ``<data_dir>/<name>/train.jsonl.gz`` and ``validation.jsonl.gz``
    (MNLI: ``validation_matched.jsonl.gz``), with the Hub's field names and label ids. Sizes that differ from
    the official ones are noted in the task, not refused.

    Raises InputError: an unknown name, a missing or broken file, or a Hub that cannot be reached.
    """
    if name not in GLUE:
        raise InputError(f"unknown GLUE task {quoted(name)}{nearest(name, tuple(GLUE))}: give one of {listed(GLUE)}")
    glue_task = GLUE[name]
    splits = ("train", glue_task.validation_split)
    columns = load_official(name, (HUB_NAME, name), splits, (*glue_task.columns, "label"), data_dir)
    if data_dir is not None:
        for split, part in zip(splits, columns, strict=True):
            _refuse_bad_cells(data_dir / name / f"{split}.jsonl.gz", part, len(glue_task.label_names))
    train, validation = (_dataset(glue_task, part) for part in columns)
    official = {"train": glue_task.train_rows, "validation": glue_task.validation_rows}
    return Task(
        name=name,
        kind=glue_task.kind,
        columns=_text_columns(glue_task),
        label_names=glue_task.label_names,
        metrics=glue_task.metrics,
        train=train,
        validation=validation,
        test=None,
        notes=tuple(
            f"{split} has {len(rows)} of the official {official[split]} rows"
            for split, rows in {"train": train, "validation": validation}.items()
            if len(rows) != official[split]
        ),
    )


def _text_columns(glue_task: GlueTask) -> tuple[str, ...]:
    return ("text", "text_pair")[: len(glue_task.columns)]


def _dataset(glue_task: GlueTask, columns: Mapping[str, list[Any]]) -> Any:
    from datasets import Dataset

    texts = {new: columns[old] for old, new in zip(glue_task.columns, _text_columns(glue_task), strict=True)}
    # JSON may write the score 3.0 as 3
    labels = columns["label"] if glue_task.label_names else [float(score) for score in columns["label"]]
    return Dataset.from_dict({**texts, "label": labels})


def _refuse_bad_cells(path: Path, columns: Mapping[str, list[Any]], n_classes: int) -> None:
    for field, cells in columns.items():
        for row, cell in enumerate(cells, start=1):
            if field != "label":
                good, wanted = isinstance(cell, str), "a text"
            elif n_classes:
                good = type(cell) is int and 0 <= cell < n_classes
                wanted = f"a class id from 0 to {n_classes - 1}"
            else:
                good, wanted = type(cell) in (int, float) and 0 <= cell <= 5, "a score from 0 to 5"
            if not good:
                raise InputError(
                    f"'{path}' has {quoted(cell)} as {quoted(field)} in row {row}, not {wanted}: "
                    f"write the file with the Hub's fields and label ids"
                )
