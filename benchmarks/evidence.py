"""Fill docs/choosing.md and RESULTS.md, and draw README's picture, from benchmarks/results/.

    python benchmarks/evidence.py

docs/choosing.md is made from the scores on held-out training rows, by which everything is chosen; RESULTS.md from those
on the official validation rows at the rate so chosen.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from board import Board, Row, markdown, paired, signed, verdict, words
from methods import UNTRAINED
from missing import not_run
from named import named_table
from peers import PEERS
from predictions import predicted
from protocol import LEAKS, METRICS, alike, at_edge, best_rate, interval, read_rows
from rates import heads_table, one_rate_table, ranks_table, rates_table, shapes_table
from retention import forgetting_rows, forgetting_table, overfitting_table, reading_table
from runs import adaptive_table, answers_table, conditioning_tables, instruct_table, two_rates_table
from second import second_tables
from tables import RESULTS, ROOT, filled
from units import units_table
from verdicts import (
    MODELS,
    SIZES,
    at_a_glance,
    bar,
    claims,
    default_rule,
    in_short,
    pictured,
    sizes_sentence,
    standing,
    verdict_sentence,
)  # fmt: skip

from loretta.report.figures import AXIS, COLOURS, INKS, TEXT

CHOOSING, PAGE, PICTURE = ROOT / "docs" / "choosing.md", ROOT / "RESULTS.md", ROOT / "docs" / "front.svg"
README = ROOT / "README.md"
ROOM = 0.012  # of scores below and above those of the picture
WIDEST = 1_000_000  # trained parameters of what has a place on the picture's axis
DEPTH = 0.12  # below the best of them, so that those that learn little do not press the others together


def rows() -> list[Row]:
    files = sorted((*RESULTS.glob("forms_*.json"), *RESULTS.glob("peers_*.json")))
    found = alike([row for row in read_rows(files) if row["model"] in MODELS])
    searched = [row for row in found if row.get("part") == "rates"]
    centres = {(row["model"], row["method"]): float(best_rate(row)) for row in searched}
    peers = {method.name: method.like or method.name for method in PEERS if method.method.startswith("peft:")}

    def searches(row: Row) -> bool:
        """Whether a row is of a peer whose best rate, of six, was not found or is not next to its grid: it compares
        nothing."""
        centre = centres.get((row["model"], peers.get(row["method"], "")), math.inf)
        rates = [float(rate) for rate in row["held_out"]]
        return row["method"] in peers and not min(rates) / 2 <= centre <= 2 * max(rates)

    return [{**row, "part": "rates"} if searches(row) else row for row in found]


def front_table(model: str, found: Sequence[Row]) -> str:
    """Every method by what it trains: held-out scores of each task, their mean, and the chosen rates."""
    board = Board(found, model, "held_out")
    lines = []
    for method in board.methods:
        scores = [words(board.scores(method, task)) if (method, task) in board.cells else "" for task in board.tasks]
        means = board.mean_of(method)
        rates = [
            f"{float(best_rate(board.cells[method, task])):g}" + ("*" if at_edge(board.cells[method, task]) else "")
            for task in board.tasks
            if (method, task) in board.cells and method != UNTRAINED
        ]
        name = f"**{method}**" if board.family(method) == "LoRETTA" else method
        mean_words = "" if means is None else words(means)
        lines.append([name, f"{board.trained(method):,}", *scores, mean_words, board.seeds([method]), " ".join(rates)])
    columns = ["method", "trained", *board.tasks, f"mean of {len(board.common)}", "seeds", "rates"]
    return (
        f"The mean is of {', '.join(board.common)}; ± is half a 95 % interval over the seeds; `*`: the best rate is at "
        f"the edge of its grid.\n\n{markdown(lines, columns)}"
    )


def size_table(model: str, found: Sequence[Row], which: str, loss: str = "") -> str:
    """At each size the best LoRETTA form and the best other method that fit, and how sure the difference is.

    They are compared by their means, or by the loss on the task ``loss``, where a positive difference is a lower one.
    """
    board = Board(found, model, which, [loss] if loss else None)
    lines = []
    for size in SIZES:
        best, other = board.best_within(size)
        if best is None or other is None:
            continue
        both = board.among([best, other])
        scores = {name: both.scores(name, loss) for name in (best, other)} if loss else both.complete()
        difference = paired(scores[other], scores[best]) if loss else paired(scores[best], scores[other])
        lines.append(
            [
                f"{size:,}", f"{best} ({board.trained(best):,})", words(scores[best]),
                f"{other} ({board.trained(other):,})", words(scores[other]), signed(difference), verdict(difference),
            ]
        )  # fmt: skip
    score = "loss" if loss else "score"
    columns = ["at most", "best LoRETTA form", score, "best other method", score, "difference", ""]
    return markdown(lines, columns, left=2) if lines else ""


def texts_table(found: Sequence[Row], which: str) -> str:
    """The decoder's loss on short texts by size; a positive difference is a lower loss of LoRETTA's form."""
    return size_table("SmolLM2-135M-Instruct", found, which, "stories") or "Not measured yet.\n"


LADDERS = {False: [f"LoRA r={rank}" for rank in (1, 2, 4, 8)], True: ["norms", "LoRA r=1 + norms", "LoRA r=2 + norms"]}


def equal_table(model: str, found: Sequence[Row], which: str) -> str:
    """LoRETTA's forms against LoRA on query and value at the same count, with frozen and with trained norms."""
    board = Board(found, model, which)
    have = board.complete()
    lines = []
    for method in board.methods:
        if board.family(method) != "LoRETTA" or method not in have:
            continue
        count, ladder = board.trained(method), LADDERS[board.norms(method)]
        beside = board.among([method, *ladder])
        other = beside.by_count(count, ladder)
        if other is None:
            continue
        own = beside.complete()[method]
        difference = paired(own, other)
        lines.append([method, f"{count:,}", words(own), words(other), signed(difference), verdict(difference)])
    return markdown(lines, ["form", "trained", "score", "LoRA at that count", "difference", ""]) if lines else ""


def fits_table() -> str:
    """What the nearest trains of each form keep of a trained LoRA, and of random updates with its singular values."""
    file = RESULTS / "causes.json"
    if not file.exists():
        return "Not measured yet.\n"
    lines = [
        [row["form"], f"{row['trained']:,}", f"{row['kept']:.2f}", f"{row['random']:.2f}" if row["random"] else ""]
        for row in sorted(json.loads(file.read_text())["rows"], key=lambda row: row["trained"])
    ]
    return markdown(lines, ["form", "numbers", "kept of a trained LoRA", "of random updates"])


LEARNERS = (
    "shared r=1",
    "LoRA r=1",
    "norms",
    "rep",
    "rep + norms",
    "compact",
    "compact + norms",
    "adp + norms",
    "LoRA r=8",
)


def learning_table(found: Sequence[Row]) -> str:
    """The loss on training rows in the last eighth of the steps, of short and of long trainings, at the best rate."""
    rows = {(row["model"], row.get("part", "front"), row["task"], row["method"]): row for row in found}
    columns = [("front", task) for task in ("cola", "mrpc", "stsb")] + [("long", task) for task in ("mrpc", "rte")]
    lines = []
    for model in list(MODELS)[:2]:
        have = [name for name in LEARNERS if (model, "front", "mrpc", name) in rows]
        for name in sorted(have, key=lambda name: rows[model, "front", "mrpc", name]["trained"]):
            cells = [rows.get((model, part, task, name)) for part, task in columns]
            losses = [[] if row is None else row["train_loss"][best_rate(row)] for row in cells]
            trained = next(row["trained"] for row in cells if row)
            shown = [words([math.nan if x is None else x for x in of]) if of else "" for of in losses]
            lines.append([name, MODELS[model].partition(" ")[0], f"{trained:,}", *shown])
    heads = [f"{task}, 30 epochs" if part == "long" else task for part, task in columns]
    return markdown(lines, ["method", "model", "trained", *heads], left=2)


PEERS_TASKS = {
    "all-MiniLM-L6-v2": ("cola", "mrpc", "stsb"),
    "all-mpnet-base-v2": ("cola", "mrpc", "stsb"),
    "SmolLM2-135M-Instruct": ("sst2-words", "cb-words"),
}
BESIDE_PEERS = ("LoRA r=1", "norms", "shared r=1", "shared r=2", "compact")


def peers_table(found: Sequence[Row]) -> str:
    """Other methods of PEFT, in means over the tasks that they were run on, beside LoRA, the norms and ours."""
    names = {method.name for method in PEERS}
    lines = []
    for model, tasks in PEERS_TASKS.items():
        board = Board(found, model, "held_out", tasks)
        for name, scores in board.complete().items():
            if name in names:
                gaps = [board.gap(name, other) for other in BESIDE_PEERS]
                said = ["" if gap is None else signed(gap) for gap in gaps]
                lines.append([MODELS[model].partition(" ")[0], name, f"{board.trained(name):,}", words(scores), *said])
    columns = ["model", "method", "trained", "held-out mean", *(f"to {name}" for name in BESIDE_PEERS)]
    return markdown(lines, columns, left=2) if lines else "Not measured yet.\n"


def results_of(model: str, task: str, found: Sequence[Row]) -> str:
    """One task on the official rows: scores, and paired differences to LoRA r=8 and to the norms."""
    board = Board(found, model, "official")
    here = [method for method in board.methods if (method, task) in board.cells]
    lines = []
    for method in here:
        row, scores = board.cells[method, task], board.scores(method, task)
        gaps = [
            "" if method == name or name not in here else signed(board.gap_on(task, method, name))
            for name in ("LoRA r=8", "norms")
        ]
        counts = f"{row['trained']:,}", f"{row['trained'] + row['head']:,}"
        lines.append([method, *counts, words(scores), *gaps, str(len(row["seeds"]))])
    metric = METRICS[board.cells[here[0], task]["metric"]]
    return markdown(lines, ["method", "trained", "with head", metric, "to LoRA r=8", "to norms", "seeds"])


def results_page(found: Sequence[Row]) -> dict[str, str]:
    """The generated sections of RESULTS.md."""
    parts = []
    for model, shown in MODELS.items():
        board = Board(found, model, "official")
        if not board.rows:
            continue
        sizes = size_table(model, found, "official")
        said = f"{sizes_sentence(board)} {source(board.rows)}".strip()
        parts.append(f"### {shown}\n\n{said}\n\n" + (f"{sizes}\n" if sizes else ""))
        for task in board.tasks:
            leak = f" {LEAKS[task]}." if task in LEAKS else ""
            said = f"{verdict_sentence(model, task, found)}{leak}".strip()
            parts.append(f"#### {task}\n\n{said}\n\n{results_of(model, task, found)}\n")
    return {
        "at a glance": at_a_glance(found),
        "claims": claims(found),
        "standing": standing(found),
        "tables": "".join(parts).rstrip() + "\n",
        "texts": texts_table(found, "official"),
        "named": named_table(found, "official"),
        "ranks": ranks_table(found),
        "shapes": shapes_table(found),
        "heads": heads_table(found),
        "forgetting": forgetting_table(forgetting_rows()),
        "overfitting": overfitting_table(found),
        "reading": reading_table(found),
        "instruct": instruct_table(),
        "answers": answers_table(),
        "two rates": two_rates_table(),
        "not run": not_run(found),
    }


def source(some: Sequence[Row]) -> str:
    """Where the rows come from."""
    devices = ", ".join(sorted({row["device"] for row in some}))
    versions = sorted({" ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in some})
    seeds = sorted({tuple(row["seeds"]) for row in some})
    numbers = " or ".join(", ".join(map(str, of_row)) for of_row in seeds)
    return f"{devices}; {'; '.join(versions)}; seeds {numbers}; {len(some)} cells."


def choosing_sections(found: Sequence[Row]) -> dict[str, str]:
    sections = {
        "rates": rates_table(found),
        "units": units_table(),
        "second": second_tables(),
        "peers": peers_table(found),
        "one rate": one_rate_table(found),
        "fits": fits_table(),
        "learning": learning_table(found),
        "adaptive": adaptive_table(),
        "conditioning": conditioning_tables(),
        "predicted": predicted(found),
        "default": default_rule(found),
        "bar": bar(found),
        "texts": texts_table(found, "held_out"),
        "standing": standing(found, "held_out"),
        "named": named_table(found, "held_out"),
    }
    for model in MODELS:
        if any(row["model"] == model for row in found):
            made = (
                front_table(model, found),
                f"{sizes_sentence(Board(found, model, 'held_out'))}\n\n{size_table(model, found, 'held_out')}",
                equal_table(model, found, "held_out"),
            )
        else:
            made = "", "", ""
        for name, content in zip(("front", "sizes", "equal"), made, strict=True):
            sections[f"{name} {model}"] = content or "Not measured yet.\n"
    return sections


def draw(found: Sequence[Row], path: Path) -> None:
    """README's picture: the mean score against the trained parameters, of the largest encoder that was measured."""
    import matplotlib
    from matplotlib.figure import Figure

    model = pictured(found)
    board = Board(found, model, "official")
    whole = board.complete()
    points = {method: (board.trained(method), scores.mean()) for method, scores in whole.items()}
    points = {method: point for method, point in points.items() if 0 < point[0] <= WIDEST}
    counts = [count for count, _ in points.values()]
    highest = max(score for _, score in points.values())
    beneath = {method: point for method, point in points.items() if point[1] < highest - DEPTH}
    marks = {
        "LoRETTA": ("o", COLOURS[1]),
        "LoRA": ("s", COLOURS[0]),
        "PEFT": ("^", COLOURS[2]),
        "base": ("v", AXIS),
    }
    with matplotlib.rc_context({"svg.hashsalt": "front", "font.size": 9, **INKS}):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        for family, (marker, color) in marks.items():
            label = family if family != "base" else "norms, biases"
            for method, scores in whole.items():
                if board.family(method) != family or method not in points.keys() - beneath:
                    continue
                middle, half = interval(scores)
                axes.errorbar(
                    board.trained(method), middle, yerr=0 if math.isnan(half) else half, marker=marker, color=color,
                    linestyle="", capsize=2, linewidth=0.8, label=label,
                )  # fmt: skip
                label = "_"
        for method, scores in whole.items():  # far beyond the others, as all of a model is
            if board.trained(method) > WIDEST:
                axes.axhline(scores.mean(), color=TEXT, linestyle=":", linewidth=0.8, zorder=0)
                said = f"{method}, {board.trained(method) / 1e6:.0f}M: {words(scores)}"
                axes.annotate(said, (0.8 * min(counts), scores.mean()), (4, 3), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_xlim(0.8 * min(counts), 1.4 * max(counts))
        ticks = [size for size in (*SIZES, 160_000, 320_000) if 0.8 * min(counts) < size < 1.4 * max(counts)]
        axes.set_xticks(ticks, [f"{size // 1000}K" for size in ticks])
        axes.minorticks_off()
        # the whole of an interval only where it is not that of seeds that failed
        lowest = min(score for method, (_, score) in points.items() if method not in beneath)
        axes.set_ylim(lowest - ROOM, highest + 2 * ROOM)
        if beneath:
            below = ", ".join(f"{method} {score:.2f}" for method, (_, score) in beneath.items())
            axes.annotate(f"below: {below}", (0.4, 0.02), xycoords="axes fraction", fontsize=7)
        axes.set_xlabel("trained parameters, without the head")
        axes.set_ylabel(f"mean of {', '.join(board.common)} (official validation)")
        axes.set_title(f"{MODELS[model]}: {board.seeds(whole)} seeds, 95 % intervals", fontsize=9)
        axes.legend(frameon=False, loc="lower right")
        figure.draw_without_rendering()
        named = sorted(points.keys() - beneath, key=lambda method: (board.family(method) != "LoRETTA", points[method]))
        write_names(axes, {method: points[method] for method in named})
        figure.savefig(path, metadata={"Date": None})


def write_names(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Write the name of each point beside it, where none of the points and names before is in the way."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    at = {name: axes.transData.transform(point) for name, point in points.items() if 0 < point[0] <= WIDEST}
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    for name in at:
        for x, y in ((6, 0), (-6, 0), *((x, y) for far in (9, 18, 27) for y in (far, -far) for x in (2, -2))):
            text = axes.annotate(
                name, points[name], (x, y), textcoords="offset points", fontsize=7, va="center",
                ha="left" if x > 0 else "right",
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": AXIS, "shrinkA": 0} if abs(y) > 9 else None,
            )  # fmt: skip
            text.get_window_extent()  # moves it to its place
            box = Text.get_window_extent(text)  # without its line
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            continue  # no room: the tables have it
        taken.append(box)


def pages(found: Sequence[Row]) -> list[tuple[Path, dict[str, str]]]:
    return [(CHOOSING, choosing_sections(found)), (PAGE, results_page(found)), (README, {"front": in_short(found)})]


def main() -> None:
    found = rows()
    for path, sections in pages(found):
        text = path.read_text()
        for name, content in sections.items():
            text = filled(text, name, content)
        path.write_text(text)
        print(f"filled {len(sections)} sections of {path.name}")
    if found:
        draw(found, PICTURE)


if __name__ == "__main__":
    main()
