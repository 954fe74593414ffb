"""What the paper claims, and what came out; and what was not run."""

from collections.abc import Callable, Sequence
from statistics import mean

from board import Board, Row, markdown, paired, signed, verdict
from methods import GROUPS
from protocol import interval
from retention import average, forgetting_rows, risen

MODELS = {
    "all-MiniLM-L6-v2": "MiniLM (width 384, 22.7M)",
    "all-mpnet-base-v2": "MPNet (width 768, 109.5M)",
    "SmolLM2-135M-Instruct": "SmolLM2 (width 576, 134.5M)",
}
MARGIN = 0.02  # "as good as": the whole interval lies above minus this
OPEN = "open: not run"

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


def claims(found: Sequence[Row]) -> str:
    """Confirmed, refuted or open, for each claim and model."""
    boards = {model: Board(found, model, "official") for model in MODELS}
    have = {model: board.complete() for model, board in boards.items()}
    lines = []
    for claim, one, other in CLAIMS:
        cells = []
        for model in MODELS:
            if one not in have[model] or other not in have[model]:
                cells.append(OPEN)
                continue
            difference = paired(have[model][one], have[model][other])
            cells.append(said(difference, 0.0 if "add" in claim else MARGIN, strictly="add" in claim))
        lines.append([claim, *cells])
    for claim, make in (
        ("adp and rep keep more of three tasks learned in turn than LoRA r=8 (Table 4)", _kept),
        ("the held-out loss of adp and rep rises less than LoRA r=8's in 30 epochs (Figure 4)", _risen),
    ):
        lines.append([claim, *(make(found, model) for model in MODELS)])
    return markdown(lines, ["claim", *(shown.partition(" ")[0] for shown in MODELS.values())], left=4)


def said(difference: Sequence[float], margin: float, *, strictly: bool) -> str:
    middle, half = interval(difference)
    if strictly:
        word = {"better": "confirmed", "worse": "refuted", "level": "open"}[verdict(difference)]
    else:
        word = "confirmed" if middle - half >= -margin else "refuted" if middle + half < 0 else "open"
    return f"{word} ({signed(difference)})"


def _both(rows: dict[str, Row], value: Callable[[Row], list[float]], sign: int) -> str:
    """What is said of adp and of rep, against LoRA r=8."""
    if "LoRA r=8" not in rows:
        return OPEN
    words = []
    for method in ("adp + norms", "rep + norms"):
        if method in rows:
            gaps = [sign * gap for gap in paired(value(rows[method]), value(rows["LoRA r=8"]))]
            words.append(f"{method.partition(' ')[0]} {said(gaps, 0.0, strictly=True)}")
    return ", ".join(words) or OPEN


def _kept(found: Sequence[Row], model: str) -> str:
    return _both({row["method"]: row for row in forgetting_rows() if row["model"] == model}, average, 1)


def _risen(found: Sequence[Row], model: str) -> str:
    rows = [row for row in found if row["model"] == model and row.get("part") == "long" and "losses" in row]
    of_tasks: dict[str, list[Row]] = {}
    for row in rows:
        of_tasks.setdefault(row["method"], []).append(row)
    most = max(map(len, of_tasks.values()), default=0)
    whole = {method: some for method, some in of_tasks.items() if len(some) == most}

    def value(row: Row) -> list[float]:
        each = [risen(one) for one in whole[row["method"]]]
        return [mean(of_seed) for of_seed in zip(*each, strict=True)]

    return _both({method: some[0] for method, some in whole.items()}, value, -1)


PLANS = (
    ("all-MiniLM-L6-v2", "minilm", ("core", "more"), "cola,mrpc,stsb,sst2,rte", ""),
    ("all-MiniLM-L6-v2", "minilm", ("core",), "qnli,qqp,mnli", " --seeds 3"),
    ("all-mpnet-base-v2", "mpnet", ("core", "more"), "cola,mrpc,stsb,sst2,rte", " --share 0.6"),
    (
        "SmolLM2-135M-Instruct", "smollm2", ("decoder",), "sst2-words,cb-words,boolq-words,rte-words,stories,wiki",
        " --seeds 3",
    ),
)  # fmt: skip


def not_run(found: Sequence[Row]) -> str:
    """The cells that are missing, and the command that runs these and no others."""
    done = {(row["model"], row["task"], row["method"]) for row in found if row.get("part", "front") == "front"}
    lines = []
    for model, name, groups, tasks, more in PLANS:
        wanted = [(model, task, method) for g in groups for method in GROUPS[g] for task in tasks.split(",")]
        missing = sum(cell not in done for cell in wanted)
        orders = " ".join(f"{group}:{tasks}" for group in groups)
        command = f"python benchmarks/forms.py --model FOLDER --data-dir DATA --order {orders}{more}"
        lines.append(
            f"* {model}, {tasks}: {missing} of {len(wanted)} cells were not run.\n"
            f"  `{command} --out benchmarks/results/forms_{name}.json` runs them and no others."
        )
    return "\n".join(lines) + "\n"
