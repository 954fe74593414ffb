"""Tables and plain text of the user -> Task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from loretta.errors import InputError
from loretta.tasks.base import Kind, Known, Task
from loretta.tasks.labels import (
    LabelScheme,
    LabelSets,
    any_number,
    decide,
    decide_sets,
    doubts,
    known_scheme,
    label_columns,
    read_sets,
)
from loretta.tasks.read import TEXT_ENDINGS, Columns
from loretta.tasks.sources import (
    HubSplit,
    Source,
    column_names,
    ending,
    place,
    read_columns,
    read_documents,
    separator_of,
    wrong_cell,
)
from loretta.tasks.split import OtherFiles, Splits, split_rows, text_key
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
class Row:
    """The texts of a row, and its label: a class id, a score, or a list of 0 and 1; None for a document."""

    texts: tuple[str, ...]
    label: Any = None


def _dataset(rows: Sequence[Row]) -> "datasets.Dataset":
    from datasets import Dataset

    names = ("text", "text_pair")[: len(rows[0].texts)]
    columns: dict[str, Any] = {name: [row.texts[at] for row in rows] for at, name in enumerate(names)}
    return Dataset.from_dict(columns if rows[0].label is None else {**columns, "label": [row.label for row in rows]})


def load_table(
    path: Source,
    *,
    text: str,
    label: str,
    text_pair: str | None = None,
    kind: Kind | None = None,
    known: Known | None = None,
    **files: Unpack[OtherFiles],
) -> Task:
    """A task from a table with labels: a CSV, TSV, JSON Lines (each also gzipped) or Parquet file.

    ``label`` names a column of labels, a column of lists of labels, or several columns of 0 and 1 with commas between
    the names; the last two give a row several labels. How labels are read: :func:`loretta.tasks.labels.decide`, or as
    ``known`` beside its ``kind``.

    Without a validation file, 20% of the rows are held out by ``seed``, in each class alike; rows with the same texts
    stay on one side.

    Raises InputError: a file or column that cannot be read, a missing cell, labels whose kind cannot be told or that
    training lacks, or too few rows to split.
    """
    text_columns = (text,) if text_pair is None else (text, text_pair)
    labels = label_columns(label, column_names(path)) if "," in label else (label,)
    if len(set(names := (*text_columns, *labels))) < len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise InputError(
            f"column {quoted(double)} is given twice: the text, its pair and the label are different columns"
        )

    columns = read_columns(path, (*text_columns, *labels))
    several = kind == "multi_label" or len(labels) > 1 or isinstance(columns[label][0], list)
    if several and kind not in (None, "multi_label"):
        raise InputError(f"{quoted(label)} of '{path}' holds several labels a row, and kind is {kind!r}: leave it out")
    texts, cells = _rows_of(columns, path, text_columns, labels, several)
    scheme: LabelScheme | LabelSets
    if known is not None and kind is not None:
        scheme = known_scheme(known, kind, column=label)
    elif several:
        scheme = decide_sets(cells, column=label, path=path)
    else:
        scheme = decide(cells, kind=kind, column=label, path=path)
    rows = [Row(*pair) for pair in zip(texts, scheme.encode(cells, path), strict=True)]

    def read(other: Source) -> list[Row]:
        columns = read_columns(other, (*text_columns, *labels))
        texts, cells = _rows_of(columns, other, text_columns, labels, several)
        return [Row(*pair) for pair in zip(texts, scheme.encode(cells, other), strict=True)]

    counts = Counter(name for cell in cells for name in cell) if several else Counter(str(row.label) for row in rows)
    splits = split_rows(
        path,
        rows,
        read,
        key=lambda row: row.texts,
        label=(lambda row: row.label) if scheme.classes else None,
        share=TABLE_SHARE,
        **files,
    )
    notes = _not_held_out(splits, scheme) if files.get("validation_path") is None else []
    notes += doubts(scheme.names, [counts[name if several else str(at)] for at, name in enumerate(scheme.names)])
    notes += _doubts_of_texts(rows, text)
    notes += _doubts_of_quotes(path, rows, scheme)
    return _task(path, scheme.kind, splits, scheme.names, notes)


def _not_held_out(splits: Splits[Row], scheme: LabelScheme | LabelSets) -> list[str]:
    """A sentence on classes of which the split for validation has no row."""
    lost = {row.label for row in splits.train} - {row.label for row in splits.validation} if scheme.classes else ()
    if not lost:
        return []
    shown = listed(scheme.names[int(at)] for at in sorted(lost))
    return [f"too few different texts to hold any out: validation has no rows of class {shown}"]


def _doubts_of_texts(rows: Sequence[Row], column: str) -> list[str]:
    labels: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        labels.setdefault(text_key(row.texts), set()).add(str(row.label))
    found = []
    if several := sum(len(of_text) > 1 for of_text in labels.values()):
        found.append(f"{several:,} text{'s stand' if several > 1 else ' stands'} in several rows with different labels")
    if len(labels) > 1 and all(texts[0].isdecimal() for texts in labels):
        found.append(f"every cell of column {quoted(column)} is a number: is it the text?")
    return found


def _doubts_of_quotes(path: Source, rows: Sequence[Row], scheme: LabelScheme | LabelSets) -> list[str]:
    """A sentence on texts that hold whole rows of the file, as a cell does that begins with a stray quotation mark."""
    if (mark := separator_of(path)) is None:
        return []

    def is_row(line: str) -> bool:
        ends = {cell.strip() for cell in (line.partition(mark)[0], line.rpartition(mark)[2])}
        # with commas, numbers end lines of prose too
        by_number = not scheme.names and mark == "\t" and any_number(ends)
        return mark in line and (by_number or not ends.isdisjoint(scheme.names))

    swallowed = [text for row in rows for text in row.texts if any(map(is_row, text.splitlines()[:-1]))]
    if not swallowed:
        return []
    hold = "text holds" if len(swallowed) == 1 else "texts hold"
    return [
        f"{len(swallowed):,} {hold} what looks like whole rows, the first is {quoted(swallowed[0])}: does a quotation "
        "mark begin a cell? Then write the cell in quotes, and each quote in it twice"
    ]


def shared_words(split: str, count: int, rows: int) -> str:
    """The sentence on rows of a split that are also trained."""
    return f"{count:,} of the {rows:,} {split} rows have a text that is in train, which flatters the score"


def _task(
    path: Source, kind: Kind, splits: Splits[Row], label_names: tuple[str, ...] = (), notes: Sequence[str] = ()
) -> Task:
    known = {text_key(row.texts) for row in splits.train}
    overlaps = []
    for name, rows in {"validation": splits.validation, "test": splits.test or []}.items():
        if count := sum(text_key(row.texts) in known for row in rows):
            overlaps.append(shared_words(name, count, len(rows)))
    return Task(
        name=path.name,
        kind=kind,
        columns=("text", "text_pair")[: len(splits.train[0].texts)],
        label_names=label_names,
        metrics=METRICS[kind],
        **splits.datasets(_dataset),
        notes=(*splits.notes, *overlaps, *notes),
    )


def load_text(path: Source, *, text: str | None = None, **files: Unpack[OtherFiles]) -> Task:
    """A task of language modelling: its documents are the paragraphs of a .txt or .md file, or a column of a table.

    ``text`` names the column ("text" by default). Without a validation file, 10% of the documents are held out by
    ``seed``; equal documents stay on one side.

    Raises InputError: a file or column that cannot be read, a missing cell, or too few documents to split.
    """
    splits = split_rows(
        path,
        _documents(path, text),
        lambda other: _documents(other, text),
        key=lambda row: row.texts,
        share=TEXT_SHARE,
        **files,
        called="documents",
        alike="equal documents",
        add="documents (paragraphs between blank lines, or table rows)",
    )
    return _task(path, "language_modeling", splits)


def _documents(path: Source, text: str | None) -> list[Row]:
    if not isinstance(path, HubSplit) and ending(path) in TEXT_ENDINGS:
        return [Row((document,)) for document in read_documents(path)]
    if text is None and "text" not in (names := column_names(path)):
        raise InputError(f"'{path}' has no column 'text': give --text COLUMN, one of {listed(names)}")
    name = text or "text"
    return [Row((cell,)) for cell in _texts(read_columns(path, (name,))[name], name, path)]


def _rows_of(
    columns: Columns, path: Source, text_columns: Sequence[str], labels: Sequence[str], several: bool
) -> tuple[list[tuple[str, ...]], list[Any]]:
    texts = [_texts(columns[name], name, path) for name in text_columns]
    if several:
        return list(zip(*texts, strict=True)), read_sets(columns, labels, path)
    (label,) = labels
    refuse_missing(columns[label], label, path)
    for at, cell in enumerate(columns[label]):
        if isinstance(cell, list | dict | bytes):
            what = f"{quoted(cell)} is not one label: give a column of words or numbers with --label"
            raise wrong_cell(path, at, label, what)
    return list(zip(*texts, strict=True)), columns[label]


def _texts(cells: list[Any], name: str, path: Source) -> list[str]:
    refuse_missing(cells, name, path)
    for at, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise wrong_cell(path, at, name, f"{quoted(cell)} is not text: give a column of texts")
    return cells


def refuse_missing(cells: Sequence[Any], name: str, path: Source) -> None:
    """Raise InputError where a cell of a column is empty."""
    # NaN alone differs from itself
    missing = [at for at, cell in enumerate(cells) if cell is None or cell != cell or not str(cell).strip()]
    if missing:
        file, row = place(path, missing[0])
        where = "" if file is path else f" of '{file}'"
        raise InputError(
            f"column {quoted(name)} of '{path}' is empty in {len(missing)} of {len(cells)} rows, first in "
            f"row {row}{where} (the header does not count): fill these cells or remove the rows"
        )
