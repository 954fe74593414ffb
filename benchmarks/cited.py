"""What the prose of the evidence cites: cells of the pages' generated tables, and figures of the result files."""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import evidence
from board import Board, paired, verdict
from protocol import SEEN, interval
from rates import SECOND
from retention import REFERENCE, SHORT, average, forgetting_rows
from tables import RESULTS, ROOT
from verdicts import MODELS

from loretta.plan import make_plan

PAGE, CHOOSING, README = ROOT / "RESULTS.md", ROOT / "docs" / "choosing.md", ROOT / "README.md"
MADE = re.compile(r"<!-- ([^:\n]+): make tables -->\n(.*?)<!-- end of \1 -->", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of a generated table: the cell of each column, and the words that say what it is of."""

    cells: dict[str, str]
    words: frozenset[str]


@cache
def lines(page: Path, section: str) -> tuple[Line, ...]:
    """The rows of a section's tables. Their words are the cells, and the first words of the headings above them."""
    text = dict(MADE.findall(page.read_text()))[section]
    found, above, columns = [], {}, []
    for line in text.splitlines():
        if heading := re.match(r"(#+|\*\*)\s*([\w-]+)", line):
            depth = len(heading[1])
            above = {level: word for level, word in above.items() if level < depth} | {depth: heading[2]}
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip().strip("*").replace("`", "") for cell in line.strip("|").split("|")]
        if not columns:
            columns = cells
        elif not line.startswith("|:"):
            words = frozenset([*cells, *above.values()])
            found.append(Line(cells=dict(zip(columns, cells, strict=True)), words=words))
    return tuple(found)


def cells(page: Path, section: str, column: str, *words: str) -> list[str]:
    """The cells of a column, or of those that begin so, in the rows with all of these words."""
    found = []
    for line in lines(page, section):
        if set(words) <= line.words:
            named = [column] if column in line.cells else [name for name in line.cells if name.startswith(column)]
            found += [line.cells[name] for name in named if line.cells[name]]
    return found


def number(text: str) -> float:
    """The first figure of a cell: "below (-0.029 ± 0.012)" is -0.029."""
    found = re.search(r"[+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?", text)
    assert found, text
    return float(found[0].replace(",", ""))


def counted(text: str) -> float:
    """The parameters that a cell has in brackets."""
    return number(text.rpartition("(")[2])


def cell(page: Path, section: str, column: str, *words: str) -> str:
    """The only one of these cells. Raises ValueError where there are more or none."""
    found = cells(page, section, column, *words)
    if len(found) != 1:
        raise ValueError(f"{page.name}, {section!r}: {len(found)} cells of {column!r} for {', '.join(words)}")
    return found[0]


def official(section: str, column: str, *words: str) -> float:
    """A figure of RESULTS.md."""
    return number(cell(PAGE, section, column, *words))


def held_out(section: str, column: str, *words: str) -> float:
    """The same of docs/choosing.md."""
    return number(cell(CHOOSING, section, column, *words))


@cache
def front() -> list[dict[str, Any]]:
    return evidence.rows()


@cache
def board(which: str, model: str, tasks: tuple[str, ...]) -> Board:
    (name,) = (name for name, shown in MODELS.items() if shown.startswith(model))
    return Board(front(), name, which, tasks)


def gap(which: str, model: str, one: str, other: str, *tasks: str) -> tuple[float, float]:
    """By how much the mean of one method is above another's, and half of its interval.

    ``which`` are "official" or "held_out" rows.
    """
    found = board(which, model, tasks).gap(one, other)
    assert found is not None, (model, one, other)
    return interval(found)


def verdict_of(which: str, model: str, one: str, other: str, *tasks: str) -> str:
    """Whether the one is "better", "worse" or "level" in the mean."""
    found = board(which, model, tasks).gap(one, other)
    assert found is not None, (model, one, other)
    return verdict(found)


def ours(model: str) -> list[str]:
    """LoRETTA's forms that have all tasks of a model's means."""
    found = board("official", model, ())
    return [name for name in found.complete() if found.family(name) == "LoRETTA"]


def less(difference: tuple[float, float]) -> tuple[float, float]:
    """A difference where the sentence says by how much the one is below the other."""
    return -difference[0], difference[1]


def pair(page: Path, section: str, column: str, *words: str) -> tuple[float, float]:
    """The figure of a cell and half of its interval."""
    middle, _, half = cell(page, section, column, *words).partition(" ± ")
    return number(middle), number(half)


def beaten(model: str, task: str) -> tuple[int, int]:
    """How many of LoRETTA's forms are worse than LoRA r=8 on a task's official rows, and how many there are."""
    rows = [
        line.cells["method"] for line in lines(PAGE, "tables") if {model, task} <= line.words and "method" in line.cells
    ]
    ours = [name for name in rows if name.startswith(("shared", "compact", "rep", "adp"))]
    of_model = re.split(r"^### ", dict(MADE.findall(PAGE.read_text()))["tables"], flags=re.MULTILINE)
    (text,) = (part for part in of_model if part.startswith(model))
    (said,) = re.findall(rf"^#### {task}\n\n.*?than LoRA r=8(: .*?[;.])(?: |$)", text, re.MULTILINE)
    return sum(bool(re.search(rf"[:,] {re.escape(name)}[,;.]", said)) for name in ours), len(ours)


def shares() -> list[float]:
    """What compact with norms trains of LoRA r=8's parameters, on each model."""
    found = " ".join(cells(PAGE, "at a glance", "", "compact with norms, the default"))
    return [int(share) / 100 for share in re.findall(r"(\d+)%", found)]


def risen(method: str) -> float:
    """By how much the held-out loss rises in 30 epochs, in the mean of MiniLM's tasks."""
    return mean(map(number, cells(PAGE, "overfitting", "risen by", method, "MiniLM")))


@cache
def rows_of(file: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / file).read_text())


def trained_on(task: str) -> float:
    return next(
        row["rows"]["train"] + row["rows"]["held_out"] for row in rows_of("forms_minilm.json") if row["task"] == task
    )


def scored(task: str) -> float:
    """The official validation rows of a task."""
    return next(row["rows"]["official"] for row in rows_of("forms_minilm.json") if row["task"] == task)


def epochs(model: str) -> float:
    """Of CoLA on an encoder's front."""
    file = {"all-MiniLM-L6-v2": "forms_minilm.json", "all-mpnet-base-v2": "forms_mpnet.json"}[model]
    front = [row for row in rows_of(file) if row.get("part", "front") == "front"]
    return next(row["epochs"] for row in front if row["task"] == "cola")


def rank(form: str, of: int, model: str) -> tuple[float, float]:
    """The held-out score and the parameters of a form at a rank, on the first task of the table of ranks."""
    task = "sst2-words" if model == "SmolLM2" else "cola"
    one = cell(PAGE, "ranks", f"rank {of}", form, model, task)
    return number(one), counted(one)


def gained(form: str) -> tuple[float, float, float]:
    """Of MPNet's scores at rank 1 and at rank 32, and how many times as many parameters the latter has."""
    (low, few), (high, many) = rank(form, 1, "MPNet"), rank(form, 32, "MPNet")
    return low, high, many / few


def fallen(rate: str, *methods: str) -> tuple[int, int]:
    """Of MPNet's cells of CoLA, MRPC and STS-B at a rate those where a seed is .15 or more below the best median.

    The cells are those of the methods, or of all.
    """
    failed = []
    for row in rows_of("forms_mpnet.json"):
        if methods and row["method"] not in methods:
            continue
        if row.get("part", "front") == "front" and row["task"] in ("cola", "mrpc", "stsb") and rate in row["held_out"]:
            scores = {at: [-math.inf if x is None else x for x in of_seeds] for at, of_seeds in row["held_out"].items()}
            failed.append(min(scores[rate]) < max(map(median, scores.values())) - 0.15)
    return sum(failed), len(failed)


def searched(file: str, *methods: str) -> tuple[float, ...]:
    """Of each method the best of the six rates of its search, and its parameters."""
    found = []
    for method in methods:
        (row,) = (row for row in rows_of(file) if row.get("part") == "rates" and row["method"].startswith(method))
        found += [max(mean(x or 0 for x in scores) for scores in row["held_out"].values()), row["trained"]]
    return tuple(found)


def first(form: str, column: str) -> float:
    """A figure of the first round on MiniLM."""
    return held_out("MiniLM", column, form)


def run(column: str, method: str) -> float:
    """A figure of the runs with cores measured, behind 10 steps."""
    (one,) = (
        line.cells[column]
        for line in lines(CHOOSING, "conditioning")
        if {method} <= line.words and column in line.cells
    )
    return number(one)


def planned(method: str, *options: str) -> int:
    """The cores of a method on LLaMA-2-7B's query and value."""
    plan = make_plan(model="llama-2-7b", method=method, sets=["train_norms=false", *options]).plan
    assert plan is not None
    return plan.cores


def tiny(task: str) -> float:
    """TinyLoRA's score on held-out rows of MiniLM, which no table has."""
    rows = [row for row in rows_of("peers_minilm.json") if row["method"].startswith("TinyLoRA") and row["task"] == task]
    return max(mean(scores) for scores in rows[0]["held_out"].values())


def curves() -> list[dict[str, str]]:
    """The lines of score against rate, with the peak of each."""
    return [line.cells for line in lines(CHOOSING, "rates") if "peak" in line.cells]


def both_encoders() -> list[tuple[float, float]]:
    """The peaks of one form at one rank on MiniLM and on MPNet, where both lie within their grids."""
    found = [cells for cells in curves() if cells["task"] == "cola" and cells["peak"][0] not in "≤≥"]
    minilm, mpnet = (
        {cells["form"]: number(cells["peak"]) for cells in found if cells["model"] == model}
        for model in ("MiniLM", "MPNet")
    )
    return [(minilm[form], mpnet[form]) for form in minilm.keys() & mpnet.keys()]


def by_order(form: str, model: str) -> tuple[float, float]:
    """How far a form ends below LoRA r=8 in one order of three tasks, and how far above it in another, at most."""
    one, other = (
        next(row for row in forgetting_rows() if SHORT[row["model"]] == model and row["method"] == method)
        for method in (form, REFERENCE)
    )
    gaps = [float(paired(average(one, [order]), average(other, [order])).mean()) for order in one["scores"]]
    return -min(gaps), max(gaps)


def fronts(file: str, *, seen: bool) -> list[dict[str, Any]]:
    """The cells of an encoder's or the decoder's front, of ours and of PEFT's methods: on texts it has met, or not."""
    found = [*rows_of(f"forms_{file}.json"), *rows_of(f"peers_{file}.json")]
    return [row for row in found if row["part"] == "front" and (row["task"] in SEEN) == seen]


def core(column: str, method: str, name: str, behind: int = 0) -> float:
    """A figure of one core behind 10 steps, or of ``behind`` = 1 behind 100."""
    one = cell(CHOOSING, "conditioning", column, method, name)
    return number(one.split(" / ")[behind])


def tuned(rate: float) -> float:
    """LoRA r=2's loss on held-out rows of the instruction tuning."""
    return mean(
        row["held_out"] for row in rows_of("instruct.json") if (row["method"], row["rate"]) == ("LoRA r=2", rate)
    )


# the forms where one learning rate is to serve all ranks, of which rank 1 needs no rule
RULED = {
    "LoRA": r"LoRA r=1|LoRA\^0\.75 r=\d+",
    "shared": r"shared r=1|shared\^0\.75 r=\d+",
    "compact": r"compact|compact cores\^1 r=\d+",
}


def ruled(model: str, *forms: str, times: str = "", second: bool = False) -> list[dict[str, str]]:
    """The curves of score against rate of these ``forms`` at all ranks, by the rule of each.

    ``times`` are those of its scale, as in "x2.8". ``second`` are those of the second task.
    """
    found = [cells for cells in curves() if cells["model"] == model and (cells["task"] == SECOND) == second]
    scaled = [(cells, *re.fullmatch(r"(\w+)(?: (x[\d.]+))?(.*)", cells["form"]).groups()) for cells in found]
    return [
        cells
        for cells, form, factor, rest in scaled
        if (factor or "") == times and form in forms and re.fullmatch(RULED[form], form + rest)
    ]


def ruled_peaks(model: str, *forms: str, times: str = "", second: bool = False) -> list[float]:
    """The learning rates at which these forms are best, or all."""
    return [number(cells["peak"]) for cells in ruled(model, *(forms or RULED), times=times, second=second)]
