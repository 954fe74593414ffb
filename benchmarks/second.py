"""The second decoder, Gemma 3 270M, which no mean and no other table has: its best rates, and its forms beside LoRA."""

import json
from typing import Any

from board import Board, markdown, signed, words
from protocol import edge
from rates import peak
from tables import RESULTS

MODEL = "gemma-3-270m"
SMALLER = " x0.53"  # in the names of what has a scale as many times smaller as the weights are


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "forms_gemma.json").read_text())
    return found


def second_peaks(*, in_units: bool = False) -> list[float]:
    """The best rates of LoRA, compact and shared, at the fixed scale or at one in units of the weights."""
    curves = [row for row in rows() if row["part"] == "rates" and not row["method"].startswith("adp")]
    return [peak(row) for row in curves if (SMALLER in row["method"]) == in_units]


def second_tables() -> str:
    """What moves the best rate, and the scores on SST-2 and CB by words with differences to LoRA of rank 8."""
    found = rows()
    curves = sorted((row for row in found if row["part"] == "rates"), key=lambda row: row["method"])
    peaks = {row["method"]: f"{edge(row)} {peak(row):.2g}".strip() for row in curves}
    lines = [
        [
            name,
            of,
            next((other for method, other in peaks.items() if method.replace(SMALLER, "") == name != method), ""),
        ]
        for name, of in peaks.items()
        if SMALLER not in name
    ]
    rates = markdown(lines, ["SST-2 by words", "peak at the fixed scale", "at 0.53 times the scale"])
    held_out, official = (Board(found, MODEL, which) for which in ("held_out", "official"))
    lines = []
    for name in held_out.methods:
        cells = []
        for board in (held_out, official):
            scores, gap = board.mean_of(name), None if name == "LoRA r=8" else board.gap(name, "LoRA r=8")
            cells += ["" if scores is None else words(scores), "" if gap is None else signed(gap)]
        lines.append([name, f"{held_out.trained(name):,}", *cells])
    columns = ["mean of SST-2 and CB by words", "trained", "held out", "to LoRA r=8", "official", "to LoRA r=8"]
    return f"{rates}\n\n{markdown(lines, columns)}"
