"""Fill the marked tables of README and docs from benchmarks/results/.

python benchmarks/tables.py
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from loretta.cli.demo import render_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table() -> str:
    """The demo's table as the demo printed it."""
    return render_table(json.loads((RESULTS / "demo.json").read_text())["rows"])


def learning_rate_table() -> str:
    """Mean and standard deviation over seeds for each method and rate."""
    points = defaultdict(list)
    for row in json.loads((RESULTS / "learning_rates.json").read_text())["rows"]:
        points[row["method"], row["learning_rate"]].append(row)
    rows = []
    for (method, rate), runs in sorted(points.items()):
        scores = [[run[name] for run in runs] for name in ("validation", "test")]
        words = [f"{mean(column):.3f} ± {stdev(column):.3f}" for column in scores]
        rows.append([method, f"{rate:g}", *words, str(len(runs))])
    frame = pd.DataFrame(rows, columns=["method", "learning rate", "validation", "test", "seeds"])
    return frame.to_markdown(index=False, disable_numparse=True, colalign=["left", *4 * ["right"]]) + "\n"


SECTIONS = {("README.md", "demo"): demo_table, ("docs/decisions.md", "learning rates"): learning_rate_table}


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
