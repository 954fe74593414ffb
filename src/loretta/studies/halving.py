"""Successive halving: of many candidates the better quarter goes on, again and again, until one is left.

All candidates are trained for a small share of their steps, on the schedule of the whole training; the better ones go
on from their checkpoints to four times that share. Source: Jamieson and Talwalkar, "Non-stochastic best arm
identification and hyperparameter optimization", AISTATS 2016; there the better half goes on.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.files import read_json, write_json
from loretta.record import RunRecord

QUARTER = 4
RUNGS = "rungs.json"  # in a run's folder: what it scored where it paused, and why it was stopped


@dataclass(frozen=True, slots=True)
class Rung:
    """Where ``candidates`` runs pause, behind ``share`` of their steps."""

    share: float
    candidates: int


def rungs(candidates: int) -> tuple[Rung, ...]:
    """The pauses, the first one first; the one candidate that is left behind them is trained to the end."""
    count = math.ceil(round(math.log(candidates, QUARTER), 9))
    return tuple(
        Rung(share=float(QUARTER) ** (k - count), candidates=-(-candidates // QUARTER**k)) for k in range(count)
    )


def cost(candidates: int) -> float:
    """Trained steps of the search, in trainings of one candidate to its end."""
    shares, total = 0.0, 0.0
    for rung in rungs(candidates):
        total += rung.candidates * (rung.share - shares)
        shares = rung.share
    return total + 1 - shares


def note(folder: Path, share: float, paused: Any) -> None:
    """Write down where a run paused and what it scored; ``paused`` is a ``loretta.training.pause.Paused``."""
    content = _read(folder)
    content["reached"][str(share)] = dataclasses.asdict(paused)
    write_json(folder / RUNGS, content)


def reached(folder: Path, share: float) -> dict[str, Any] | None:
    """What a run scored behind a share of its steps, or at its end; None where it was not there yet."""
    found: dict[str, Any] | None = _read(folder)["reached"].get(str(share))
    if found is None and (folder / "run.json").is_file():
        record = RunRecord.load(folder / "run.json")  # it stopped early, or was trained before
        last = record.history[-1].step if record.history else 0
        found = record.model_dump(include={"validation", "metric", "higher_is_better"}) | {"step": last, "steps": last}
    return found


def stop(folder: Path, verdict: str) -> None:
    """Write down why a run does not go on."""
    content = _read(folder)
    if content["stopped"] != verdict:
        write_json(folder / RUNGS, content | {"stopped": verdict})


def words(folder: Path) -> tuple[bool, str]:
    """Whether a run was stopped by its search, and how it stands in it; "" where it is in none."""
    content = _read(folder)
    if content["stopped"]:
        return True, content["stopped"]
    if not content["reached"]:
        return False, ""
    last = max(content["reached"].values(), key=lambda at: at["step"])
    return False, f"at step {last['step']} of {last['steps']}, where it is compared with the other candidates"


def _read(folder: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"reached": {}, "stopped": ""}
    try:
        return empty | dict(read_json(folder / RUNGS))
    except (OSError, ValueError, TypeError):
        return empty  # none, or a damaged one: the run goes there again


@dataclass(frozen=True, slots=True)
class Stand:
    """What the search decided on a candidate: how far to train it, or why it was stopped.

    ``until`` is None for one that is trained to its end.
    """

    until: float | None
    stopped: str = ""


def search(
    folders: Sequence[Path], failed: Sequence[bool], merit: Callable[[dict[str, Any]], tuple[float, ...]]
) -> list[Stand]:
    """Where each candidate stands, read off the folders of all.

    Args:
        failed: those that ended with an error, for which the others do not wait.
        merit: of what :func:`reached` gives; larger is better.
    """
    alive = list(range(len(folders)))
    stands = [Stand(None) for _ in folders]
    pauses = rungs(len(folders))
    for k, rung in enumerate(pauses):
        scores = {c: reached(folders[c], rung.share) for c in alive}
        for c in alive:
            stands[c] = Stand(rung.share)
        if any(scores[c] is None and not failed[c] for c in alive):
            return stands
        alive = [c for c in alive if scores[c] is not None]
        order = sorted(alive, key=lambda c: (merit(scores[c] or {}), -c), reverse=True)
        keep = pauses[k + 1].candidates if k + 1 < len(pauses) else 1
        for place, c in enumerate(order[keep:], keep + 1):
            at = scores[c] or {}
            value = at["validation"].get(at["metric"], at["validation"].get("loss", math.nan))
            words = f"{place} of {len(order)} at step {at['step']} of {at['steps']}, {at['metric']} {value:.4g}"
            stands[c] = Stand(rung.share, words)
        alive = order[:keep]
    for c in alive:
        stands[c] = Stand(None)
    return stands
