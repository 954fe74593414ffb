"""What was run, as a page for people or as tables for other programs."""

from collections.abc import Sequence
from pathlib import Path

from loretta.files import write_whole
from loretta.record import RunRecord
from loretta.report.runs import render


def write(records: Sequence[RunRecord], path: Path, *, title: str | None = None, notes: Sequence[str] = ()) -> None:
    """Write :func:`render`'s page to ``path``. An error leaves an older file there as it was.

    Raises InputError for no records, and OSError where the folder cannot be written to.
    """
    # replace: half a surrogate pair in a config must not cost the user the page
    write_whole(path, render(records, title=title, notes=notes).encode("utf-8", errors="replace"))


__all__ = ["render", "write"]
