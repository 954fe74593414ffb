"""Several labels for one text: a list of names in each row, or a column of 0 and 1 for each label."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loretta.errors import InputError
from loretta.tasks.base import Kind
from loretta.tasks.sources import Source, read_columns, wrong_cell
from loretta.wording import listed, quoted

# True and 1.0 are keys that equal 1
ZEROS_AND_ONES = {0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSets:
    """How a column of several labels reads, by the training file. Beside :class:`loretta.tasks.labels.LabelScheme`."""

    column: str
    source: Source  # the training file
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


def read_sets(path: Source, columns: Sequence[str]) -> list[list[str]]:
    """The labels of each row.

    Raises InputError with file, row and column for a cell that is no list of names, or in several columns no 0 or 1.
    """
    found = read_columns(path, columns)
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
