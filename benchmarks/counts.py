"""Write docs/counts.md: every row of the paper's tables, planned from sizes alone.

python benchmarks/counts.py
"""

from pathlib import Path

import pandas as pd

from loretta.plan import PRESETS, make_plan

HEADER = """# The paper's parameter counts

Written by `python benchmarks/counts.py`; each number is what `loretta plan --preset NAME` plans on the meta device,
and a test holds that the same number trains after injection. "Printed" is what the paper's table shows.

"""


def page() -> str:
    """The page as Markdown."""
    rows = []
    for name, preset in PRESETS.items():
        result = make_plan(preset=name)
        plan = result.plan
        parts = [None] * 4 if plan is None else [plan.cores, plan.biases, plan.copies.norms, plan.copies.head]
        counts = ["" if part is None else f"{part:,}" for part in [*parts, result.trainable]]
        rows.append([f"`{name}`", preset.table, *counts, preset.printed])
    columns = ["preset", "table", "cores", "biases", "norms", "head", "trained", "printed"]
    aligned = ["left", "left", *5 * ["right"], "left"]
    table = pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True, colalign=aligned)
    notes = [f"* `{name}`: {preset.note}." for name, preset in PRESETS.items() if preset.note]
    return HEADER + table + "\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs" / "counts.md"
    target.write_text(page(), encoding="utf-8")
    print(f"wrote {target}")
