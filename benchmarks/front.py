"""Write src/loretta/plan/front.json, by which ``auto`` chooses a form, from the measured forms.

    python benchmarks/front.py

A row of a LoRETTA form has the package's config that makes it, or a name of ``OPTIONS``. All other rows are what the
forms are compared with. A form whose modules are named, as those of attention are, is for one family of models, and no
choice. A form counts on a model where all tasks were run that half of the forms there were run on.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from protocol import SEEN, chosen, same_seeds
from tables import RESULTS

from loretta.plan.front import FRONT, Form, Front, Measured, Other, Score

LEAST = 3  # forms of a model, and tasks; fewer are no choice
REFERENCE = "LoRA r=1"  # on query and value; what a form gains is counted from there
TASKS = {
    "boolq": "BoolQ", "cb": "CB", "cola": "CoLA", "copa": "COPA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2",
    "stsb": "STS-B",
}  # fmt: skip
WIDTHS = {"all-MiniLM-L6-v2": 384, "all-mpnet-base-v2": 768, "SmolLM2-135M": 576, "SmolLM2-135M-Instruct": 576}
DECODERS = {"SmolLM2-135M", "SmolLM2-135M-Instruct"}
# rep of one mode a side, measured as the LoRA that it is
ALSO_OTHERS = {"LoRA r=1 all linear", "LoRA r=1 all linear + norms"}


class Cell(NamedTuple):
    """One form or other method on one task: parameters without the head, and the mean at the best rate."""

    model: str
    later: bool
    task: str
    name: str
    count: int
    score: float
    options: tuple[str, dict[str, Any]] | None


def rep(inner: int, *, modes: int = 2, r: int = 1, **more: Any) -> dict[str, Any]:
    """Rep of long modes, with the scale of 2 that all measured forms have."""
    return {"r": r, "tensor_rank": inner, "modes_per_side": modes, "lora_alpha": 2 * inner, **more}


def shared(rank: int, **more: Any) -> dict[str, Any]:
    return {"tensor_rank": rank, "lora_alpha": 2 * rank, **more}


ALL, NORMS = {"target_modules": "all-linear"}, {"train_norms": True}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared over layers, r=4": ("shared", shared(4)),
    "shared over layers, r=8": ("shared", shared(8)),
    "shared over layers, r=16": ("shared", shared(16)),
    "shared over layers, r=32": ("shared", shared(32)),
    "shared r=2 all linear": ("shared", shared(2, **ALL)),
    "shared r=8 all linear": ("shared", shared(8, **ALL)),
    "shared r=8 + norms": ("shared", shared(8, **NORMS)),
    "rep 2 modes, inner 4, cut 1": ("rep", rep(4)),
    "rep 2 modes, inner 8, cut 1": ("rep", rep(8)),
    "rep 2 modes 2/1 all linear": ("rep", rep(2, **ALL)),
    "rep 2 modes 4/1 all linear": ("rep", rep(4, **ALL)),
    "rep 2 modes 8/1 all linear": ("rep", rep(8, **ALL)),
    "rep 2 modes 4/1 + norms": ("rep", rep(4, **NORMS)),
    "rep 2 modes 4/1 all linear + norms": ("rep", rep(4, **ALL, **NORMS)),
    "rep 1 modes, inner 1, cut 1": ("rep", rep(1, modes=1)),
    "LoRA r=1 (rep of one mode) + norms": ("rep", rep(1, modes=1, **NORMS)),
    # what LoRA of rank 1 is: one mode a side
    "LoRA r=1 all linear": ("rep", rep(1, modes=1, **ALL)),
    "LoRA r=1 all linear + norms": ("rep", rep(1, modes=1, **ALL, **NORMS)),
    "rep as published": ("rep", {"tensor_rank": 5}),
    "rep as published + norms": ("rep", {"tensor_rank": 5, **NORMS}),
    "rep as published all linear": ("rep", {"tensor_rank": 5, **ALL}),
    "adp": ("adp", {"tensor_rank": 5}),
    "adp + norms": ("adp", {"tensor_rank": 5, **NORMS}),
}


def cells(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells of rows of forms.json, and of the later format, which has the scores of the held-out rows apart."""
    found = []
    earlier = [row for row in rows if "form" in row]
    for row in (*earlier, *same_seeds([row for row in rows if "form" not in row])):
        if "form" in row:
            name, count, score = row["form"], row["count"], max(mean(seeds) for seeds in row["scores"].values())
        elif row["metric"] != "loss" and row.get("part", "front") == "front" and row["task"] not in SEEN:
            name, count, score = row["method"], row["trained"], mean(chosen(row, "held_out"))
        else:
            continue
        config = row.get("config")
        if config and isinstance(config["options"].get("target_modules"), list):
            continue
        options = (config["method"], config["options"]) if config else OPTIONS.get(name)
        if not math.isnan(score):
            found.append(Cell(row["model"], "form" not in row, row["task"], name, count, score, options))
    return found


def front(found: list[Cell]) -> Front:
    """The front of measured forms.

    Where as many cells of forms were measured on a model in the later format as in the earlier one, that alone counts.
    """
    runs_of = Counter((cell.model, cell.later) for cell in found if cell.options)
    named = {cell.model for cell in found if cell.later and cell.name == REFERENCE}
    later = {model for model in named if runs_of[model, True] >= runs_of[model, False]}
    found = [cell for cell in found if cell.later == (cell.model in later)]
    models: dict[str, Measured] = {}
    scores: dict[str, dict[str, Score]] = defaultdict(dict)
    # one form has a name in each format: it is its options
    made = {cell.name: (cell.options[0], {"train_norms": False, **cell.options[1]}) for cell in found if cell.options}
    forms_of = {name: json.dumps(options, sort_keys=True) for name, options in made.items()}
    for model in sorted({cell.model for cell in found}):
        here = [cell for cell in found if cell.model == model]
        forms = {cell.name for cell in here if cell.options}
        runs = Counter(cell.task for cell in here if cell.options)
        tasks = sorted(task for task in runs if 2 * runs[task] >= len(forms))
        by_form: dict[str, dict[str, Cell]] = defaultdict(dict)
        for cell in here:
            by_form[cell.name][cell.task] = cell
        means = {
            name: mean(by_task[task].score for task in tasks)
            for name, by_task in by_form.items()
            if tasks and by_task.keys() >= set(tasks)
        }
        if REFERENCE not in means or min(len(forms & means.keys()), len(tasks)) < LEAST:
            continue
        counts = {cell.name: cell.count for cell in here}
        models[model] = Measured(
            kind="decoder" if model in DECODERS else "encoder",
            width=WIDTHS[model],
            tasks=[TASKS.get(task.removesuffix("-words"), task) for task in tasks],
            others=[
                Other(name=name, count=counts[name], mean=round(means[name], 4))
                for name in sorted(means, key=lambda name: counts[name])
                # the head alone and the untrained model have no count to compare at
                if counts[name] and (name not in forms or name in ALSO_OTHERS)
            ],
        )
        for name in forms & means.keys():
            gain = means[name] - means[REFERENCE]
            scores[forms_of[name]][model] = Score(count=counts[name], mean=round(means[name], 4), gain=round(gain, 4))
    return Front(
        reference=REFERENCE,
        models=models,
        forms=[
            Form(method=made[name][0], options=made[name][1], scores=scores[form])
            for form, name in sorted({forms_of[name]: name for name in sorted(made)}.items(), key=lambda one: one[1])
            if form in scores
        ],
    )


def text() -> str:
    """The content of the file."""
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows = [row for content in contents if isinstance(content, list) for row in content if isinstance(row, dict)]
    measured = [
        row for row in rows if {"form", "scores"} <= row.keys() or {"family", "held_out", "rates"} <= row.keys()
    ]
    return json.dumps(front(cells(measured)).model_dump(), indent=1) + "\n"


if __name__ == "__main__":
    FRONT.write_text(text(), encoding="utf-8")
    print(f"wrote {FRONT}")
