"""The tables of docs/performance.md that hold what was measured against what was asked for.

A step that waits for the CPU may take a quarter longer in one process than in another of the same kind, and so may its
fastest round: what slows a process down stays for its life, and rounds within a run do not show it. So the unit of what
is judged there is a run, with processes of its own. How far the ratios of two steps scatter between runs is estimated
from all cells that were measured more than once, and gives the interval of each of them.
"""

import json
import math
from functools import cache
from statistics import mean

from measured import NOT_MEASURED, RESULTS, Row, results, source, table, verdict
from scipy.stats import t as student

FLOOR, LORA = "floor", "lora q,v"
OURS = ("rep q,v", "adp", "adp mlp", "rep q,v norms", "adp norms")
LIMIT = 1.05  # of the floor


def steps() -> list[Row]:
    """Every step that was timed, with the floor and the LoRA of its own run: None where that was not measured."""
    found = []
    for row in results("speed_*"):
        run = [other for other in results("speed_*") if _run(other) == _run(row)]
        references = {name: next((o for o in run if o["method"] == name), None) for name in (FLOOR, LORA)}
        found.append({**row, "floor": references[FLOOR], "lora": references[LORA]})
    return found


def _run(row: Row) -> tuple:
    return row["file"], row["mode"], row["batch"], row["tokens"]


def waits_for_cpu(row: Row) -> bool:
    """Whether a step is the CPU's work: the GPU is busy for less than nine tenths of it."""
    if "seconds_per_step" in row:
        return row["part"] == "steps"
    return bool(row.get("gpu_ms")) and row["gpu_ms"] < 0.9 * row["ms"]


def log_ratios(row: Row, other: Row) -> list[float]:
    """Of the medians of two steps, in each run that has both."""
    runs = (each.get("runs") or [each.get("ms") or each["seconds_per_step"]] for each in (row, other))
    return [math.log(a / b) for a, b in zip(*runs, strict=True) if a and b]


@cache
def scatter(reference: str) -> tuple[float, int]:
    """The standard deviation of a logarithmic ratio to a reference between runs, and its degrees of freedom."""
    pairs = [(row, row[reference]) for row in steps() if row["method"] in OURS and row[reference]]
    found = [log_ratios(row, other) for row, other in pairs if waits_for_cpu(row)]
    squares = [(value - mean(values)) ** 2 for values in found for value in values]
    freedom = sum(len(values) - 1 for values in found)
    return math.sqrt(sum(squares) / freedom), freedom


def judged(row: Row, other: Row, limit: float, reference: str = "lora") -> tuple[float, str, str]:
    """The ratio of two steps, the same with its 95 % interval where it has one, and whether it is below a limit."""
    values = log_ratios(row, other)
    if not waits_for_cpu(row):
        ratio = math.exp(values[-1])  # of the last run: beside other work the GPU may have waited in earlier ones
        return ratio, f"{ratio:.3f}", verdict(ratio <= limit)
    ratio = math.exp(mean(values))
    deviation, freedom = scatter(reference)
    half = float(student.ppf(0.975, freedom)) * deviation / math.sqrt(len(values))
    low, high = ratio * math.exp(-half), ratio * math.exp(half)
    return ratio, f"{ratio:.3f} ({low:.2f} to {high:.2f})", verdict(high <= limit, is_open=low <= limit < high)


def marks_of(row: Row) -> tuple[str, str, str]:
    """Whether a step keeps to 1.05 floors, to LoRA's time and to LoRA's memory."""
    floor, time = (judged(row, row[name], limit, name)[2] for name, limit in (("floor", LIMIT), ("lora", 1)))
    return floor, time, verdict(row["peak_gib"] <= row["lora"]["peak_gib"])


def size_of(row: Row) -> str:
    """Batch and tokens."""
    return f"{row['batch']}x{row['tokens']}"


COSTS = {
    "eager": "eager: `loretta train`, TRL, the Trainer",
    "compile": "`torch.compile`",
    "reduce-overhead": '`torch.compile(mode="reduce-overhead")`',
    "graph": "one CUDA graph a step: `loretta train --cuda-graph`",
    "ddp": "two GPUs, DDP",
    "fsdp2": "two GPUs, FSDP2",
}


def costs_table() -> str:
    """What a step costs in each mode beside LoRA and beside the frozen model: the least and the most of all cells."""
    cells = [row for row in steps() if row["method"] in ("rep q,v", "adp") and row["lora"] is not None]
    launches = [row for row in results("processes*") if row["part"] != "losses" and row["launch"] != "one"]
    for row in launches:
        if row["method"] in ("rep q,v", "adp"):
            run = {other["method"]: other for other in launches if _launch(other) == _launch(row)}
            memory = {name: {**each, "peak_gib": each["peak_bytes"] / 2**30} for name, each in run.items()}
            cells.append({**memory[row["method"]], "mode": row["launch"], "lora": memory[LORA], "floor": memory[FLOOR]})
    lines = []
    for mode, name in COSTS.items():
        of_mode = [row for row in cells if row["mode"] == mode]
        found = [name, str(len({(row["shape"], size_of(row)) for row in of_mode}))]
        for reference in ("lora", "floor"):
            for method in ("rep q,v", "adp"):
                own = [row for row in of_mode if row["method"] == method]
                found.append(_range([judged(row, row[reference], 1, reference)[0] for row in own]))
        found.append(_range([row["peak_gib"] / row["lora"]["peak_gib"] for row in of_mode]))
        lines.append(found)
    decoded = [row for row in results("inference*") if row["mode"] == "graph"]
    found = ["decoding, not merged, in a CUDA graph", str(len({(row["shape"], row["batch"]) for row in decoded}))]
    for reference in (LORA, "base"):
        for method in ("rep q,v", "adp"):
            found.append(
                _range([row["ms"] / _same(row, reference)["ms"] for row in decoded if row["method"] == method])
            )
    lines.append([*found, ""])
    head = "how | cells | rep / LoRA | adp / LoRA | rep / frozen | adp / frozen | memory / LoRA"
    return table(head, lines) if cells else NOT_MEASURED


def _same(row: Row, method: str) -> Row:
    """Another method in the decoding of a row."""
    run = (other for other in results("inference*") if other["file"] == row["file"] and other["mode"] == row["mode"])
    return next(other for other in run if (other["method"], other["batch"]) == (method, row["batch"]))


def _range(values: list[float]) -> str:
    ends = dict.fromkeys(f"{end(values):.2f}" for end in (min, max) if values)
    return " to ".join(ends)


def summary_table() -> str:
    """How many of the rows keep to each target, and the worst of them."""
    rows = [row for row in steps() if row["method"] in OURS and row["lora"] is not None]
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        targets = [
            ("at most 1.05 floors", [judged(row, row["floor"], LIMIT, "floor")[0] for row in of_mode]),
            ("no slower than LoRA q,v", [judged(row, row["lora"], 1)[0] for row in of_mode]),
            ("no more memory than LoRA q,v", [row["peak_gib"] / row["lora"]["peak_gib"] for row in of_mode]),
        ]
        for (target, ratios), marks in zip(targets, zip(*map(marks_of, of_mode), strict=True), strict=True):
            worst = max(range(len(ratios)), key=ratios.__getitem__)
            row = of_mode[worst]
            where = f"{ratios[worst]:.3f}: {row['method']}, {row['shape']} at {size_of(row)}"
            counts = [str(marks.count(mark)) for mark in (verdict(True), verdict(False, is_open=True), verdict(False))]
            lines.append([mode, target, *counts, where])
    head = "mode | target | hit | open | missed | the worst row"
    return table(head, lines, numbers_from=6) if lines else NOT_MEASURED


def bounds_table() -> str:
    """Each step beside the bound: a trained vector that is added to each output that adp adapts, and nothing else."""
    ratios = [("bound", FLOOR), (LORA, FLOOR), ("rep q,v", LORA), ("adp", LORA)]
    ratios += [("rep q,v", "rep q,v before"), ("adp", "adp before")]
    runs = [[o for o in results("speed_*") if _run(o) == _run(row)] for row in steps() if row["method"] == "bound"]
    lines = []
    for run in runs:
        rows = {row["method"]: row for row in run}
        found = [
            f"{judged(rows[method], rows[other], 1)[0]:.3f}" if {method, other} <= rows.keys() else ""
            for method, other in ratios
        ]
        own = rows["bound"]
        lines.append([own["mode"], own["shape"], size_of(own), len(own["runs"]), f"{rows[FLOOR]['ms']:.2f}", *found])
    for row in results("inference*"):
        if row["method"] == "bound":
            times = {name: _same(row, name)["ms"] for name in ("base", LORA, "rep q,v", "adp")}
            found = [times[LORA] / times["base"], times["rep q,v"] / times[LORA], times["adp"] / times[LORA]]
            cell = ["decoding", row["shape"], f"batch {row['batch']}", 1, f"{times['base']:.2f}", f"{row['ratio']:.3f}"]
            lines.append([*cell, *(f"{ratio:.3f}" for ratio in found), "", ""])
    head = "mode | model | size | runs | frozen, ms | bound / frozen | LoRA / frozen | rep / LoRA | adp / LoRA"
    head += " | rep / rep before | adp / adp before"
    return table(head, lines, numbers_from=3) if lines else NOT_MEASURED


def lora_of(row: Row) -> Row | None:
    """LoRA on the mixed batch of a row, in the same run."""
    run = [other for other in results("mixed*") if other["file"] == row["file"]]
    return next((o for o in run if (o["method"], o["adapters"]) == (LORA, row["adapters"])), None)


def cells_table() -> str:
    """Every cell that was asked for, with what it came to."""
    lines = []
    for row in steps():
        lora, mode = row["lora"], row["mode"]
        if row["method"] not in ("rep q,v", "adp"):
            continue
        cell = [mode, row["shape"], size_of(row), row["method"]]
        if mode != "graph" and lora is not None:
            lines.append([*cell, "at most LoRA's time", *judged(row, lora, 1)[1:]])
        if mode == "eager" and (row["shape"], size_of(row)) == ("llama-1b", "8x512"):
            lines.append([*cell, "1.08 floors", *judged(row, row["floor"], 1.08, "floor")[1:]])
        if mode == "graph" and size_of(row) == "1x256":
            lines.append([*cell, "1.05 floors", f"{row['ratio']:.3f}", verdict(row["ratio"] <= LIMIT)])
    for row in results("inference*"):
        if row["mode"] == "graph" and row["method"] in ("rep q,v", "adp"):
            cell = ["decoding", row["shape"], f"batch {row['batch']}", row["method"]]
            lines.append([*cell, "1.05 of the base", f"{row['ratio']:.3f}", verdict(row["ratio"] <= LIMIT)])
    for row in results("mixed*"):
        lora = lora_of(row)
        if row["method"] in ("rep q,v", "adp") and lora:
            cell = ["mixed batch", row["shape"], f"{row['adapters']} adapters", row["method"]]
            to_lora = row["ms"] / lora["ms"]
            lines.append([*cell, "at most LoRA's time", f"{to_lora:.3f}", verdict(to_lora <= 1)])
    for row in results("processes*"):
        lora = next((o for o in results("processes*") if _launch(o) == _launch(row) and o["method"] == LORA), None)
        if row["part"] != "losses" and row["method"] in ("rep q,v", "adp") and lora and row["launch"] != "one":
            cell = [f"two GPUs, {row['launch']}", row["shape"], size_of(row), row["method"]]
            lines.append([*cell, "at most LoRA's time", *judged(row, lora, 1)[1:]])
    for row in results("four_bit"):
        if row["method"] in ("rep q,v", "adp"):
            lora = next(other for other in results("four_bit") if other["method"] == LORA)
            cell = ["eager, 4-bit base", row["shape"], size_of(row), row["method"]]
            to_lora = row["ms"] / lora["ms"]
            lines.append([*cell, "at most LoRA's time", f"{to_lora:.3f}", verdict(to_lora <= 1)])
    return (
        table("mode | model | size | method | target | is | verdict", lines, numbers_from=5) if lines else NOT_MEASURED
    )


def _launch(row: Row) -> tuple:
    return row["file"], row["part"], row["launch"], row.get("shape")


def processes_table() -> str:
    """Training by several processes: a step beside LoRA's, and how far the losses are from those of one process."""
    rows = results("processes*")
    if not rows:
        return NOT_MEASURED
    files = dict.fromkeys(row["file"] for row in rows)
    return "\n".join(_processes_table([row for row in rows if row["file"] == file]) for file in files)


def _processes_table(rows: list[Row]) -> str:
    content = json.loads((RESULTS / rows[0]["file"]).read_text())
    differ = {(each["launch"], each["method"]): f"{each['largest_difference']:.1e}" for each in content["summary"]}
    lines = []
    for row in rows:
        kind = row.get("shape", "MiniLM, CoLA")
        lora = next((o for o in rows if _launch(o) == _launch(row) and o["method"].startswith("lora")), None)
        numbers = [
            f"{1e3 * row['seconds_per_step']:.1f}",
            f"{row['seconds_per_step'] / lora['seconds_per_step']:.2f}" if lora else "",
        ]
        difference = differ.get((row["launch"], row["method"]), "") if row["part"] == "losses" else ""
        lines.append([kind, row["launch"], row["method"], *numbers, f"{row['peak_bytes'] / 2**30:.1f}", difference])
    head = "model | processes | method | ms a step | / LoRA | GiB each | losses differ by"
    return source(rows[0]) + table(head, lines, numbers_from=3)
