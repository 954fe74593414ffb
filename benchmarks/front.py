"""Write src/loretta/plan/front.json, by which ``auto`` chooses a form, from the scores on held-out rows.

    python benchmarks/front.py

A row of a LoRETTA form has the package's config that makes it, where the modules of attention have the names of one
family of models. All other rows are what the forms are compared with; LoRA of rank 1 is a form as well, rep of one mode
a side.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import evidence
from board import Board, Row
from methods import TARGETS, WITH_SCALES

from loretta.plan.front import ATTENTION, FRONT, VALUES_AND_MLPS, Form, Front, Measured, Other, Score
from loretta.tuners.rep.config import COMPACT

FORMS, TASKS = 3, 2  # of a model at least; fewer are no choice
REFERENCE = "LoRA r=1"  # on query and value; what a form gains is counted from there
NAMES = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2", "stsb": "STS-B"} | {
    "cb-words": "CB by prompt",
    "sst2-words": "SST-2 by prompt",
    "stories": "the probability of a token",
}
ENCODERS = {"all-MiniLM-L6-v2": 384, "all-mpnet-base-v2": 768}
DECODERS = {"SmolLM2-135M-Instruct": 576}
TEXTS = "stories"  # of a decoder: its loss tells forms apart that answer alike
ONE_MODE = {"r": 1, "tensor_rank": 1, "modes_per_side": 1, "lora_alpha": 2}
SCALED = {method.name: method for method in WITH_SCALES if not method.factors}  # at the package's own rates
INNER = {name: COMPACT[name] for name in ("tensor_rank", "modes_per_side")}
# what the package calls the places of a run on any model; where it has no word no form of another model is the same
PLACES: dict[str, str] = {"all": "all-linear", "attention": ATTENTION, "v, MLP": VALUES_AND_MLPS}
AS_REP: dict[str, dict[str, Any]] = {
    "LoRA r=1 + norms": {**ONE_MODE, "train_norms": True},
    "LoRA r=1 all linear": {**ONE_MODE, "train_norms": False, "target_modules": "all-linear"},
    "LoRA r=1 all linear + norms": {**ONE_MODE, "train_norms": True, "target_modules": "all-linear"},
}


def options_of(row: Row) -> tuple[str, dict[str, Any]] | None:
    """The method of the package and its options on any model, where a row is of a form whose places have a word."""
    if row["method"] in AS_REP:
        return "rep", AS_REP[row["method"]]
    method = SCALED.get(row["method"])
    if method is not None:  # measured before the package had scales
        made, options = method.method, {**method.options, "train_norms": method.norms}
        options |= {} if method.targets is None else {"target_modules": PLACES.get(method.targets, ())}
    elif (config := row.get("config")) is not None:
        made, options = config["method"], dict(config["options"])
        for targets, place in PLACES.items():
            if options.get("target_modules") in TARGETS[targets].values():
                options["target_modules"] = place
    else:
        return None
    if not isinstance(options.get("target_modules"), str | None):
        return None
    if {name: options.get(name) for name in INNER} == INNER:
        options["even_rates"] = True  # the same at these ranks, and the same learning rate at those of a larger budget
    return made, options


def board_of(found: Sequence[Row], model: str) -> Board:
    """The scores of a model that a form is chosen by: of a decoder those on texts as well."""
    board = Board(found, model, "held_out")
    texts = model in DECODERS and TEXTS in board.tasks
    return Board(found, model, "held_out", [*board.common, TEXTS]) if texts else board


def front(found: Sequence[Row]) -> Front:
    """The front of measured forms: means over a model's common tasks, gains on the seeds that a form and LoRA have."""
    models: dict[str, Measured] = {}
    scores: dict[str, dict[str, Score]] = defaultdict(dict)
    options: dict[str, tuple[str, dict[str, Any]]] = {}
    for model, width in (ENCODERS | DECODERS).items():
        board = board_of(found, model)
        have = {method: float(of_seeds.mean()) for method, of_seeds in board.complete().items()}
        here = {row["method"]: made for row in board.rows if row["method"] in have and (made := options_of(row))}
        if REFERENCE not in have or len(here) < FORMS or len(board.common) < TASKS:
            continue
        named = [row["method"] for row in board.rows if row["family"] == "LoRETTA"]
        models[model] = Measured(
            kind="decoder" if model in DECODERS else "encoder",
            width=width,
            tasks=[NAMES.get(task, task) for task in sorted(board.common)],
            others=[
                Other(name=name, count=board.trained(name), mean=round(have[name], 4))
                for name in sorted(have, key=board.trained)
                # the head alone and the untrained model have no count to compare at
                if board.trained(name) and name not in named
            ],
        )
        options |= here
        for name in here:
            gap = board.gap(name, REFERENCE)
            assert gap is not None
            gain = round(float(gap.mean()), 4)
            scores[name][model] = Score(count=board.trained(name), mean=round(have[name], 4), gain=gain)
    return Front(
        reference=REFERENCE,
        models=models,
        forms=[Form(method=options[name][0], options=options[name][1], scores=scores[name]) for name in sorted(scores)],
    )


def in_lines(value: Any, indent: str = "") -> str:
    """JSON whose rows have a line each, so that a change of one shows as one: a form takes less than 600 characters."""
    whole = json.dumps(value)
    if len(whole) < 600:
        return whole
    inside = f"{indent} "
    if isinstance(value, list):
        parts, (first, last) = [in_lines(each, inside) for each in value], "[]"
    else:
        parts, (first, last) = [f"{json.dumps(key)}: {in_lines(value[key], inside)}" for key in value], "{}"
    return f"{first}\n{inside}" + f",\n{inside}".join(parts) + f"\n{indent}{last}"


def text() -> str:
    """The content of the file."""
    return in_lines(front(evidence.rows()).model_dump()) + "\n"


if __name__ == "__main__":
    FRONT.write_text(text(), encoding="utf-8")
    print(f"wrote {FRONT}")
