"""Cells of label columns -> class ids, scores, or several labels: a list of names, or a column of 0 and 1 for each."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from loretta.errors import InputError
from loretta.tasks.base import Kind, Known
from loretta.tasks.read import Columns
from loretta.tasks.sources import Source, wrong_cell
from loretta.wording import OBEYED, listed, quoted

MAX_GUESSED_CLASSES = 50
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
WHOLE = re.compile(r"[+-]?\d{1,300}", re.ASCII)  # more digits are beyond any float
PADDED = re.compile(r"0\d+", re.ASCII)
FOREIGN = re.compile(r"[+-]?\d+(,\d+ ?%?|\.?\d* ?%)", re.ASCII)  # numbers as tables for people have them
MAX_UNSEEN_QUOTED = 5
MISSING_WORDS = {"nan", "none", "null", "na", "n/a", "#n/a", "nat", "undefined", "unknown", "?", "-", "."}

Value = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScheme:
    """How the label column of the training file reads, for the other files too."""

    kind: Kind
    column: str
    source: object  # the training file
    numeric: bool
    classes: tuple[Value, ...]  # in the order of their ids; () for regression

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(value) for value in self.classes)

    def encode(self, cells: Sequence[Any], path: Source) -> list[int] | list[float]:
        """Class ids, or scores for regression.

        Raises InputError: a class that the training file lacks, or for regression a cell that is not a number.
        """
        if self.kind == "regression":
            return [float(number) for number in _all_numbers(cells, self.column, path)]
        ids = {value: at for at, value in enumerate(self.classes)}
        values = [_value(cell, self.numeric) for cell in cells]
        unseen = Counter(value for value in values if value not in ids)
        if unseen:
            shown = ", ".join(
                f"{quoted(value)} in {count} row{'s' * (count > 1)}"
                for value, count in unseen.most_common(MAX_UNSEEN_QUOTED)
            )
            more = len(unseen) - MAX_UNSEEN_QUOTED
            raise InputError(
                f"'{path}' has labels in its column {quoted(self.column)} that the training file "
                f"'{self.source}' lacks ({shown}{f' and {more} other labels' if more > 0 else ''}): "
                f"add such rows to the training file or remove them here"
            )
        return [ids[value] for value in values]


def doubts(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """A sentence on each likely mistake in the classes of a table; the data can be trained all the same.

    Mistakes are names that differ only in case, punctuation, blanks or forms of characters, numbers that are written in
    several ways (1, 1.0 and true), names of missing values, and classes with a single row.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        shown = OBEYED.sub("", unicodedata.normalize("NFKC", name)).casefold()
        key = re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", shown).strip(".,;:!?'\" ")
        number = _number(shown)
        alike.setdefault(str(ZEROS_AND_ONES.get(key, key) if number is None else number), []).append(name)
    found = []
    for same in (names for key, names in alike.items() if key and len(names) > 1):
        # a reader sees no difference between a letter with its accent as one character and as two
        look_different = len({unicodedata.normalize("NFC", name) for name in same}) == len(same)
        words = " and ".join(map(quoted if look_different else ascii, same))
        found.append(f"the classes {words} read alike: are they one?")
    if names and all(FOREIGN.fullmatch(name) for name in names):
        found.append(
            f"the classes {listed(names[:3])} are numbers with commas or percent signs, which are read as words: write "
            "3.5 for 3,5 and 5 for 5% to train on scores"
        )
    by_name = dict(zip(names, counts, strict=True))
    found += [
        f"the class {quoted(name)} ({count:,} row{'s' * (count != 1)}) reads like a missing value"
        for name, count in by_name.items()
        if name.casefold() in MISSING_WORDS
    ]
    if alone := [name for name, count in by_name.items() if count == 1]:
        is_are = "class has" if len(alone) == 1 else "classes have"
        found.append(f"{len(alone)} {is_are} a single row, which cannot be both trained and validated: {listed(alone)}")
    return found


def decide(cells: Sequence[Any], *, kind: Kind | None, column: str, path: Source) -> LabelScheme:
    """Read the label column of the training file; no cell may be missing.

    Without a ``kind``, words and at most 50 different whole numbers are classes, and numbers with a fraction
    are scores. Class ids follow the sorted labels, numbers by size; space around a label does not count, and
    1, "1" and 1.0 are the same label, unless there are codes such as 007 among them.

    Raises InputError: the kind cannot be told, a score is no number, there is only one class or score, or truth values
    of JSON stand beside words or numbers that read as such.
    """
    numbers = [_number(cell) for cell in cells]
    strays = [at for at, number in enumerate(numbers) if number is None]
    if kind is None:
        kind = _guess(cells, numbers, strays, column, path)
    if kind == "regression":
        numeric = True
        values: list[Any] = sorted(set(_all_numbers(cells, column, path)))
    else:
        _refuse_mixed_truths(cells, column, path)
        # 007 is a code, and its zeros a part of its name
        numeric = not strays and not any(isinstance(cell, str) and PADDED.fullmatch(cell.strip()) for cell in cells)
        values = sorted({_value(cell, numeric) for cell in cells})
    if len(values) < 2:
        raise InputError(
            f"every row of '{path}' has the label {quoted(values[0])} in its column {quoted(column)}: "
            f"give a training file with at least two different labels"
        )
    classes = () if kind == "regression" else tuple(values)
    return LabelScheme(kind=kind, column=column, source=path, numeric=numeric, classes=classes)


def _refuse_mixed_truths(cells: Sequence[Any], column: str, path: Source) -> None:
    # True == 1 to Python, and neither is "true": as classes they would be two or three
    truth = next((cell for cell in cells if isinstance(cell, bool)), None)
    if truth is None:
        return
    for at, cell in enumerate(cells):
        reads = _number(cell) in (0, 1) or str(cell).strip().lower() in ("true", "false")
        if reads and not isinstance(cell, bool) and str(cell).strip() not in ("True", "False"):
            what = f"{cell!r} stands beside {str(truth).lower()}, a truth value of JSON: write all labels in one way"
            raise wrong_cell(path, at, column, what)


def known_scheme(known: Known, kind: Kind, *, column: str) -> "LabelScheme | LabelSets":
    """As :func:`decide` and :func:`decide_sets` read the labels of the training file."""
    if kind == "multi_label":
        return LabelSets(column=column, source=known.data, names=known.label_names)
    numbers = [_number(name) for name in known.label_names]
    # the names of numbers are written as Python writes them, those of codes such as 007 as they stood
    numeric = None not in numbers and [str(number) for number in numbers] == list(known.label_names)
    classes: Any = tuple(numbers) if numeric else known.label_names
    return LabelScheme(kind=kind, column=column, source=known.data, numeric=numeric, classes=classes)


def _guess(
    cells: Sequence[Any], numbers: Sequence[float | None], strays: Sequence[int], column: str, path: Source
) -> Kind:
    if 0 < len(strays) < len(cells) / 2:
        what = f"{quoted(cells[strays[0]])} is not a number as most cells are ({len(strays)} such rows): mend them, or "
        raise wrong_cell(
            path, strays[0], column, f"{what}give --kind classification to take every cell as the name of a class"
        )
    if strays:
        return "classification"
    if any(isinstance(number, float) for number in numbers):
        return "regression"
    if (distinct := len(set(numbers))) > MAX_GUESSED_CLASSES:
        raise InputError(
            f"column {quoted(column)} of '{path}' holds {distinct} different whole numbers, which may be "
            f"classes or scores: give --kind classification or --kind regression"
        )
    return "classification"


def _all_numbers(cells: Sequence[Any], column: str, path: Source) -> list[int | float]:
    numbers: list[int | float] = []
    for at, cell in enumerate(cells):
        number = _number(cell)
        if number is None:
            what = f"{quoted(cell)} is not a finite number: mend it, or give --kind classification"
            raise wrong_cell(path, at, column, what)
        numbers.append(number)
    return numbers


def any_number(words: Iterable[str]) -> bool:
    """Whether one of some words is a number."""
    return any(_number(word) is not None for word in words)


def _value(cell: Any, numeric: bool) -> Value:
    number = _number(cell) if numeric else None
    return str(cell).strip() if number is None else number


def _number(cell: Any) -> int | float | None:
    """The finite number in a cell, as an int when it is whole; None for anything else, also for a bool.

    Whole numbers stay exact: ids of 19 digits that differ in the last one would be one float.
    """
    if isinstance(cell, str):
        cell = cell.strip()
        if WHOLE.fullmatch(cell):
            return int(cell)
        if not NUMBER.fullmatch(cell):
            return None
    elif isinstance(cell, bool) or not isinstance(cell, int | float | Decimal):
        return None
    try:
        number = float(cell)
    except OverflowError:
        return None
    if not math.isfinite(number):
        return None
    if isinstance(cell, int | Decimal) and cell == int(cell):
        return int(cell)
    return int(number) if number.is_integer() else number


# True and 1.0 are keys that equal 1
ZEROS_AND_ONES = {0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSets:
    """As :class:`LabelScheme`, for rows with any number of labels."""

    column: str
    source: object  # the training file
    names: tuple[str, ...]  # in the order of their places
    kind: Kind = "multi_label"
    classes: tuple[str, ...] = ()  # none: a row has no single class by which a split could be balanced

    def encode(self, cells: Sequence[Sequence[str]], path: Source) -> list[list[float]]:
        """For each row a 1 for every label that it has and a 0 for every other one.

        Raises InputError for a label that the training file lacks.
        """
        known = set(self.names)
        for at, cell in enumerate(cells):
            if unseen := [name for name in cell if name not in known]:
                what = f"the training file '{self.source}' lacks {quoted(unseen[0])}: it has {listed(self.names)}"
                raise wrong_cell(path, at, self.column, what)
        return [[float(name in cell) for name in self.names] for cell in cells]


def label_columns(label: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that ``--label`` names: one, or several with commas between them."""
    several = tuple(name.strip() for name in label.split(","))
    return (label,) if label in columns or len(several) < 2 else several


def read_sets(found: Columns, columns: Sequence[str], path: Source) -> list[list[str]]:
    """The labels of each row, by the ``columns`` among those ``found`` in a file.

    Raises InputError with file, row and column for a cell that is no list of names, or in several columns no 0 or 1.
    """
    if len(columns) == 1:
        return [_names(cell, columns[0], path, at) for at, cell in enumerate(found[columns[0]])]
    rows: list[list[str]] = [[] for _ in found[columns[0]]]
    for name in columns:
        for at, cell in enumerate(found[name]):
            value = cell.strip().lower() if isinstance(cell, str) else cell
            if not isinstance(value, str | int | float) or value not in ZEROS_AND_ONES:
                raise wrong_cell(path, at, name, f"{quoted(cell)} is neither 0 nor 1: mend it, or leave the column out")
            if ZEROS_AND_ONES[value]:
                rows[at].append(name)
    return rows


def decide_sets(cells: Sequence[Sequence[str]], *, column: str, path: Source) -> LabelSets:
    """The labels that there are, sorted. Raises InputError where there are fewer than two."""
    names = tuple(sorted({name for cell in cells for name in cell}))
    if len(names) < 2:
        raise InputError(
            f"the rows of '{path}' have the labels {listed(names) or 'none'} in {quoted(column)}: give at least two"
        )
    return LabelSets(column=column, source=path, names=names)


def _names(cell: Any, column: str, path: Source, at: int) -> list[str]:
    if not isinstance(cell, list):
        raise wrong_cell(path, at, column, f"{quoted(cell)} is not a list of labels: give one in each row")
    for name in cell:
        if not isinstance(name, str) or not name.strip():
            raise wrong_cell(path, at, column, f"the label {quoted(name)} is not a name: give text")
    if double := [name for name, count in Counter(cell).items() if count > 1]:
        raise wrong_cell(path, at, column, f"the label {quoted(double[0])} is there twice: give it once")
    return cell
