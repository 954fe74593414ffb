"""Rows of benchmarks/results/ for the tables of docs/performance.md, and how such a table is written."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "Not measured yet.\n"

Row = dict[str, Any]


@cache
def results(pattern: str) -> tuple[Row, ...]:
    """The rows of all result files of a name, each with the head of its file: versions, device, dtype, sizes."""
    rows = []
    for path in sorted(RESULTS.glob(f"{pattern}.json")):
        content = json.loads(path.read_text())
        head = {name: value for name, value in content.items() if name not in ("rows", "summary")}
        rows += [{**head, "file": path.name, **row} for row in content["rows"]]
    return tuple(rows)


def table(head: str, rows: list[list[Any]], *, numbers_from: int = 1) -> str:
    """A Markdown table, its columns from ``numbers_from`` on to the right."""
    aligned = ["left" if k < numbers_from else "right" for k in range(head.count(" | ") + 1)]
    frame = pd.DataFrame([[str(cell) for cell in row] for row in rows], columns=head.split(" | "))
    return frame.to_markdown(index=False, disable_numparse=True, colalign=aligned) + "\n"


def source(row: Row) -> str:
    """Where numbers come from, as a line above their table."""
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in ("torch", "transformers", "peft"))
    on_cpu = row["device"] == "cpu"
    device = f"{row['processor']}, {row['threads']} thread{'s' * (row['threads'] != 1)}" if on_cpu else row["device"]
    file = f"[{row['file']}](../benchmarks/results/{row['file']})"
    return f"{device}, {row['dtype']}, {versions}; {file}\n\n"


def sources(rows: Iterable[Row]) -> str:
    """The same of rows of several files."""
    return "".join(dict.fromkeys(source(row) for row in rows))


def verdict(hit: bool, *, is_open: bool = False) -> str:
    """``is_open``: what was measured allows both."""
    return "open" if is_open else "hit" if hit else "**missed**"
