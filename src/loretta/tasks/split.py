"""A seeded split that keeps equal texts together and every class in training."""

import random
from collections.abc import Hashable, Sequence


def hold_out(
    texts: Sequence[tuple[str, ...]], labels: Sequence[Hashable], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Row numbers (kept, held out), each in ascending order.

    About ``share`` (at most one half) of the rows of every label is held out, at least one row where the
    label has two different texts, and never all of them. Rows with the same texts, whatever their case and
    spacing, stay on one side. The same input and seed give the same split on every machine. Nothing is held
    out where no label has two different texts.
    """
    rows_of_text: dict[tuple[str, ...], list[int]] = {}
    for row, text in enumerate(texts):
        rows_of_text.setdefault(text_key(text), []).append(row)
    # a text that occurs with two labels is a stratum of its own kind, so that no label can lose its last row
    strata: dict[frozenset[Hashable], list[list[int]]] = {}
    for rows in rows_of_text.values():
        strata.setdefault(frozenset(labels[row] for row in rows), []).append(rows)

    rng = random.Random(seed)
    held: set[int] = set()
    for groups in strata.values():
        held.update(_take(groups, share, rng))
    return [row for row in range(len(texts)) if row not in held], sorted(held)


def text_key(text: tuple[str, ...]) -> tuple[str, ...]:
    """A key that equal texts share: their words, whatever the case and the spacing."""
    return tuple(" ".join(part.casefold().split()) for part in text)


def _take(groups: list[list[int]], share: float, rng: random.Random) -> list[int]:
    """Rows of whole groups, at most ``share`` of all rows if that is possible."""
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
