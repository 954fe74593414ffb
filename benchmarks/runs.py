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


# what a run whose ranks adapt is compared with
BESIDE = {"one mode": ("one mode, rank 2", "AdaLoRA 4 to 2"), "compact": ("compact, rank 5", "AdaLoRA 4 to 2")}


def adaptive_table() -> str:
    """Runs whose ranks adapt beside constant ranks and AdaLoRA."""
    best = runs_of("adaptive.json", lambda row: row["score"])
    scores = {key: by_seed(some, "score") for key, _, some in best}
    lines = []
    for (task, method), rate, some in best:
        trained = sorted({row["trained"] for row in some})
        count = f"{trained[0]:,}" + (f" to {trained[-1]:,}" if len(trained) > 1 else "")
        others = BESIDE[method.partition(",")[0]] if "adaptive" in method else ()
        gaps = [signed(paired(scores[task, method], scores[task, o])) if (task, o) in scores else "" for o in others]
        of_runs = [words(scores[task, method]), *(gaps or ["", ""]), str(len(some)), f"{rate:g}"]
        lines.append([method, task, count, *of_runs])
    columns = ["method", "task", "trained at the end", "held-out score", "to constant", "to AdaLoRA", "seeds", "rate"]
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
