"""Tokens with a tag each (names, parts of speech) -> Task."""

import re
from collections.abc import Sequence
from typing import Any, Unpack

from loretta.errors import InputError
from loretta.tasks.base import Known, Task
from loretta.tasks.sources import Source, column_names, read_columns, wrong_cell
from loretta.tasks.split import OtherFiles, split_rows
from loretta.wording import listed, quoted

SHARE = 0.1  # of the rows, held out for validation
TOKENS, TAGS = "tokens", ("tags", "ner_tags")
ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")
ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall", "accuracy")
TAG_METRICS = ("accuracy", "macro_f1")

Rows = list[tuple[list[str], list[str]]]


def tags_of(columns: Sequence[str]) -> str | None:
    """The column with the tags of a table that has tokens; None for any other table."""
    return next((name for name in TAGS if name in columns), None) if TOKENS in columns else None


def load_tokens(
    path: Source, *, tokens: str | None, tags: str | None, known: Known | None, **files: Unpack[OtherFiles]
) -> Task:
    """Rows of a list of tokens and a list of as many tags, from JSON Lines or Parquet.

    The columns are "tokens" and "tags" or "ner_tags" where they are not given. The tags are ``known`` ones, or those of
    the file. Tags as B-PER, I-PER and O are scored by entity, others by token. Without a validation file 10% of the
    rows are held out by ``seed``.

    Raises InputError: a file or column that cannot be read, lists that do not match, a tag that the training file
    lacks, or too few rows to split.
    """
    names = column_names(path)
    tokens, tags = tokens or TOKENS, tags or tags_of(names) or TAGS[0]
    rows = _read(path, tokens, tags)
    if known is not None:
        labels, source = known.label_names, known.data
        _known(rows, labels, tags, path, source)
    else:
        labels, source = tuple(sorted({tag for _, row in rows for tag in row})), str(path)
    if len(labels) < 2:
        raise InputError(f"every token of '{path}' has the tag {quoted(labels[0])}: give at least two different tags")
    splits = split_rows(
        path,
        rows,
        lambda other: _known(_read(other, tokens, tags), labels, tags, other, source),
        key=lambda row: tuple(row[0]),
        share=SHARE,
        **files,
        alike="rows with equal tokens",
    )
    return Task(
        name=path.name,
        kind="token_classification",
        columns=("tokens",),
        label_names=labels,
        metrics=ENTITY_METRICS if all(ENTITY_TAG.fullmatch(label) for label in labels) else TAG_METRICS,
        **splits.datasets(lambda rows: _dataset(rows, labels)),
        notes=tuple(splits.notes),
    )


def _read(path: Source, tokens: str, tags: str) -> Rows:
    columns = read_columns(path, (tokens, tags))
    rows = []
    for at, (words, marks) in enumerate(zip(columns[tokens], columns[tags], strict=True)):
        words, marks = _texts(words, tokens, path, at), _texts(marks, tags, path, at)
        if len(words) != len(marks):
            raise wrong_cell(path, at, tags, f"{len(marks)} tags for {len(words)} tokens: give one for each")
        rows.append((words, marks))
    return rows


def _texts(cell: Any, column: str, path: Source, at: int) -> list[str]:
    if not isinstance(cell, list):
        raise wrong_cell(path, at, column, f"{quoted(cell)} is not a list: write JSON Lines with one in each row")
    if not cell:
        raise wrong_cell(path, at, column, "the list is empty: fill it or leave the row out")
    # tags may be numbers without names
    cell = [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in cell]
    for number, item in enumerate(cell, start=1):
        if not isinstance(item, str) or not item.strip():
            raise wrong_cell(path, at, column, f"item {number} is {quoted(item)}, which is no text: mend it")
    return cell


def _known(rows: Rows, labels: Sequence[str], tags: str, path: Source, source: str) -> Rows:
    known = set(labels)
    for at, (_, row) in enumerate(rows):
        if unseen := [tag for tag in row if tag not in known]:
            what = f"the tag {quoted(unseen[0])} is not in the training file '{source}': it has {listed(labels)}"
            raise wrong_cell(path, at, tags, what)
    return rows


def _dataset(rows: Rows, labels: Sequence[str]) -> Any:
    from datasets import Dataset

    ids = {label: k for k, label in enumerate(labels)}
    return Dataset.from_dict(
        {"tokens": [words for words, _ in rows], "tags": [[ids[t] for t in row] for _, row in rows]}
    )
