"""What was run, as a page for people or as tables for other programs."""

from collections.abc import Sequence
from pathlib import Path

from loretta.record import RunRecord
from loretta.report import page
from loretta.report.runs import render


def write(records: Sequence[RunRecord], path: Path, *, title: str | None = None, notes: Sequence[str] = ()) -> None:
    """Write :func:`render`'s page to ``path``, whole or not at all; an older file stays until it is replaced.

    Raises:
        InputError: no records.
        OSError: the folder does not exist or cannot be written to.
    """
    page.save(render(records, title=title, notes=notes), path)


__all__ = ["render", "write"]
