"""What the paper claims, and what came out."""

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial

from board import Board, Row, Scores, markdown, paired, signed, verdict, words
from protocol import CONSTANT, SEEN, TASKS, best_rate, by_seed, interval, mean_by_seed
from retention import forgetting_rows, kept, risen
from runs import tuned

MODELS = {
    "all-MiniLM-L6-v2": "MiniLM (width 384, 22.7M)",
    "all-mpnet-base-v2": "MPNet (width 768, 109.5M)",
    "SmolLM2-135M-Instruct": "SmolLM2 (width 576, 134.5M)",
}
MARGIN = 0.02  # "as good as": the whole interval lies above minus this
OPEN = "open: not run"
SIZES = (5_000, 10_000, 20_000, 40_000, 80_000)

OURS = "not the paper's"
# a claim, what it is of, and what that is compared with
CLAIMS = (
    ("adp with norms is as good as LoRA r=8 with fewer parameters (Table 1)", "adp + norms", "LoRA r=8"),
    ("rep with norms, as published, is as good as LoRA r=8 with fewer parameters (Table 1)", "rep + norms", "LoRA r=8"),
    ("rep as published, norms frozen, is worth its parameters: at least LoRA r=1", "rep", "LoRA r=1"),
    ("rep's trains add to what the trained norms do alone (Table 11)", "rep + norms", "norms"),
    ("trained norms add to rep (Table 11)", "rep + norms", "rep"),
    ("not the paper's: compact, the default of `loretta train`, is as good as LoRA r=8", "compact + norms", "LoRA r=8"),
    ("not the paper's: one train for all layers is as good as LoRA r=8", "shared r=4 + norms", "LoRA r=8"),
)

TUNED = (
    ("not the paper's: instruction tuning by compact is as good as by LoRA of as many parameters", "LoRA r=2"),
    ("not the paper's: instruction tuning by compact is as good as by LoRA of 7.5 times as many", "LoRA r=16"),
)


def claims(found: Sequence[Row]) -> str:
    """Confirmed, refuted or open, for each claim and model."""
    boards = {model: Board(found, model, "official") for model in MODELS}
    lines = []
    for claim, one, other in CLAIMS:
        cells = []
        for board in boards.values():
            gap = board.gap(one, other)
            strictly = "add" in claim
            cells.append(OPEN if gap is None else said(gap, 0.0 if strictly else MARGIN, strictly=strictly))
        lines.append([claim, *cells])
    for claim, make in (
        (
            "adp and rep with norms are as good as LoRA r=8 on QNLI, MNLI and QQP (Table 1)",
            partial(_on_larger, forms=("adp + norms", "rep + norms")),
        ),
        (
            "not the paper's: compact with norms is as good as LoRA r=8 on QNLI, MNLI and QQP",
            partial(_on_larger, forms=("compact + norms",)),
        ),
        ("adp and rep keep more of three tasks learned in turn than LoRA r=8 (Table 4)", _kept),
        ("adp and rep keep more of other texts than LoRA r=8, after SST-2 and CB by words", _read),
        ("the held-out loss of adp and rep rises less than LoRA r=8's in 30 epochs (Figure 4)", _risen),
    ):
        lines.append([claim, *(make(found, model) for model in MODELS)])
    for claim, other in TUNED:
        gaps = tuned("compact + norms", other)
        lines.append([claim, "", "", OPEN if gaps is None else said(gaps, MARGIN, strictly=False)])
    lines.sort(key=lambda line: line[0].startswith(OURS))
    said_of = {ours: ", ".join(cell for line in lines if line[0].startswith(OURS) == ours for cell in line[1:])
               for ours in (False, True)}  # fmt: skip
    counted = [
        ", ".join(f"{len(re.findall(word, some))} *{word}*" for word in ("refuted", "confirmed", "open"))
        for some in said_of.values()
    ]
    counts = f"Verdicts on the paper's claims: {counted[0]}. On those that are not the paper's: {counted[1]}."
    return f"{counts}\n\n" + markdown(lines, ["claim", *(shown.partition(" ")[0] for shown in MODELS.values())], left=4)


def _on_larger(found: Sequence[Row], model: str, forms: Sequence[str]) -> str:
    """What is said of some forms in the mean of the tasks whose texts the encoders have met."""
    board = Board(found, model, "official", SEEN)
    gaps = {name: board.gap(name, "LoRA r=8") for name in forms}
    told = [
        f"{name.partition(' ')[0] + ' ' if forms[1:] else ''}{said(gap, MARGIN, strictly=False)}"
        for name, gap in gaps.items()
        if gap is not None
    ]
    return ", ".join(told) or ("" if model.startswith("SmolLM2") else OPEN)


def said(difference: Collection[float], margin: float, *, strictly: bool) -> str:
    middle, half = interval(difference)
    if strictly:
        word = {"better": "confirmed", "worse": "refuted", "level": "open"}[verdict(difference)]
    else:
        below = middle + half < 0
        word = "confirmed" if middle - half >= -margin else "refuted" if below else "open"
        word += ", but below" if below and word == "confirmed" else ""
    return f"{word} ({signed(difference)})"


def _both(rows: dict[str, Row], gain: Callable[[Row, Row], Scores]) -> str:
    """What is said of adp and of rep, by what each gains over LoRA r=8."""
    if "LoRA r=8" not in rows:
        return OPEN
    words = []
    for method in ("adp + norms", "rep + norms"):
        if method in rows:
            gains = gain(rows[method], rows["LoRA r=8"])
            words.append(f"{method.partition(' ')[0]} {said(gains, 0.0, strictly=True)}")
    return ", ".join(words) or OPEN


def _kept(found: Sequence[Row], model: str) -> str:
    rows = {row["method"]: row for row in forgetting_rows() if row["model"] == model}
    return "" if model.startswith("SmolLM2") else _both(rows, kept)


def _read(found: Sequence[Row], model: str) -> str:
    """What is said of the loss on texts of WikiText behind a training, in the mean of two tasks."""
    tasks: dict[str, list[Row]] = {}
    for row in found:
        if row["model"] == model and row.get("part", "front") == "front" and row["task"] in ("sst2-words", "cb-words"):
            tasks.setdefault(row["method"], []).append(row)
    whole = {method: some for method, some in tasks.items() if len(some) == 2}
    if not whole:
        return ""

    def loss(row: Row) -> Scores:
        return mean_by_seed([by_seed(one, one["wiki"][best_rate(one)]) for one in whole[row["method"]]])

    return _both({method: some[0] for method, some in whole.items()}, lambda row, other: paired(loss(other), loss(row)))


def _risen(found: Sequence[Row], model: str) -> str:
    rows = [row for row in found if row["model"] == model and row.get("part") == "long" and "losses" in row]
    of_tasks: dict[str, list[Row]] = {}
    for row in rows:
        of_tasks.setdefault(row["method"], []).append(row)
    most = max(map(len, of_tasks.values()), default=0)
    whole = {method: some for method, some in of_tasks.items() if len(some) == most}

    def loss(row: Row) -> Scores:
        return mean_by_seed([risen(one) for one in whole[row["method"]]])

    if model.startswith("SmolLM2"):
        return ""
    return _both({method: some[0] for method, some in whole.items()}, lambda row, other: paired(loss(other), loss(row)))


def verdict_sentence(model: str, task: str, found: Sequence[Row]) -> str:
    """Which forms lose on a task, and whether one of them is the best of all; what is lost stands first."""
    board = Board(found, model, "official")
    of_task = board.among([method for method in board.methods if (method, task) in board.cells])
    here = {method: of_task.scores(method, task) for method in of_task.methods}
    sign = -1 if TASKS[task].metric == "loss" else 1
    here = {method: sign * scores for method, scores in here.items() if not scores.isna().any()}
    ours = [method for method in here if board.family(method) == "LoRETTA"]
    others = [method for method in here if board.family(method) != "LoRETTA"]
    if not ours or not others:
        return ""
    best, other = (max(group, key=lambda name: here[name].mean()) for group in (ours, others))
    difference = sign * board.gap_on(task, best, other)
    what = {"better": "LoRETTA wins", "worse": "LoRETTA loses", "level": "LoRETTA's best is level with the best"}
    of_best = (
        f"{what[verdict(difference)]} here: {best} ({board.trained(best):,}) has {sign * here[best].mean():.3f}, "
        f"{other} ({board.trained(other):,}) {sign * here[other].mean():.3f}; the paired difference in favour of "
        f"LoRETTA is {signed(difference)}."
    )
    lost = []
    for name, shown in (("LoRA r=8", "LoRA r=8"), ("norms", "the norms alone")):
        below = [
            method for method in ours if name in here and verdict(sign * board.gap_on(task, method, name)) == "worse"
        ]
        if below:
            lost.append(f"than {shown}: {', '.join(below)}")
    of_all = f"Worse by more than the interval {'; '.join(lost)}." if lost else ""
    if task in CONSTANT and not any(mean - half > CONSTANT[task] for mean, half in map(interval, here.values())):
        of_all = (
            f"No method is above the constant answer ({CONSTANT[task]}) by its interval: this task says nothing here."
        )
    if "LoRA r=8" not in of_task.methods:
        of_best += " LoRA r=8 was not run here."
    return " ".join([of_best, of_all] if verdict(difference) == "worse" else [of_all, of_best]).strip()


def sizes_sentence(board: Board) -> str:
    """At which sizes the best form of LoRETTA loses to the best other method, and at which it wins."""
    found: dict[str, list[str]] = {"worse": [], "better": [], "level": []}
    for size in SIZES:
        best, other = board.best_within(size)
        gap = None if best is None or other is None else board.gap(best, other)
        if gap is not None:
            found[verdict(gap)].append(f"{size:,}")
    words = {"worse": "loses at", "better": "wins at", "level": "is level with the best at"}
    said = [f"{words[word]} {', '.join(sizes)}" for word, sizes in found.items() if sizes]
    return f"In the mean LoRETTA {' and '.join(said)} parameters." if said else ""


def bar(found: Sequence[Row]) -> str:
    """The cells of model and size: what LoRETTA's best form is beside the best of all other methods."""
    lines, counts, higher = [], dict.fromkeys(("better", "level", "worse", "not measured"), 0), 0
    for model, shown in MODELS.items():
        board = Board(found, model, "held_out")
        cells = []
        for size in SIZES:
            best, other = board.best_within(size)
            gap = None if best is None or other is None else board.gap(best, other)
            if gap is None:
                counts["not measured"] += 1
                cells.append("")
                continue
            counts[verdict(gap)] += 1
            higher += interval(gap)[0] > 0
            cells.append(f"{verdict(gap)} ({signed(gap)})")
        lines.append([shown.partition(" ")[0], *cells])
    words = ", ".join(f"{count} {word}" for word, count in counts.items())
    words += f". In {higher} the best form has the higher mean"
    return f"Of {sum(counts.values())} cells: {words}.\n\n{markdown(lines, ['model', *(f'{n:,}' for n in SIZES)])}"


IN_SHORT = {
    "compact with norms, the default": "compact + norms", "compact, norms frozen": "compact",
    "one train for all layers, rank 1": "shared r=1", "adp with norms, as published": "adp + norms",
    "rep with norms, as published": "rep + norms", "rep, norms frozen": "rep",
}  # fmt: skip


def at_a_glance(found: Sequence[Row], which: str = "official") -> str:
    """The main forms on each model: their parameters, beside those of LoRA r=8, and their score, beside its."""
    boards = [Board(found, model, which) for model in MODELS]
    lines = []
    for shown, method in IN_SHORT.items():
        cells = []
        for board in boards:
            gap = board.gap(method, "LoRA r=8")
            if gap is None:
                cells.append("")
                continue
            share = board.trained(method) / board.trained("LoRA r=8")
            cells.append(f"{board.trained(method):,} ({share:.0%}): {PLACE[verdict(gap)]} ({signed(gap)})")
        lines.append([shown, *cells])
    columns = [f"{shown.partition(' ')[0]}, LoRA r=8 has {board.trained('LoRA r=8'):,}"
               for board, shown in zip(boards, MODELS.values(), strict=True)]  # fmt: skip
    return markdown(lines, ["form", *columns], left=4)


REFERENCES = ("LoRA r=8", "LoRA r=1", "norms")
PLACE = {"worse": "below", "level": "level", "better": "above"}


def standing(found: Sequence[Row], which: str = "official") -> str:
    """Of each model all forms of LoRETTA beside LoRA and the norms, in means over tasks."""
    said = []
    for model, shown in MODELS.items():
        board = Board(found, model, which)
        have = board.complete()
        ours = [method for method in have if board.family(method) == "LoRETTA"]
        if len(have) < 3 or not ours:
            continue
        others = [name for name in REFERENCES if name in have]
        gaps = {(one, other): board.gap(one, other) for one in ours for other in others}
        lines = [
            [one, f"{board.trained(one):,}", words(have[one]), *("" if (gap := gaps[one, other]) is None else
             f"{PLACE[verdict(gap)]} ({signed(gap)})" for other in others)]
            for one in ours
        ]  # fmt: skip
        columns = ["form", "trained", "mean", *(f"to {other} ({board.trained(other):,})" for other in others)]
        of = f"**{shown}**, mean of {', '.join(board.common)}, {board.seeds(have)} seeds. {sizes_sentence(board)}"
        said.append(f"{of.strip()}\n\n{markdown(lines, columns)}")
    return "\n".join(said)


SHOWN = {
    "rep": ("LoRA r=1", "norms"), "compact + norms": ("LoRA r=8", "norms"),
    "shared r=1": ("LoRA r=1", "Uni-LoRA d=5000"),
}  # fmt: skip


def in_short(found: Sequence[Row]) -> str:
    """What README says of its picture: the published form first, which loses, then the default."""
    board = Board(found, pictured(found), "official")
    words = []
    for one, others in SHOWN.items():
        gaps = [
            f"{signed(gap)} to {other} ({board.trained(other):,}), {verdict(gap)}"
            for other in others
            if (gap := board.gap(one, other)) is not None
        ]
        if gaps:
            words.append(f"* {one} ({board.trained(one):,}): {'; '.join(gaps)}")
    row = board.rows[0]
    said = f"{MODELS[row['model']]}, mean of {', '.join(board.common)}, {board.seeds(board.complete())} seeds"
    return f"{said}, paired differences with 95 % intervals:\n\n" + "\n".join(words) + "\n"


def pictured(found: Sequence[Row]) -> str:
    """The largest encoder of which enough was measured for a picture."""
    names = ("all-mpnet-base-v2", "all-MiniLM-L6-v2")
    return next((name for name in names if len(Board(found, name, "official").complete()) > 5), names[-1])


def default_rule(found: Sequence[Row]) -> str:
    """What the rule for the default of ``loretta train`` says, with the differences that it goes by."""
    gaps = {}
    for model, shown in MODELS.items():
        gap = Board(found, model, "held_out").gap("shared r=4 + norms", "compact + norms")
        if gap is not None:
            gaps[shown.partition(" ")[0]] = gap
    higher = bool(gaps) and all(gap.mean() > 0 for gap in gaps.values())
    changes = higher and any(verdict(gap) == "better" for gap in gaps.values())
    said = ", ".join(f"{signed(gap)} on {name} ({verdict(gap)})" for name, gap in gaps.items())
    which = "shared r=4 + norms takes the place of compact" if changes else "compact stays"
    return f"Shared r=4 with norms is {said} beside compact with norms: {which}.\n"
