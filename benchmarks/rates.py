"""Scores against the learning rate: where each form is best, and what one rate for all tasks costs."""

from collections.abc import Sequence
from statistics import mean

import pandas as pd
from board import Board, Row, markdown, paired, signed, words
from groups import GROUPS
from protocol import best_rate, by_seed, chosen, edge, mean_by_seed
from verdicts import MODELS

NONE = "Not measured yet.\n"
ONE_RATES = ("0.00075", "0.0015", "0.003")
SECOND = "stsb"  # the task on which the rules for the learning rate were tried again


def rates_table(found: Sequence[Row]) -> str:
    """Scores against the learning rate, and the rate at which each form is best."""
    some = [row for row in found if row.get("part") == "rates" and row["family"] in ("LoRETTA", "LoRA")]
    if not some:
        return NONE
    rates = sorted({rate for row in some for rate in row["held_out"]}, key=float)
    lines = []
    for row in sorted(some, key=lambda row: (row["model"], row["method"].split(" r=")[0], row["trained"])):
        scores = {rate: [s for s in row["held_out"][rate] if s is not None] for rate in row["held_out"]}
        cells = [f"{mean(scores[rate]):.3f}" if scores.get(rate) else "" for rate in rates]
        model = MODELS[row["model"]].partition(" ")[0]
        top = f"{edge(row)} {peak(row):.3g}".strip()
        lines.append([row["method"], model, row["task"], f"{row['trained']:,}", *cells, top])
    columns = ["form", "model", "task", "trained", *[f"{float(rate):g}" for rate in rates], "peak"]
    return f"{peaks_table(some)}\n\n{markdown(lines, columns, left=3)}"


def peaks_table(some: Sequence[Row]) -> str:
    """By what factor the best rate of each form moves over its ranks; at rank 1 every scale is that of the form."""
    forms = dict.fromkeys(row["method"].split(" r=")[0] for row in some)
    columns: dict[str, list[Row]] = {}
    for second in (False, True):
        for model, shown in MODELS.items():
            here = [row for row in some if row["model"] == model and (row["task"] == SECOND) == second]
            columns |= {shown.partition(" ")[0] + f", {SECOND}" * second: here} if here else {}

    def is_of(form: str, row: Row) -> bool:
        own, _, rank = row["method"].partition(" r=")
        return form == own or (rank in ("", "1") and form.startswith((f"{own}^", f"{own} cores^")))

    lines = []
    for form in forms:
        moved = [[(peak(row), edge(row)) for row in here if is_of(form, row)] for here in columns.values()]
        if any(of[1:] for of in moved):
            lines.append([form, *(moved_by(of) if of[1:] else "" for of in moved)])
    return markdown(lines, ["the peak moves over the ranks by a factor of", *columns]) if lines else ""


def moved_by(peaks: Sequence[tuple[float, str]]) -> str:
    """The factor between the highest and the lowest peak; one at the edge of its grid may lie further out."""
    (low, below), (high, above) = min(peaks), max(peaks)
    if below == "≥" or above == "≤":
        return "at an edge"
    return f"{'≥ ' if below or above else ''}{high / low:.1f}"


RANKED = {"LoRA": "LoRA", "shared": "shared", "compact": "compact", "compact cores^1": "compact with `even_rates`"} | {
    form: f"{form}, by the rank of its trains" for form in ("rep", "adp")
}


def ranks_table(found: Sequence[Row]) -> str:
    """The best of six rates at each rank (the paper's Table 6), and what is trained there; norms are frozen."""
    scores: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in found:
        form, _, rank = row["method"].partition(" r=")
        if row.get("part") == "rates" and form in RANKED:
            of = [score for score in row["held_out"][best_rate(row)] if score is not None]
            shown = f"{mean(of):.3f} ({row['trained']:,})"
            scores.setdefault((MODELS[row["model"]].partition(" ")[0], row["task"], RANKED[form]), {})[
                int(rank or 1)
            ] = shown
    ranks = sorted({rank for of in scores.values() for rank in of})
    lines = [
        [form, model, task, *(of.get(rank, "") for rank in ranks)]
        for (model, task, form), of in sorted(scores.items())
        if of.keys() - {1}
    ]
    return markdown(lines, ["form", "model", "task", *(f"rank {rank}" for rank in ranks)], left=3) if lines else ""


def shapes_table(found: Sequence[Row]) -> str:
    """Adp with norms by the modes of its trains (the paper's Table 7): official scores; 4 modes are its own."""
    names = {4: "adp + norms"} | {int(name.split(", ")[1].split()[0]): name for name in GROUPS["shapes"]}
    boards = [Board(found, model, "official") for model in MODELS]
    lines = []
    for board in boards:
        tasks = [task for task in board.tasks if any((names[n], task) in board.cells for n in names if n != 4)]
        for task in tasks:
            of = {n: board.scores(name, task) for n, name in names.items() if (name, task) in board.cells}
            shown = [f"{words(of[n])} ({board.trained(names[n]):,})" if n in of else "" for n in sorted(names)]
            lines.append([MODELS[board.model].partition(" ")[0], task, *shown])
    return markdown(lines, ["model", "task", *(f"{n} modes" for n in sorted(names))], left=2) if lines else NONE


HEADS = {"": "frozen", "tensorized": "as a train", "dense": "whole"}


def heads_table(found: Sequence[Row]) -> str:
    """Norms and what is trained of a classifier's hidden layer (the paper's Table 11): official scores."""
    rows = {(r["method"], r["model"], r["task"]): r for r in found if r.get("part", "front") in ("front", "heads")}
    lines = []
    for form, model, task in sorted(
        {(n.partition(", ")[0], *of) for (n, *of), r in rows.items() if r["part"] == "heads"}
    ):
        cells = {
            word: rows.get((form + (f", {head} head" if head else ""), model, task)) for head, word in HEADS.items()
        }
        scores = {word: chosen(row, "official") for word, row in cells.items() if row is not None}
        shown = [
            "" if row is None else f"{words(scores[word])} ({row['trained'] + row['head']:,})"
            for word, row in cells.items()
        ]
        gap = signed(paired(scores["whole"], scores["frozen"])) if {"whole", "frozen"} <= scores.keys() else ""
        lines.append([form, MODELS[model].partition(" ")[0], task, *shown, gap])
    columns = ["form", "model", "task", *(f"hidden layer {word}" for word in HEADS.values()), "whole to frozen"]
    return markdown(lines, columns, left=3) if lines else NONE


def one_rate_table(found: Sequence[Row]) -> str:
    """What it costs to take one rate on every task in place of the best of the grid: held-out means."""
    lines = []
    for model, shown in MODELS.items():
        board = Board(found, model, "held_out")
        for method, best in board.complete().items():
            if not board.trained(method):
                continue
            cells = [board.cells[method, task] for task in board.common]
            line = [shown.partition(" ")[0], method, f"{board.trained(method):,}", words(best)]
            for rate in ONE_RATES:
                fixed = at_rate(cells, rate)
                line.append("" if fixed is None else signed(paired(fixed, best)))
            lines.append(line)
    return markdown(lines, ["model", "method", "trained", "own rates", *(f"at {r}" for r in ONE_RATES)], left=2)


def at_rate(cells: Sequence[Row], rate: str) -> pd.Series | None:
    """The means over tasks at one rate, by seed, a member that diverged having 0; None if a task lacks the rate."""
    if not all(rate in row["held_out"] for row in cells):
        return None
    return mean_by_seed([by_seed(row, row["held_out"][rate]).fillna(0.0) for row in cells])


def peak(row: Row) -> float:
    """The rate at the top of the parabola through the best rate and its neighbours, in the logarithm of the rate."""
    rates = sorted(row["held_out"], key=float)
    means = [mean(s for s in row["held_out"][rate] if s is not None) for rate in rates]
    at = max(range(len(rates)), key=means.__getitem__)
    if at in (0, len(rates) - 1):
        return float(rates[at])
    left, top, right = means[at - 1 : at + 2]
    shift = 0.5 * (left - right) / (left - 2 * top + right) if left - 2 * top + right else 0.0
    return float(rates[at]) * (float(rates[at + 1]) / float(rates[at])) ** shift
