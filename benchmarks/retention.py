"""Tables of what a training takes away: earlier tasks, a low loss on held-out rows, the reading of other texts."""

import json
import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from board import Row, Scores, markdown, paired, signed, words
from methods import UNTRAINED
from protocol import best_rate, by_seed, mean_by_seed
from tables import RESULTS

NONE = "Not measured yet.\n"
PAPER = "sst2>mrpc>qnli"
REFERENCE = "LoRA r=8"
SHORT = {"all-MiniLM-L6-v2": "MiniLM", "all-mpnet-base-v2": "MPNet", "SmolLM2-135M-Instruct": "SmolLM2"}


def forgetting_rows() -> list[Row]:
    file = RESULTS / "forgetting.json"
    return json.loads(file.read_text()) if file.exists() else []


def average(row: Row, orders: Sequence[str]) -> Scores:
    """The mean accuracy on the three tasks over these orders, for each seed."""
    return _over_seeds(row, [scores for order in orders for scores in row["scores"][order].values()])


def kept(row: Row, other: Row) -> Scores:
    """By how much a method keeps more than another one, in the orders that both have, for each seed."""
    orders = [order for order in row["scores"] if order in other["scores"]]
    return paired(average(row, orders), average(other, orders))


def kept_of_earlier(row: Row, other: Row) -> Scores:
    """The same of the two tasks that are not the last of an order: what is left of what was learned before."""
    orders = [order for order in row["scores"] if order in other["scores"]]
    return paired(*(mean_by_seed([_at(one, place, orders) for place in (0, 1)]) for one in (row, other)))


def _over_seeds(row: Row, some: Sequence[Sequence[float]]) -> Scores:
    return mean_by_seed([by_seed(row, scores) for scores in some])


def _at(row: Row, place: int, orders: Sequence[str]) -> Scores:
    """The mean accuracy on the task that was trained at a place of these orders, for each seed."""
    return _over_seeds(row, [row["scores"][order][order.split(">")[place]] for order in orders])


def forgetting_table(rows: Sequence[Row]) -> str:
    """Accuracy after three tasks in turn: in the paper's order, and by the place of a task in the orders of a model."""
    if not rows:
        return NONE
    references = {row["model"]: row for row in rows if row["method"] == REFERENCE}
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["trained"])):
        reference = references.get(row["model"])
        own = row["scores"][PAPER]
        papers = [f"{mean(own[task]):.3f}" for task in PAPER.split(">")]
        places = [f"{mean(_at(row, place, list(row['scores']))):.3f}" for place in range(3)]
        both = None if reference is None or row is reference else (row, reference)
        gaps = ["" if both is None else signed(of(*both)) for of in (kept, kept_of_earlier)]
        lines.append(
            [
                row["method"], SHORT[row["model"]], f"{row['trained']:,}", *papers,
                words(_over_seeds(row, list(own.values()))), *places,
                words(average(row, list(row["scores"]))), str(len(row["scores"])), *gaps,
            ]
        )  # fmt: skip
    columns = ["SST-2", "MRPC", "QNLI", "mean", "first", "second", "third", "mean of orders", "orders"]
    last = [f"to {REFERENCE}", f"first two to {REFERENCE}"]
    return markdown(lines, ["method", "model", "trained", *columns, *last], left=2)


def risen(row: Row) -> Scores:
    """How far the held-out loss of each seed stands above its minimum at the end."""
    return by_seed(row, [losses[-1] - min(losses) for losses in row["losses"][best_rate(row)]])


def overfitting_table(found: Sequence[Row]) -> str:
    """The loss on held-out rows in 30 epochs: its minimum, where that is, and what it is at the end."""
    rows = [row for row in found if row.get("part") == "long" and "losses" in row]
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["task"], row["trained"])):
        of_seeds = row["losses"][best_rate(row)]
        epochs = [losses.index(min(losses)) + 1 for losses in of_seeds]
        lines.append(
            [
                row["method"], SHORT[row["model"]], row["task"], f"{row['trained']:,}",
                words([min(losses) for losses in of_seeds]), f"{mean(epochs):.1f}",
                words([losses[-1] for losses in of_seeds]), signed(risen(row)),
                words([curve[-1] for curve in row["curve"][best_rate(row)]]),
            ]
        )  # fmt: skip
    columns = [
        "method",
        "model",
        "task",
        "trained",
        "lowest loss",
        "in epoch",
        "loss at the end",
        "risen by",
        "score at the end",
    ]
    return markdown(lines, columns, left=3) if lines else NONE


def reading_table(found: Sequence[Row]) -> str:
    """The perplexity of other texts after a training on a task, at the rate that is the best for the task."""
    rows = [row for row in found if "wiki" in row and row.get("part", "front") == "front"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        values = [math.nan if loss is None else math.exp(loss) for loss in row["wiki"][best_rate(row)]]
        cells.setdefault(row["method"], {"trained": row["trained"]})[row["task"]] = words(values, 2)
    lines = [
        [method, f"{of['trained']:,}", *[of.get(task, "") for task in tasks]]
        for method, of in sorted(cells.items(), key=lambda item: (item[0] != UNTRAINED, item[1]["trained"]))
    ]
    return markdown(lines, ["method", "trained", *(f"after {task}" for task in tasks)]) if lines else NONE
