"""The tables of docs/performance.md that hold what was measured against what was asked for."""

import json

from measured import NOT_MEASURED, RESULTS, Row, results, source, table, verdict

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


def hits_of(row: Row) -> tuple[bool, bool, bool]:
    """Whether a step keeps to 1.05 floors, to LoRA's time and to LoRA's memory."""
    lora = row["lora"]
    return row["ratio"] <= LIMIT, row["ms"] <= lora["ms"], row["peak_gib"] <= lora["peak_gib"]


def size_of(row: Row) -> str:
    """Batch and tokens."""
    return f"{row['batch']}x{row['tokens']}"


def summary_table() -> str:
    """How many of the rows keep to each target, and the worst of them."""
    rows = [row for row in steps() if row["method"] in OURS and row["lora"] is not None]
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        targets = [
            ("at most 1.05 floors", [row["ratio"] for row in of_mode]),
            ("no slower than LoRA q,v", [row["ms"] / row["lora"]["ms"] for row in of_mode]),
            ("no more memory than LoRA q,v", [row["peak_gib"] / row["lora"]["peak_gib"] for row in of_mode]),
        ]
        for (target, ratios), hits in zip(targets, zip(*map(hits_of, of_mode), strict=True), strict=True):
            worst = max(range(len(ratios)), key=ratios.__getitem__)
            row = of_mode[worst]
            where = f"{ratios[worst]:.3f}: {row['method']}, {row['shape']} at {size_of(row)}"
            lines.append([mode, target, f"{sum(hits)} of {len(hits)}", where])
    return table("mode | target | rows that hit it | the worst row", lines, numbers_from=4) if lines else NOT_MEASURED


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
            to_lora = row["ms"] / lora["ms"]
            lines.append([*cell, "at most LoRA's time", f"{to_lora:.3f}", verdict(to_lora <= 1)])
        if mode == "eager" and (row["shape"], size_of(row)) == ("llama-1b", "8x512"):
            lines.append([*cell, "1.08 floors", f"{row['ratio']:.3f}", verdict(row["ratio"] <= 1.08)])
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
            to_lora = row["seconds_per_step"] / lora["seconds_per_step"]
            cell = [f"two GPUs, {row['launch']}", row["shape"], size_of(row), row["method"]]
            lines.append([*cell, "at most LoRA's time", f"{to_lora:.3f}", verdict(to_lora <= 1)])
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
