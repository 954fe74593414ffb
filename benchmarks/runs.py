"""Tables of runs that were made one at a time: ranks that adapt, instruction tuning, answers in words."""

import json
from collections.abc import Callable
from statistics import mean

import pandas as pd
from board import Row, Scores, markdown, paired, signed, words
from methods import UNTRAINED
from protocol import METRICS
from tables import RESULTS

NONE = "Not measured yet.\n"
Best = tuple[tuple[str, str], float, list[Row]]  # a task and a method, the chosen rate, its runs by seed


def runs_of(name: str, worth: Callable[[Row], float]) -> list[Best]:
    """The runs of a file by task and method, at the rate whose seeds are worth the most.

    All trained methods of a task are compared on the rates and seeds that all of them have, so that no one is chosen
    from more. A method with less than half the runs of another is not counted among these, and stands on its own runs.
    """
    file = RESULTS / name
    rows = json.loads(file.read_text()) if file.exists() else []
    have: dict[str, dict[str, set[tuple[float, int]]]] = {}
    for row in rows:
        have.setdefault(row["task"], {}).setdefault(row["method"], set()).add((row["rate"], row["seed"]))
    best = []
    for task, methods in have.items():
        most = max(map(len, methods.values()))
        counted = {method: runs for method, runs in methods.items() if method != UNTRAINED and len(runs) >= most / 2}
        for method, own in sorted(methods.items()):
            used = set.intersection(*counted.values()) if method in counted else own
            rates: dict[float, list[Row]] = {}
            for row in sorted(rows, key=lambda row: row["seed"]):
                if (row["task"], row["method"]) == (task, method) and (row["rate"], row["seed"]) in used:
                    rates.setdefault(row["rate"], []).append(row)
            longest = max(map(len, rates.values()))
            whole = {rate: some for rate, some in rates.items() if len(some) == longest}
            rate = max(whole, key=lambda rate: mean(worth(row) for row in whole[rate]))
            best.append(((task, method), rate, whole[rate]))
    return best


def by_seed(some: list[Row], key: str) -> Scores:
    return pd.Series({row["seed"]: row[key] for row in some}, dtype=float)


def adaptive_table() -> str:
    """Runs whose ranks adapt beside constant ranks and AdaLoRA, at each rate."""
    file = RESULTS / "adaptive.json"
    found: dict[tuple[str, str], list[Row]] = {}
    for row in json.loads(file.read_text()) if file.exists() else []:
        found.setdefault((row["task"], row["method"]), []).append(row)
    rates = sorted({row["rate"] for some in found.values() for row in some})
    lines = []
    for (task, method), some in sorted(found.items(), key=lambda item: item[0]):
        trained = sorted({row["trained"] for row in some})
        count = f"{trained[0]:,}" + (f" to {trained[-1]:,}" if len(trained) > 1 else "")
        of_rates = [[row["score"] for row in some if row["rate"] == rate] for rate in rates]
        cells = [f"{words(scores)} ({len(scores)})" if scores else "" for scores in of_rates]
        lines.append([method, task, count, *cells])
    columns = ["method", "task", "trained at the end", *(f"at {rate:g} (seeds)" for rate in rates)]
    return markdown(lines, columns, left=2) if lines else NONE


def instruct_table() -> str:
    """Losses of conversations behind instruction tuning: the held-out ones choose, the official ones are reported."""
    best = runs_of("instruct.json", lambda row: -row["held_out"])
    losses = {method: by_seed(some, "official") for (_, method), _, some in best}
    lines = []
    for (_, method), rate, some in sorted(best, key=lambda one: one[2][0]["trained"]):
        gaps = [
            signed(paired(losses[method], losses[other])) if other in losses and other != method else ""
            for other in ("LoRA r=2", "LoRA r=16")
        ]
        lines.append([method, f"{some[0]['trained']:,}", words(losses[method]), *gaps, str(len(some)), f"{rate:g}"])
    columns = ["method", "trained", "loss", "to LoRA r=2", "to LoRA r=16", "seeds", "rate"]
    return markdown(lines, columns) if lines else NONE


def tuned(one: str, other: str) -> Scores | None:
    """How much lower the loss of conversations is behind instruction tuning by one method than by another."""
    best = runs_of("instruct.json", lambda row: -row["held_out"])
    losses = {method: by_seed(some, "official") for (_, method), _, some in best}
    return paired(losses[other], losses[one]) if one in losses and other in losses else None


def answers_table() -> str:
    """Tasks in words whose answers are texts: the held-out losses choose, the official scores are reported."""
    best = runs_of("answers.json", lambda row: -row["held_out"])
    scores = {key: by_seed(some, "official") for key, _, some in best}
    lines = []
    for (task, method), rate, some in sorted(best, key=lambda one: (one[0][0], one[2][0]["trained"])):
        gaps = [
            signed(paired(scores[task, method], scores[task, other]))
            if (task, other) in scores and other != method
            else ""
            for other in ("LoRA r=8", UNTRAINED)
        ]
        of_task = [task, METRICS[some[0]["metric"]], f"{some[0]['trained']:,}", words(scores[task, method])]
        lines.append([method, *of_task, *gaps, str(len(some)), "" if method == UNTRAINED else f"{rate:g}"])
    columns = ["method", "task", "score is", "trained", "score", "to LoRA r=8", "to untrained", "seeds", "rate"]
    return markdown(lines, columns, left=3) if lines else NONE
