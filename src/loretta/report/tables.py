"""Tables of text, which every format of the report shows, and how numbers become their text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from loretta.report.figures import Look
from loretta.wording import MISSING, size_words


class Cell(NamedTuple):
    """A number as people read it, and what is shown with it."""

    text: str
    exact: str = ""  # in full, shown when the pointer rests on the cell
    paper: str = ""  # the number that the paper prints
    note: str = ""  # "2 of 3 seeds"
    anchor: str = ""  # id of the place that says where the number comes from
    shade: float | None = None  # of the background, from 0 to 1


class Column(NamedTuple):
    """One column; neighbours of one group share a heading."""

    group: str
    name: str
    hint: str = ""
    detail: str = ""  # a second line of the heading: the metric

    @property
    def heading(self) -> str:
        """Both lines in one."""
        return f"{self.name} ({self.detail})" if self.detail else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    heads: tuple[str, ...]
    cells: Sequence[Cell]
    look: Look | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows with one or several headings each; ``stubs`` names the columns of headings."""

    title: str
    stubs: tuple[str, ...]
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    of_words: bool = False  # the cells are words, not numbers

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns of one heading: its text and their number."""
        return [(name, len(list(group))) for name, group in groupby(self.columns, key=lambda column: column.group)]


def words_table(title: str, stub: str, names: Iterable[str], rows: Iterable[Sequence[str]], caption: str = "") -> Table:
    """A table whose cells are words; the first of each row is its heading."""
    return Table(
        title=title,
        stubs=(stub,),
        columns=[Column("", name) for name in names],
        rows=[Row(heads=(head,), cells=[Cell(word) for word in words]) for head, *words in rows],
        caption=caption,
        of_words=True,
    )


def number(value: float | None) -> Cell:
    """A value with four decimals, or in scientific notation where these say too little. None is JSON's NaN."""
    if value is None or math.isnan(value):
        return Cell("NaN")
    if math.isinf(value):
        return Cell("∞" if value > 0 else "−∞")
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return Cell(f"{value:,.4f}" if plain else f"{value:.3e}", exact=repr(value))


def count(value: int | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:,}")


def seconds(value: float) -> Cell:
    return Cell(f"{value:,.1f}", exact=f"{value!r} s") if math.isfinite(value) else number(value)


def size(n_bytes: int | None) -> Cell:
    if n_bytes is None:
        return Cell(MISSING)
    return Cell(size_words(n_bytes), exact=f"{n_bytes:,} bytes")
