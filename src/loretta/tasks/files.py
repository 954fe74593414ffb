"""Tables and plain text of the user -> Task."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loretta.errors import InputError
from loretta.tasks.base import Kind, Task
from loretta.tasks.labels import LabelScheme, decide, doubts
from loretta.tasks.multi_label import LabelSets, decide_sets, label_columns, read_sets
from loretta.tasks.read import TEXT_ENDINGS
from loretta.tasks.sources import HubSplit, Source, column_names, ending, place, read_columns, read_documents
from loretta.tasks.split import hold_out, text_key
from loretta.wording import listed, quoted

if TYPE_CHECKING:
    import datasets

TABLE_SHARE = 0.2  # of the rows, held out for validation
TEXT_SHARE = 0.1  # of the documents

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "regression": ("spearman", "pearson", "mse"),
    "language_modeling": ("perplexity",),
    "multi_label": ("micro_f1", "macro_f1", "accuracy"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows for one split: as many texts as labels, or no labels at all."""

    texts: list[tuple[str, ...]]
    labels: list[Any] | None  # class ids, scores, or a list of 0 and 1 each

    def rows(self, numbers: Sequence[int]) -> "Part":
        labels: Any = None if self.labels is None else [self.labels[row] for row in numbers]
        return Part([self.texts[row] for row in numbers], labels)

    def dataset(self) -> "datasets.Dataset":
        from datasets import Dataset

        names = ("text", "text_pair")[: len(self.texts[0])]
        columns: dict[str, Any] = {name: [text[at] for text in self.texts] for at, name in enumerate(names)}
        return Dataset.from_dict(columns if self.labels is None else {**columns, "label": self.labels})


def load_table(
    path: Source,
    *,
    text: str,
    label: str,
    text_pair: str | None = None,
    kind: Kind | None = None,
    validation_path: Source | None = None,
    test_path: Source | None = None,
    seed: int = 0,
) -> Task:
    """A labelled CSV, TSV, JSON Lines (each also gzipped) or Parquet file.

    ``label`` is a column of labels, of lists of them, or several columns of 0 and 1 with commas between their names;
    the last two give several labels a row.

    Without a validation file, 20% of the rows are held out by ``seed``, in each class alike; rows with the
    same texts stay on one side. How labels are read: :func:`loretta.tasks.labels.decide`.

    Raises:
        InputError: a file that cannot be read as its ending says, a column it has not, a missing cell, labels
            that cannot be told apart or that training has not, or too few rows to split.
    """
    if kind == "language_modeling":
        raise InputError(f"kind 'language_modeling' has no labels, got the column {quoted(label)}: drop one of the two")
    text_columns = (text,) if text_pair is None else (text, text_pair)
    labels = label_columns(label, column_names(path)) if "," in label else (label,)
    if len(set(names := (*text_columns, *labels))) < len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise InputError(
            f"column {quoted(double)} is given twice: the text, its pair and the label are different columns"
        )

    several = kind == "multi_label" or len(labels) > 1 or _holds_lists(path, label)
    if several and kind not in (None, "multi_label"):
        raise InputError(f"{quoted(label)} of '{path}' holds several labels a row, and kind is {kind!r}: leave it out")
    texts, cells = _read_rows(path, text_columns, labels, several)
    scheme: LabelScheme | LabelSets = (
        decide_sets(cells, column=label, path=path) if several else decide(cells, kind=kind, column=label, path=path)
    )
    train = Part(texts, scheme.encode(cells, path))

    notes: list[str] = []
    counts = Counter(name for cell in cells for name in cell) if several else Counter(map(str, train.labels or ()))
    found = [counts[name if several else str(at)] for at, name in enumerate(scheme.names)]
    odd = doubts(scheme.names, found)
    if validation_path is None:
        kept, held = hold_out(train.texts, _strata(scheme, train), share=TABLE_SHARE, seed=seed)
        if not held:
            raise InputError(
                f"'{path}' has too few rows to split ({len(texts)}, no label with two different texts): "
                f"add rows or give --validation FILE"
            )
        notes.append(
            f"{len(held):,} of the {len(texts):,} rows of '{path.name}' were held out for validation (seed {seed}"
            f"{', in each class alike' if scheme.classes else ''}), rows with equal texts on one side"
        )
        train, validation = train.rows(kept), train.rows(held)
        lost = set(train.labels or ()) - set(validation.labels or ()) if scheme.classes else set()
        if lost:
            shown = listed(scheme.names[int(at)] for at in sorted(lost))
            notes.append(f"too few different texts to hold any out: validation has no rows of class {shown}")
    else:
        validation = _labelled(validation_path, text_columns, labels, scheme)
        notes += _overlap(train, validation, "validation")
    test = None if test_path is None else _labelled(test_path, text_columns, labels, scheme)
    if test is not None:
        notes += _overlap(train, test, "test")

    return Task(
        name=path.name,
        kind=scheme.kind,
        columns=("text",) if text_pair is None else ("text", "text_pair"),
        label_names=scheme.names,
        metrics=METRICS[scheme.kind],
        train=train.dataset(),
        validation=validation.dataset(),
        test=None if test is None else test.dataset(),
        notes=(*notes, *odd),
    )


def load_text(
    path: Source,
    *,
    text: str | None = None,
    validation_path: Source | None = None,
    test_path: Source | None = None,
    seed: int = 0,
) -> Task:
    """Documents for language modelling: the paragraphs of a .txt or .md file, or the text column of a table.

    ``text`` names the column of a table ("text" where it is not given). Without a validation file, 10% of the
    documents are held out by ``seed``; equal documents stay on one side.

    Raises:
        InputError: a file that cannot be read as its ending says, a column it has not, a missing cell, or too
            few documents to split.
    """
    train = _documents(path, text)
    notes: list[str] = []
    if validation_path is None:
        kept, held = hold_out(train.texts, [None] * len(train.texts), share=TEXT_SHARE, seed=seed)
        if not held:
            raise InputError(
                f"'{path}' has too few different documents to split ({len(train.texts)} in all): "
                f"add documents (paragraphs between blank lines, or table rows) or give --validation FILE"
            )
        notes.append(
            f"{len(held):,} of the {len(train.texts):,} documents of '{path.name}' were held out for validation "
            f"(seed {seed}), equal documents on one side"
        )
        train, validation = train.rows(kept), train.rows(held)
    else:
        validation = _documents(validation_path, text)
        notes += _overlap(train, validation, "validation")
    test = None if test_path is None else _documents(test_path, text)
    if test is not None:
        notes += _overlap(train, test, "test")
    return Task(
        name=path.name,
        kind="language_modeling",
        columns=("text",),
        label_names=(),
        metrics=METRICS["language_modeling"],
        train=train.dataset(),
        validation=validation.dataset(),
        test=None if test is None else test.dataset(),
        notes=tuple(notes),
    )


def _documents(path: Source, text: str | None) -> Part:
    if not isinstance(path, HubSplit) and ending(path) in TEXT_ENDINGS:
        return Part([(document,) for document in read_documents(path)], None)
    if text is None and "text" not in (names := column_names(path)):
        raise InputError(f"'{path}' has no column 'text': give --text COLUMN, one of {listed(names)}")
    name = text or "text"
    return Part([(cell,) for cell in _texts(read_columns(path, (name,))[name], name, path)], None)


def _labelled(
    path: Source, text_columns: Sequence[str], labels: Sequence[str], scheme: LabelScheme | LabelSets
) -> Part:
    texts, cells = _read_rows(path, text_columns, labels, isinstance(scheme, LabelSets))
    return Part(texts, scheme.encode(cells, path))


def _holds_lists(path: Source, label: str) -> bool:
    return isinstance(read_columns(path, (label,))[label][0], list)


def _read_rows(
    path: Source, text_columns: Sequence[str], labels: Sequence[str], several: bool
) -> tuple[list[tuple[str, ...]], list[Any]]:
    columns = read_columns(path, (*text_columns, *labels))
    texts = [_texts(columns[name], name, path) for name in text_columns]
    if several:
        return list(zip(*texts, strict=True)), read_sets(path, labels)
    (label,) = labels
    refuse_missing(columns[label], label, path)
    for at, cell in enumerate(columns[label]):
        if isinstance(cell, list | dict | bytes):
            file, row = place(path, at)
            raise InputError(
                f"column {quoted(label)} of '{file}' holds {quoted(cell)} in row {row}, which is not one "
                f"label: give a column of words or numbers with --label"
            )
    return list(zip(*texts, strict=True)), columns[label]


def _texts(cells: list[Any], name: str, path: Source) -> list[str]:
    refuse_missing(cells, name, path)
    for at, cell in enumerate(cells):
        if not isinstance(cell, str):
            file, row = place(path, at)
            raise InputError(
                f"column {quoted(name)} of '{file}' holds {quoted(cell)} in row {row}, which is not text: "
                f"give a column of texts"
            )
    return cells


def refuse_missing(cells: Sequence[Any], name: str, path: Source) -> None:
    """Raise InputError where a cell of a column is empty."""
    missing = [at for at, cell in enumerate(cells) if _is_missing(cell)]
    if missing:
        file, row = place(path, missing[0])
        where = "" if file is path else f" of '{file}'"
        raise InputError(
            f"column {quoted(name)} of '{path}' is empty in {len(missing)} of {len(cells)} rows, first in "
            f"row {row}{where} (the header does not count): fill these cells or remove the rows"
        )


def _is_missing(cell: Any) -> bool:
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())
    )


def _strata(scheme: LabelScheme | LabelSets, part: Part) -> list[Any]:
    return list(part.labels or ()) if scheme.classes else [None] * len(part.texts)


def _overlap(train: Part, other: Part, name: str) -> list[str]:
    known = {text_key(text) for text in train.texts}
    count = sum(text_key(text) in known for text in other.texts)
    return [f"{count} of the {len(other.texts)} {name} rows have texts that also occur in training"] if count else []
