"""Fill the marked tables of README and docs from benchmarks/results/.

python benchmarks/tables.py
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

from loretta.cli.demo import render_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GRPO_STEPS = (5, 10, 20)  # whose mean reward is shown


def demo_table() -> str:
    """The demo's table as the demo printed it."""
    return render_table(json.loads((RESULTS / "demo.json").read_text())["rows"])


def learning_rate_table() -> str:
    """Mean and standard deviation over seeds for each method and rate."""
    points = defaultdict(list)
    for row in json.loads((RESULTS / "learning_rates.json").read_text())["rows"]:
        points[row["quick"], row["method"], row["learning_rate"]].append(row)
    rows = []
    for (quick, method, rate), runs in sorted(points.items()):
        scores = [[run[name] for run in runs] for name in ("validation", "test")]
        words = [f"{mean(column):.3f} ± {stdev(column):.3f}" for column in scores]
        rows.append(["quick" if quick else "whole", method, f"{rate:g}", *words, str(len(runs))])
    frame = pd.DataFrame(rows, columns=["demo", "method", "learning rate", "validation", "test", "seeds"])
    return frame.to_markdown(index=False, disable_numparse=True, colalign=["left", "left", *4 * ["right"]]) + "\n"


def forms_table(model: str) -> str:
    """The forms that were tried on one model, by what they train: mean ± standard deviation at the best rate."""
    rows = [row for row in json.loads((RESULTS / "forms.json").read_text()) if row["model"] == model]
    tasks = [task for task in ("cola", "mrpc", "stsb") if any(row["task"] == task for row in rows)]
    cells: dict[tuple[int, str], dict[str, tuple[float, float, float]]] = defaultdict(dict)
    for row in rows:
        cells[row["count"], row["form"]][row["task"]] = best_rate(row)
    lines = []
    for (count, form), by_task in sorted(cells.items()):
        means = [by_task[task][1] for task in tasks if task in by_task]
        scores = [f"{by_task[task][1]:.3f} ± {by_task[task][2]:.3f}" if task in by_task else "" for task in tasks]
        rates = sorted({by_task[task][0] for task in by_task})
        whole = f"{mean(means):.3f}" if len(means) == len(tasks) else ""
        lines.append([form, f"{count:,}", *scores, whole, ", ".join(f"{rate:g}" for rate in rates)])
    frame = pd.DataFrame(lines, columns=["form", "trained", *tasks, "mean", "best rates"])
    align = ["left", *(["right"] * (len(tasks) + 2)), "left"]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def best_rate(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of one form on one task: the learning rate with the best mean, that mean, and the deviation over the seeds."""
    rate = max(row["scores"], key=lambda rate: mean(row["scores"][rate]))
    scores = row["scores"][rate]
    return float(rate), mean(scores), stdev(scores) if len(scores) > 1 else 0.0


def grpo_table() -> str:
    """Of each model the rewards of each seed before and after training, and the bytes of a weight sync."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("grpo*.json"))]
    return "\n\n".join(f"{report['model']}:\n\n{_grpo_tables(report)}" for report in reports) + "\n"


def _grpo_tables(report: Mapping[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        n = len(row["curve"])
        shown = [f"{row['curve'][k - 1]:.2f}" if k <= n else "" for k in GRPO_STEPS]
        rows.append([str(row["seed"]), f"{row['untrained']:.2f}", *shown, f"{row['trained']:.2f}", str(n)])
    steps = [f"step {k}" for k in GRPO_STEPS]
    rewards = pd.DataFrame(rows, columns=["seed", "reward untrained", *steps, "trained", "updates"])
    largest = report["bytes"]["LoRA r=8"]
    sizes = [[name, f"{size:,}", f"{size / largest:.2f}"] for name, size in report["bytes"].items()]
    synced = pd.DataFrame(sizes, columns=["weights of a sync", "bytes", "of LoRA r=8"])
    tables = [
        frame.to_markdown(index=False, disable_numparse=True, colalign=["left", *["right"] * (len(frame.columns) - 1)])
        for frame in (rewards, synced)
    ]
    return "\n\n".join(tables)


def experts_table() -> str:
    """Each form on the experts of a small mixture at its best rate, below what the frozen mixture does."""
    report = json.loads((RESULTS / "experts.json").read_text())
    frozen = "frozen, one norm trained"
    rows = [["the mixture as it was", "0", f"{report['base_loss']['tuned']:.3f}", "", f"{report['ms'][frozen]:.0f}"]]
    for form in dict.fromkeys(row["form"] for row in report["rows"]):
        runs = [row for row in report["rows"] if row["form"] == form]
        rate = min((row for row in runs if row["seed"] == 0), key=lambda row: row["chosen_on"])["rate"]
        losses = [row["loss"] for row in runs if row["rate"] == rate]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        rows.append(
            [form, f"{runs[0]['trained']:,}", f"{mean(losses):.3f}{spread}", f"{rate:g}", f"{report['ms'][form]:.0f}"]
        )
    frame = pd.DataFrame(rows, columns=["form", "trained", "loss", "rate", "step, ms of CPU"])
    return frame.to_markdown(index=False, disable_numparse=True, colalign=["left", *4 * ["right"]]) + "\n"


SECTIONS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "demo"): demo_table,
    ("docs/decisions.md", "learning rates"): learning_rate_table,
    ("examples/README.md", "grpo"): grpo_table,
    ("docs/experts.md", "experts"): experts_table,
    ("docs/choosing.md", "MiniLM"): partial(forms_table, "all-MiniLM-L6-v2"),
    ("docs/choosing.md", "MPNet"): partial(forms_table, "all-mpnet-base-v2"),
}


def filled(text: str, name: str, table: str) -> str:
    """``text`` with the section ``name`` replaced. Raises ValueError when the marks are missing."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no section {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{table}{match[2]}", text)


if __name__ == "__main__":
    for (file, name), table in SECTIONS.items():
        path = ROOT / file
        path.write_text(filled(path.read_text(), name, table()))
        print(f"filled {name} in {file}")
