"""Fill the tables of docs/performance.md and docs/measurements.md from benchmarks/results/, and draw their figure.

python benchmarks/performance.py
"""

import json
from collections.abc import Callable
from pathlib import Path

from floors import adapter_cost, base_cost
from measured import NOT_MEASURED, RESULTS, Row, results, source, sources, table, verdict
from population_tables import POPULATION_SECTIONS
from tables import filled
from targets import (
    FLOOR,
    LIMIT,
    LORA,
    OURS,
    bounds_table,
    cells_table,
    costs_table,
    lora_of,
    marks_of,
    processes_table,
    size_of,
    steps,
    summary_table,
)

from loretta.report.figures import AXIS, COLOURS, INKS

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "performance.md", ROOT / "docs" / "measurements.md"
FIGURE = ROOT / "docs" / "growth.svg"

ALONE = " contraction"
WRAPPING = {"wrap": 2.0, "save": 0.2, "load": 1.0}  # seconds


# What has to be done at the least


def floor_table() -> str:
    """Bytes and operations of a frozen step, the time they need, and the time that was measured."""
    lines = []
    for row in steps():
        if row["method"] != FLOOR or row["mode"] != "graph":
            continue
        cost = base_cost(row["shape"], row["layers"], row["batch"], row["tokens"])
        sizes = [row["shape"], size_of(row), f"{cost.weights / 1e9:.2f}", f"{cost.activations / 1e9:.2f}"]
        sizes += [f"{cost.flops / 1e12:.2f}", f"{cost.bytes_ms:.2f}", f"{cost.flops_ms:.2f}"]
        lines.append([*sizes, f"{row['ms']:.2f}", f"{row['ms'] / cost.ms:.2f}"])
    head = "model | batch x tokens | weights, GB | activations, GB | TFLOP | bytes, ms | operations, ms | measured, ms"
    return table(f"{head} | measured / larger", lines, numbers_from=2) if lines else NOT_MEASURED


def adapter_table() -> str:
    """The same of what an adapter adds, against the time it adds in a CUDA graph."""
    lines = []
    for row in steps():
        if row["method"] not in ("rep q,v", "adp") or row["mode"] != "graph":
            continue
        cost = adapter_cost(row["shape"], row["layers"], row["method"], row["batch"], row["tokens"])
        extra = row["ms"] - row["floor"]["ms"]
        allowed = (LIMIT - 1) * row["floor"]["ms"]
        numbers = [f"{cost.bytes / 1e9:.2f}", f"{cost.flops / 1e9:.1f}", f"{cost.ms:.2f}"]
        lines.append([row["shape"], size_of(row), row["method"], *numbers, f"{allowed:.2f}", f"{extra:.2f}"])
    head = "model | batch x tokens | method | GB | GFLOP | predicted, ms | allowed, ms | measured, ms"
    return table(head, lines, numbers_from=3) if lines else NOT_MEASURED


# Training steps


def step_table(shape: str) -> Callable[[], str]:
    """The function that writes the table of one model's training steps."""

    def write() -> str:
        rows = [row for row in steps() if row["shape"] == shape and not row["method"].endswith(ALONE)]
        files = dict.fromkeys((row["file"], row["layers"]) for row in rows)
        parts = []
        for file, layers in files:
            of_file = [row for row in rows if row["file"] == file]
            lines = [_step_line(row) for row in of_file]
            head = "mode | batch x tokens | method | median, ms | min, max | / floor | / LoRA | peak, GiB"
            parts.append(f"{layers} layers. {source(of_file[0])}")
            parts[-1] += table(f"{head} | 1.05 | LoRA's time | LoRA's memory", lines, numbers_from=3)
        return "\n".join(parts) or NOT_MEASURED

    return write


def _step_line(row: Row) -> list[str]:
    to_lora = row["ms"] / row["lora"]["ms"] if row["lora"] else None
    cells = [row["mode"], size_of(row), row["method"], f"{row['ms']:.2f}", f"{row['min']:.2f}, {row['max']:.2f}"]
    cells += [f"{row['ratio']:.3f}", f"{to_lora:.3f}" if to_lora else "", f"{row['peak_gib']:.2f}"]
    judged = row["method"] in OURS and row["lora"] is not None
    marks = marks_of(row) if judged else ["", "", ""]
    return [*cells, *marks]


def contraction_table() -> str:
    """The joint contraction alone, forward and backward, over sizes that must not matter."""
    rows = [row for row in results("speed_*") if row["method"].endswith(ALONE) and row["mode"] == "graph"]
    lines = []
    for shape, method in dict.fromkeys((row["shape"], row["method"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["method"]) == (shape, method)]
        cells = ", ".join(f"{size_of(row)}: {row['ms']:.3f}" for row in chosen)
        lines.append([shape, method.removesuffix(ALONE), cells])
    return table("model | method | ms by batch x tokens", lines, numbers_from=3) if lines else NOT_MEASURED


def kernel_table() -> str:
    """The Triton kernels against their plain twins, per layer."""
    rows = results("fused")
    lines = []
    for row in rows:
        graph, eager = row["graph"], row["eager"]
        cells = [row["case"], f"{row['rows']} x {row['width']}", f"{graph['plain']:.0f}", f"{graph['fused']:.0f}"]
        lines.append(
            [*cells, f"{graph['fused'] / graph['plain']:.2f}", f"{eager['plain']:.0f}", f"{eager['fused']:.0f}"]
        )
    head = "layer | rows x width | plain, us | fused, us | fused / plain | eager plain, us | eager fused, us"
    return table(head, lines, numbers_from=2) if lines else NOT_MEASURED


def profile_table() -> str:
    """What rep's kernels took, one module's each, before they were fused."""
    rows = results("profile_llama-7b")
    head = rows[0]
    lines = [[row["product"], f"{row['us']:.1f}", f"{row['reduction_us']:.1f}"] for row in rows]
    each = sum(row["us"] + row["reduction_us"] for row in rows)
    lines.append(["all of them", f"{each:.1f}", ""])
    lines.append([f"in {head['modules']} modules, ms", f"{head['modules'] * each / 1e3:.2f}", ""])
    lines.append(["joint contraction, ms", f"{head['contraction_ms']:.2f}", ""])
    lines.append(["measured in all, ms", f"{head['extra_ms']:.2f}", ""])
    return source(head) + table("kernel | us | split-K reduction, us", lines)


def four_bit_table() -> str:
    """Steps of a large model whose base is in 4 bits."""
    rows = results("four_bit")
    lines = []
    for row in rows:
        lora = next(other for other in rows if other["method"] == LORA)
        numbers = [f"{row['ms']:.0f}", f"{row['min']:.0f}, {row['max']:.0f}", f"{row['ratio']:.3f}"]
        cells = [row["shape"], size_of(row), row["method"], *numbers, f"{row['ms'] / lora['ms']:.3f}"]
        lines.append([*cells, f"{row['trained']:,}", f"{row['peak_gib']:.1f}"])
    head = "model | batch x tokens | method | ms | min, max | / floor | / LoRA | trained | GiB"
    return source(rows[0]) + table(head, lines, numbers_from=3) if rows else NOT_MEASURED


def small_table() -> str:
    """What a small step in one CUDA graph costs beyond the floor, beside one empty kernel a module and direction."""
    rows = results("small_graphs")
    lines = []
    for row in rows:
        lines.append([row["shape"], size_of(row), row["method"], f"{row['ms']:.2f}", f"{row['ratio']:.3f}"])
        lines[-1] += [row["kernels"], f"{row['gpu_ms']:.2f}"]
    head = "model | batch x tokens | method | ms | / floor | kernels | ms of kernels"
    return source(rows[0]) + table(head, lines, numbers_from=3) if rows else NOT_MEASURED


def parallel_table() -> str:
    """Training by torch's DataParallel on several GPUs against one."""
    rows = results("data_parallel")
    lines = []
    for row in rows:
        cells = [row["model"], row["method"], row["gpus"], row["steps"], "yes" if row["data_parallel"] else "no"]
        lines.append([*cells, f"{row['losses_differ_by']:.1e}", f"{row['numbers_differ_by']:.1e}"])
    head = "model | method | GPUs | steps | DataParallel | losses differ by | trained numbers differ by"
    return source(rows[0]) + table(head, lines, numbers_from=2) if rows else NOT_MEASURED


def launches_table() -> str:
    """What an eager step costs the CPU for each adapted module and once a step, above the floor, before and now."""
    rows = results("launches")
    lines = []
    for row in rows:
        cells = [row["shape"], row["dtype"], row["method"], row["when"], f"{row['tensors per module']:.2f}"]
        for kind in ("kernels", "views", "nodes", "python calls"):
            passes = [row[f"{name} {kind}"] for name in ("forward", "backward") if f"{name} {kind}" in row]
            each, once = (sum(found[what] for found in passes) for what in ("module", "step"))
            cells.append(f"{each:g} + {once:g}")
        lines.append(cells)
    head = "model | dtype | method | code | trained tensors | kernels | views | autograd nodes | Python calls"
    return table(head, lines, numbers_from=4) if rows else NOT_MEASURED


def compiled_table() -> str:
    """What torch.compile makes of a step for each adapted module and once, above the floor, before and now."""
    rows = results("compiled")
    kinds = ("guards", "inputs", "operations", "kernels", "products", "handed on")
    lines = []
    for row in rows:
        cells = [row["shape"], row["method"], row["when"], row["graphs"]]
        counts = [row.get(kind) for kind in kinds]
        lines.append([*cells, *(f"{each['module']:g} + {each['step']:g}" if each else "" for each in counts)])
    head = "model | method | code | graphs | guards | inputs | operations | kernels | products | handed on"
    return table(head, lines, numbers_from=3) if rows else NOT_MEASURED


def shares_table() -> str:
    """Milliseconds that the CPU works at the parts of a compiled step."""
    rows = results("shares")
    parts = ("guards", "code forward", "code backward", "around forward", "around backward", "optimiser", "step")
    lines = [[r["method"], r["tensors"], *(f"{r[part]:.2f}" if r[part] else "" for part in parts)] for r in rows]
    return source(rows[0]) + table(f"method | tensors | {' | '.join(parts)}", lines) if rows else NOT_MEASURED


# Everything else


def inference_table() -> str:
    """Tokens per second of decoding."""
    parts = []
    for file in dict.fromkeys(row["file"] for row in results("inference*")):
        rows = [row for row in results("inference*") if row["file"] == file]
        lines = []
        for row in rows:
            times = [f"{row['ms']:.2f}", f"{row['min']:.2f}, {row['max']:.2f}", f"{row['tokens_per_second']:.0f}"]
            lines.append([row["mode"], row["batch"], row["method"], *times, f"{1 / row['ratio']:.3f}"])
        head = "mode | batch | method | ms per step | min, max | tokens per second | / base"
        parts.append(f"{rows[0]['shape']}. {source(rows[0])}{table(head, lines, numbers_from=3)}")
    return "\n".join(parts) or NOT_MEASURED


def mixed_table() -> str:
    """A batch whose rows name adapters of their own."""
    rows = results("mixed*")
    lines = []
    for row in rows:
        lora = lora_of(row)
        times = [f"{row['ms']:.2f}", f"{row['min']:.2f}, {row['max']:.2f}", f"{row['ratio']:.2f}"]
        to_lora = f"{row['ms'] / lora['ms']:.2f}" if lora else ""
        lines.append([row["shape"], size_of(row), row["adapters"], row["method"], *times, to_lora])
    head = "model | batch x tokens | adapters | method | ms | min, max | / base | / LoRA"
    return sources(rows) + table(head, lines, numbers_from=4) if rows else NOT_MEASURED


def growth_table() -> str:
    """Overhead by layers, width and rank."""
    rows = results("growth")
    lines = []
    for axis, value in dict.fromkeys((row["axis"], row[row["axis"]]) for row in rows):
        point = {row["method"]: row for row in rows if row["axis"] == axis and row[axis] == value}
        sizes = [axis, *(point[FLOOR][name] for name in ("layers", "width", "rank")), f"{point[FLOOR]['ms']:.2f}"]
        lines.append(
            [*sizes, *(f"{point[method]['ratio']:.3f}" if method in point else "" for method in ("rep", "adp"))]
        )
    head = "along | layers | width | rank | floor, ms | rep / floor | adp / floor"
    return source(rows[0]) + table(head, lines) if rows else NOT_MEASURED


def draw_growth(path: Path) -> None:
    """The same as a figure."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = results("growth")
    axes_of = list(dict.fromkeys(row["axis"] for row in rows))
    with matplotlib.rc_context({"svg.hashsalt": "growth", "font.size": 9, **INKS}):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        parts = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
        for part, axis in zip(parts, axes_of, strict=True):
            for method, marker, color in (("rep", "o", COLOURS[0]), ("adp", "s", COLOURS[1])):
                points = [(row[axis], row["ratio"]) for row in rows if (row["axis"], row["method"]) == (axis, method)]
                part.plot(*zip(*points, strict=True), marker=marker, color=color, label=method)
            part.axhline(1.0, color=AXIS, linewidth=0.8)
            part.axhline(LIMIT, color=AXIS, linewidth=0.8, linestyle="--")
            part.set_xscale("log", base=2)
            values = sorted({row[axis] for row in rows if row["axis"] == axis})
            part.set_xticks(values, [str(value) for value in values])
            part.set_xlabel({"rank": "tensor rank"}.get(axis, axis))
        parts[0].set_ylabel("step / frozen floor")
        parts[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def graph_training_table() -> str:
    """Training through the Trainer, with and without CUDA graphs."""
    parts = []
    for path in sorted(RESULTS.glob("graph_training*.json")):
        content = json.loads(path.read_text())
        lines = []
        for row in content["summary"]:
            rate = [row["case"], row["method"], "yes" if row["graphs"] else "no", f"{row['examples_per_s']:.0f}"]
            rate.append(f"{row['to_plain_lora']:.2f}" if row["to_plain_lora"] else "")
            by_run = [(row["of_the_bare_rate"], ".2f"), (row["accuracies"], ".4f")]
            lines.append([*rate, *(", ".join(format(value, digits) for value in values) for values, digits in by_run)])
        head = "case | method | graphs | examples per second | / plain LoRA | / bare replays | accuracy by seed"
        parts.append(source(results(path.stem)[0]) + table(head, lines, numbers_from=3))
    return "\n".join(parts) or NOT_MEASURED


def cpu_table() -> str:
    """Steps on a CPU against LoRA."""
    rows = results("cpu")
    lines = []
    for row in rows:
        target = verdict(row["ratio"] <= 1) if row["method"] in OURS else ""
        times = [f"{row['ms']:.2f}", f"{row['min']:.2f}, {row['max']:.2f}", f"{row['ratio']:.3f}"]
        lines.append([row["shape"], size_of(row), row["method"], *times, target])
    head = "model | batch x tokens | method | median, ms | min, max | / LoRA | at most 1.0"
    return source(rows[0]) + table(head, lines, numbers_from=3) if rows else NOT_MEASURED


def wrapping_table() -> str:
    """Seconds of wrapping, saving and loading."""
    rows = results("wrapping")
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        phases = {row["phase"]: row for row in rows if row["method"] == method}
        cells = [f"{row['s']:.3f} ({row['first_s']:.3f})" for row in phases.values()]
        good = all(row["s"] < WRAPPING[phase] and row["first_s"] < WRAPPING[phase] for phase, row in phases.items())
        size = phases["save"]
        lines.append([method, *cells, f"{size['trained']:,}", f"{size['bytes']:,}", verdict(good)])
    limits = " | ".join(f"{phase}, s (first)" for phase in WRAPPING)
    head = f"method | {limits} | trained | bytes saved | under {', '.join(f'{s:g} s' for s in WRAPPING.values())}"
    return source(rows[0]) + table(head, lines) if rows else NOT_MEASURED


SECTIONS: dict[str, Callable[[], str]] = {
    "costs": costs_table,
    "targets": summary_table,
    "cells": cells_table,
    "bounds": bounds_table,
    "floor": floor_table,
    "adapters": adapter_table,
    "llama-7b": step_table("llama-7b"),
    "llama-1b": step_table("llama-1b"),
    "roberta-base": step_table("roberta-base"),
    "minilm": step_table("minilm"),
    "contraction": contraction_table,
    "launches": launches_table,
    "compiled": compiled_table,
    "shares": shares_table,
    "processes": processes_table,
    "four bits": four_bit_table,
    "data parallel": parallel_table,
    "profile": profile_table,
    "small graphs": small_table,
    "kernels": kernel_table,
    "growth": growth_table,
    "inference": inference_table,
    "mixed": mixed_table,
    "graph training": graph_training_table,
    **POPULATION_SECTIONS,
    "cpu": cpu_table,
    "wrapping": wrapping_table,
}


def page_of(section: str) -> Path:
    """The page that has a section. Raises StopIteration where none has it."""
    return next(page for page in PAGES if f"<!-- {section}: " in page.read_text())


if __name__ == "__main__":
    for name, write in SECTIONS.items():
        page = page_of(name)
        page.write_text(filled(page.read_text(), name, write()))
    draw_growth(FIGURE)
