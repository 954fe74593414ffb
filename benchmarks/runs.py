"""Tables of runs that were made one at a time: ranks that adapt, instruction tuning, answers in words."""

import json
import math
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import pandas as pd
from board import Row, Scores, markdown, paired, signed, words
from methods import METHODS, UNTRAINED
from protocol import METRICS, alike, read_rows
from tables import RESULTS

NONE = "Not measured yet.\n"
Best = tuple[tuple[str, str], float, list[Row]]  # a task and a method, the chosen rate, its runs by seed

SEEDS_OF_TWO = 3  # that both rates have


def by_rate(name: str) -> dict[str, dict[str, dict[float, list[Row]]]]:
    """The runs of a file by task, method and rate, in the order of their seeds."""
    found: dict[str, dict[str, dict[float, list[Row]]]] = {}
    for row in sorted(alike(read_rows([RESULTS / name])), key=lambda row: row["seed"]):
        found.setdefault(row["task"], {}).setdefault(row["method"], {}).setdefault(row["rate"], []).append(row)
    return found


def runs_of(name: str, worth: Callable[[Row], float]) -> list[Best]:
    """The runs of a file by task and method, at the rate whose seeds are worth the most.

    A method has the seeds that its rates have in common, and all trained methods of a task as many rates, those nearest
    the middle of their grids, so that none is chosen from more.
    """
    best = []
    for task, methods in by_rate(name).items():
        whole = {method: _whole(rates) for method, rates in methods.items()}
        least = min((len(rates) for method, rates in whole.items() if method != UNTRAINED), default=1)
        for method, rates in sorted(whole.items()):
            middle = METHODS[method].middle
            near = sorted(rates, key=lambda rate: abs(math.log(rate / middle)))[:least]
            rate = max(near, key=lambda rate: mean(worth(row) for row in rates[rate]))
            best.append(((task, method), rate, rates[rate]))
    return best


def _whole(rates: dict[float, list[Row]]) -> dict[float, list[Row]]:
    """The rates of three seeds or more with the seeds that all of them have, the lowest first.

    So a seed that is run at some of the rates alone changes no choice. Where no rate has three, those with the most
    count.
    """
    enough = min(SEEDS_OF_TWO, max(map(len, rates.values())))
    found = {rate: some for rate, some in rates.items() if len(some) >= enough}
    seeds = set.intersection(*({row["seed"] for row in some} for some in found.values()))
    return {rate: [row for row in found[rate] if row["seed"] in seeds] for rate in sorted(found)}


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


GOAL, AHEAD = 3.0, 10  # the loss that learners are timed to, as the mean of so many steps


def steps_to_goal(losses: list[float]) -> int | None:
    """Behind how many steps the mean of the last ones is at the goal; None where it never is."""
    means = ((step, mean(losses[step - AHEAD : step])) for step in range(AHEAD, len(losses) + 1))
    return next((step for step, loss in means if loss <= GOAL), None)


def conditioning_tables() -> str:
    """What conditioning.py measured of each method and of its cores, at the best of the rates that all methods have."""
    file = RESULTS / "conditioning.json"
    found: dict[str, dict[float, list[Row]]] = {}
    for row in sorted(json.loads(file.read_text()) if file.exists() else [], key=lambda row: row["seed"]):
        found.setdefault(row["method"], {}).setdefault(row["rate"], []).append(row)
    if not found:
        return NONE
    common = set.intersection(*(set(rates) for rates in found.values()))
    best = {m: min((rates[rate] for rate in common), key=lambda some: some[0]["loss"]) for m, rates in found.items()}
    middle, end = "10", str(max(map(int, next(iter(best.values()))[0]["points"])))

    def both(of: Callable[[dict[str, Any]], float | None], some: list[Row]) -> str:
        steps = [[of(row["points"][step]) for row in some] for step in (middle, end)]
        return " / ".join(f"{median(values):.3g}" for values in steps if None not in values)

    methods, cores = [], []
    for name, some in best.items():
        whole = [both(lambda point, key=key: point[key], some) for key in ("weights", "reach", "cosine")]
        share = both(lambda point: point["cosine"] / point["reach"] if point["reach"] else None, some)
        steps = ", ".join(str(steps_to_goal(row["losses"]) or "never") for row in some)
        rate = some[0]["rate"]
        others = [f"{words([r['loss'] for r in of], 2)} at {k:g}" for k, of in found[name].items() if k != rate]
        losses = words([row["loss"] for row in some], 2)
        methods.append(
            [
                name,
                f"{some[0]['trained']:,}",
                losses,
                steps,
                *whole,
                share,
                f"{rate:g}",
                ", ".join(others),
                str(len(some)),
            ]
        )
        for role in some[0]["points"][end]["cores"]:
            columns = ("gradient", "condition", "idle", "descent", "adam", "used")
            cells = [both(lambda point, r=role, c=column: point["cores"][r][c], some) for column in columns]
            cores.append([name, role, *cells])
    goal = f"steps to {GOAL:g}"
    titles = [
        "method",
        "trained",
        "loss",
        goal,
        "weights",
        "reach",
        "cosine",
        "cosine / reach",
        "rate",
        "other",
        "seeds",
    ]
    core_titles = ["method", "core", "gradient", "condition", "idle", "descent moves", "Adam moves", "used"]
    at = f"Medians over the seeds, behind {middle} / {end} steps:\n\n"
    return f"{at}{markdown(methods, titles)}\n{markdown(cores, core_titles, left=2)}"


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


def two_rates_table() -> str:
    """Where a task with answers was run at two rates: what the held-out loss chooses, and what is chosen then."""
    lines = []
    for task, methods in sorted(by_rate("answers.json").items()):
        whole = {method: _whole(rates) for method, rates in methods.items()}
        both = {
            method: rates
            for method, rates in whole.items()
            if len(rates) == 2 and all(len(some) >= SEEDS_OF_TWO for some in rates.values())
        }
        taken = {method: min(rates, key=lambda rate: _loss(rates[rate])) for method, rates in both.items()}
        at_best = {method: by_seed(both[method][rate], "official") for method, rate in taken.items()}
        for method, rate in sorted(taken.items(), key=lambda one: both[one[0]][one[1]][0]["trained"]):
            cells = [f"{words(by_seed(some, 'official'))} ({_loss(some):.3f})" for some in both[method].values()]
            gap = "" if method == "LoRA r=8" else signed(paired(at_best[method], at_best["LoRA r=8"]))
            lines.append([method, task, *cells, f"{rate:g}", gap])
    columns = ["method", "task", "at the lower rate (loss)", "at the higher rate (loss)", "the loss takes"]
    return markdown(lines, [*columns, "then to LoRA r=8"], left=2) if lines else NONE


def _loss(some: list[Row]) -> float:
    return mean(row["held_out"] for row in some)
