"""The forms of an adapter that were measured, and their scores, by which ``auto`` chooses.

``front.json`` beside this file is written by benchmarks/front.py from benchmarks/results/ (``make tables``).
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FRONT = Path(__file__).with_name("front.json")
Kind = Literal["encoder", "decoder"]
_MODES = {1: "one mode", 2: "two modes", 3: "three modes"}
MORE = 1.25  # a method with so many times the parameters of a form is compared with it: ranks lie a factor of 2 apart
# these stand among a form's options for the names that loretta.plan.auto finds in a model
ATTENTION = "linear layers of attention"
VALUES_AND_MLPS = "values and linear layers of MLPs"
_PLACES = {
    "all-linear": "on every linear layer",
    ATTENTION: "on every linear layer of attention",
    VALUES_AND_MLPS: "on the values and every linear layer of MLPs",
}


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Other(_Plain):
    """Another method on one model: its name, trained parameters without the head, and mean score over the tasks."""

    name: str
    count: int
    mean: float


class Measured(_Plain):
    """A model that forms were measured on, its width, the tasks, and the methods beside them."""

    kind: Kind
    width: int
    tasks: list[str]
    others: list[Other]


class Score(_Plain):
    """A form on one model: parameters without the head, mean score, and how far that is above LoRA of rank 1."""

    count: int
    mean: float
    gain: float


class Form(_Plain):
    """A method with options, and its score by model."""

    method: Literal["rep", "adp", "shared"]
    options: dict[str, Any]
    scores: dict[str, Score]

    @property
    def but_rank(self) -> tuple[Any, ...]:
        """What two forms have in common that differ in their rank alone: all else, and the scale at that rank."""
        options = {key: value for key, value in self.options.items() if key not in ("tensor_rank", "lora_alpha", "r")}
        scale = self.options.get("lora_alpha", 0) / self.options["tensor_rank"]
        return self.method, scale, sorted(map(repr, options.items()))

    @property
    def words(self) -> str:
        rank, modes = self.options["tensor_rank"], self.options.get("modes_per_side")
        shape = f"of {_MODES.get(modes, f'{modes} modes')} a side and rank {rank}" if modes else f"of rank {rank}"
        shape += " (which is LoRA)" if modes == 1 else ""
        places = "after attention and feed-forward" if self.method == "adp" else "on query and value"
        places = _PLACES.get(self.options.get("target_modules", ""), places)
        beside = ["the norms"] if self.options["train_norms"] else []
        if scaled := ["MLPs" if place == "mlp" else place for place in self.options.get("train_scales", [])]:
            beside.append(f"scales of {_enumerated(scaled)}")
        return f"{self.method} {shape} {places}" + (f" with {' and '.join(beside)}" if beside else "")


class Front(_Plain):
    """All forms and models. ``reference`` is the method that gains are counted from."""

    reference: str
    models: dict[str, Measured]
    forms: list[Form]

    def nearest(self, kind: Kind, width: int | None) -> str:
        """The measured model that is most like one of that kind and width."""
        return min(
            self.models,
            key=lambda name: (
                self.models[name].kind != kind,
                abs(math.log(self.models[name].width / width)) if width else 0.0,
            ),
        )

    def ranked(self, name: str) -> list[Form]:
        """The forms that were measured on the model of that name, from the best gain down."""
        return sorted((form for form in self.forms if name in form.scores), key=lambda form: -form.scores[name].gain)

    def why(self, form: Form, name: str) -> str:
        """The score of a form on a measured model, beside the best other method there with at most a quarter more
        parameters."""
        model, score = self.models[name], form.scores[name]
        fits = [other for other in model.others if other.count <= MORE * score.count]
        other = max(fits, key=lambda other: other.mean) if fits else min(model.others, key=lambda other: other.count)
        return (
            f"{form.words}: {short(score.mean)} with {score.count:,} parameters on {name} (mean of "
            f"{_enumerated(model.tasks)}), where {other.name} has {short(other.mean)} with {other.count:,}"
        )


@cache
def read_front() -> Front:
    """The measured front that the package carries."""
    return Front.model_validate_json(FRONT.read_text(encoding="utf-8"))


def _enumerated(words: Sequence[str]) -> str:
    """As "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def short(score: float) -> str:
    return f"{score:.3f}".replace("0.", ".", 1)
