"""Successive halving: the better quarter of the candidates goes on, again and again, until one is left.

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

from loretta.files import read_object, write_json
from loretta.record import RunRecord

QUARTER = 4
RUNGS = "rungs.json"  # in a run's folder: its score at each pause, and why it was stopped


@dataclass(frozen=True, slots=True)
class Rung:
    """A pause of ``candidates`` runs, after ``share`` of their steps."""

    share: float
    candidates: int


def rungs(candidates: int, warmup: float = 0.0) -> tuple[Rung, ...]:
    """The pauses in order. The one candidate that is left after the last pause is trained to its end.

    None lies within the share ``warmup`` of the steps, in which rates rise from 0: the first step changes nothing.
    """
    count = math.ceil(round(math.log(candidates, QUARTER), 9))
    pauses = [Rung(float(QUARTER) ** (k - count), -(-candidates // QUARTER**k)) for k in range(count)]
    behind = [pause for pause in pauses if pause.share > warmup] or pauses[-1:]
    return tuple(Rung(pause.share, pause.candidates if k else candidates) for k, pause in enumerate(behind))


def cost(candidates: int, warmup: float = 0.0) -> float:
    """Steps of a whole search, in units of one candidate's whole training."""
    shares, total = 0.0, 0.0
    for rung in rungs(candidates, warmup):
        total += rung.candidates * (rung.share - shares)
        shares = rung.share
    return total + 1 - shares


def note(folder: Path, share: float, paused: Any) -> None:
    """Note where a run paused and its score there; ``paused`` is a ``loretta.training.pause.Paused``."""
    content = _read(folder)
    content["reached"][str(share)] = dataclasses.asdict(paused)
    write_json(folder / RUNGS, content)


def reached(folder: Path, share: float) -> dict[str, Any] | None:
    """A run's score after a share of its steps, or at its end; None where it has not come that far."""
    found: dict[str, Any] | None = _read(folder)["reached"].get(str(share))
    if found is None and (folder / "run.json").is_file():
        record = RunRecord.load(folder / "run.json")  # it stopped early, or was trained before
        last = record.history[-1].step if record.history else 0
        found = record.model_dump(include={"validation", "metric", "higher_is_better"}) | {"step": last, "steps": last}
    return found


def stop(folder: Path, verdict: str) -> None:
    """Note why a run does not go on."""
    content = _read(folder)
    if content["stopped"] != verdict:
        write_json(folder / RUNGS, content | {"stopped": verdict})


def words(folder: Path) -> tuple[bool, str]:
    """Whether its search has stopped a run, and where the run stands in the search; "" where it is in none."""
    content = _read(folder)
    if content["stopped"]:
        return True, content["stopped"]
    if not content["reached"]:
        return False, ""
    last = max(content["reached"].values(), key=lambda at: at["step"])
    return False, f"at step {last['step']} of {last['steps']}, where it is compared with the other candidates"


def _read(folder: Path) -> dict[str, Any]:
    # without a file, or with a damaged one, the run is trained to its pauses again
    return {"reached": {}, "stopped": "", **(read_object(folder / RUNGS) or {})}


@dataclass(frozen=True, slots=True)
class Stand:
    """The search's decision on a candidate: train it to the share ``until`` (None: to its end), or why it stopped."""

    until: float | None
    stopped: str = ""


def search(
    folders: Sequence[Path],
    failed: Sequence[bool],
    merit: Callable[[dict[str, Any]], tuple[float, ...]],
    warmup: float = 0.0,
) -> list[Stand]:
    """Where each candidate stands, read off the folders of all; those that ``failed`` are not waited for.

    ``merit`` is a key for what :func:`reached` returns; larger is better. ``warmup`` as for :func:`rungs`.
    """
    alive = list(range(len(folders)))
    stands = [Stand(None) for _ in folders]
    pauses = rungs(len(folders), warmup)
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
            found = {name: at["validation"].get(name) for name in ("loss", at["metric"])}
            values = [f"{name} {value:.4g}" for name, value in found.items() if value is not None]
            words = ", ".join([f"{place} of {len(order)} at step {at['step']} of {at['steps']}", *values])
            stands[c] = Stand(rung.share, words)
        alive = order[:keep]
    for c in alive:
        stands[c] = Stand(None)
    return stands
