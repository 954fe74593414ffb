"""A seeded split that keeps equal texts together and every class in training."""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, Unpack

from loretta.errors import InputError
from loretta.wording import grouped

if TYPE_CHECKING:
    from loretta.tasks.sources import Source

FEW = 10  # labels: more of them, of which none has two texts, are no classes

Row = TypeVar("Row")


class OtherFiles(TypedDict, total=False):
    """Where the other splits come from: without a file for validation it is a part of train, drawn by ``seed``."""

    validation_path: "Source | None"
    test_path: "Source | None"
    seed: int


@dataclass(frozen=True, slots=True)
class Splits(Generic[Row]):
    """The rows of each split, and sentences on where they come from."""

    train: list[Row]
    validation: list[Row]
    test: list[Row] | None
    notes: list[str]

    def datasets(self, of: Callable[[list[Row]], Any]) -> dict[str, Any]:
        """What ``of`` makes of the rows of each split, by the split's name in a Task."""
        test = None if self.test is None else of(self.test)
        return {"train": of(self.train), "validation": of(self.validation), "test": test}


def split_rows(
    source: "Source",
    rows: list[Row],
    read: "Callable[[Source], list[Row]]",
    *,
    key: Callable[[Row], tuple[str, ...]],
    label: Callable[[Row], Hashable] | None = None,
    share: float,
    called: str = "rows",
    alike: str = "rows with equal texts",
    add: str = "rows",
    **files: Unpack[OtherFiles],
) -> Splits[Row]:
    """Training rows and those of further files; without a file for validation some ``rows`` are held out for it.

    Rows with the same ``key`` stay on one side; of each ``label`` the same share is held out. ``source`` is the file of
    ``rows``, ``read`` reads another one; ``called``, ``alike`` and ``add`` are words for the rows, for those that stay
    together, and for what a user may add. A further file that is ``source`` itself has its rows.

    Raises InputError where too few texts differ to hold any out.
    """
    validation, test, seed = files.get("validation_path"), files.get("test_path"), files.get("seed", 0)

    def rows_of(other: "Source") -> list[Row]:
        return rows if other is source else read(other)

    notes = []
    if validation is None:
        labels = [None if label is None else label(row) for row in rows]
        kept, held = hold_out([key(row) for row in rows], labels, share=share, seed=seed)
        if not held and (n := len({*labels})) > FEW:
            raise InputError(
                f"'{source}' has {n:,} different labels in {len(rows):,} rows, and none with two different texts, so "
                "that none can be held out: give --label COLUMN with classes, --kind regression for scores, or "
                "--validation FILE"
            )
        if not held:
            raise InputError(
                f"'{source}' has too few different {called} to split ({len(rows)} in all): add {add} or give "
                "--validation FILE"
            )
        evenly = "" if label is None else ", in each class alike"
        notes.append(
            f"{len(held):,} of the {len(rows):,} {called} of '{source.name}' were held out for validation (seed "
            f"{seed}{evenly}), {alike} on one side"
        )
        train, others = [rows[k] for k in kept], [rows[k] for k in held]
    else:
        train, others = rows, rows_of(validation)
    return Splits(train, others, None if test is None else rows_of(test), notes)


def hold_out(
    texts: Sequence[tuple[str, ...]], labels: Sequence[Hashable], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Row numbers (kept, held out), each in ascending order.

    Of the rows of every label about ``share`` (at most one half) is held out: at least one row where the label has two
    different texts, and never all. Rows with the same texts, whatever their case and spacing, stay on one side. Nothing
    is held out where no label has two different texts. The same input and seed give the same split on every machine.
    """
    rows_of_text = grouped(range(len(texts)), lambda row: text_key(texts[row]))
    # texts that occur with the same two labels form a stratum of their own, so that no label can lose its last row
    strata = grouped(rows_of_text.values(), lambda rows: frozenset(labels[row] for row in rows))

    rng = random.Random(seed)
    held: set[int] = set()
    for groups in strata.values():
        held.update(_take(groups, share, rng))
    return [row for row in range(len(texts)) if row not in held], sorted(held)


def text_key(text: tuple[str, ...]) -> tuple[str, ...]:
    """A key that equal texts share: their words, whatever their case and spacing."""
    return tuple(" ".join(part.casefold().split()) for part in text)


def _take(groups: list[list[int]], share: float, rng: random.Random) -> list[int]:
    if len(groups) < 2:
        return []
    order = list(groups)
    rng.shuffle(order)
    target = max(1, round(share * sum(map(len, groups))))
    taken: list[int] = []
    for rows in order:
        if len(taken) + len(rows) <= target:
            taken += rows
    return taken or min(order, key=len)
