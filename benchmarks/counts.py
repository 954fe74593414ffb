"""Write docs/counts.md: every row of the paper's tables, planned from sizes alone.

python benchmarks/counts.py
"""

from pathlib import Path

from loretta.plan import PRESETS, make_plan

HEADER = """# The paper's parameter counts

Written by `python benchmarks/counts.py`; each number is what `loretta plan --preset NAME` plans on the meta device,
and a test holds that the same number trains after injection. "Printed" is what the paper's table shows.

| preset | table | cores | biases | norms | head | trained | printed |
|---|---|---:|---:|---:|---:|---:|---|
"""


def page() -> str:
    """The page as Markdown."""
    lines = []
    for name, preset in PRESETS.items():
        result = make_plan(preset=name)
        plan = result.plan
        parts = [""] * 4 if plan is None else [plan.cores, plan.biases, plan.extras.norms, plan.extras.head]
        cells = [f"`{name}`", preset.table, *(f"{part:,}" if part != "" else "" for part in parts)]
        lines.append("| " + " | ".join([*cells, f"{result.trainable:,}", preset.printed]) + " |")
    notes = [f"* `{name}`: {preset.note}." for name, preset in PRESETS.items() if preset.note]
    return HEADER + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs" / "counts.md"
    target.write_text(page(), encoding="utf-8")
    print(f"wrote {target}")
