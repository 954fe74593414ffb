"""Which learning rates the demo should use: every method over a grid of equal size, on validation, with seeds.

    python benchmarks/learning_rates.py -o benchmarks/results/learning_rates.json

Seeds and rates of a method are trained at once, as a population, on the GPU where there is one. A row is one run of the
demo's length, or with --quick of its short form, and says on which machine and with which versions it was made: methods
of one form are compared on one machine alone. The last lines are means.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from timing import about

from loretta.cli.demo import HEAD_LEARNING_RATE, LEARNING_RATES, encoder_folder, run_config
from loretta.population.training import train_together

HEAD_RATES = (0.03, 0.1, 0.2, 0.3, 0.6)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def measure(method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every seed of a method at every rate; the head alone over rates of its own, others with the demo's for theirs."""
    points = [
        {"learning_rate": rate, "head_learning_rate": rate if method == "head" else HEAD_LEARNING_RATE, "seed": seed}
        for rate in (HEAD_RATES if method == "head" else RATES)
        for seed in range(args.seeds)
    ]
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"cpu": not torch.cuda.is_available()}
        if args.max_steps is not None:
            changes["max_steps"] = args.max_steps
        configs = [
            run_config(method, Path(folder) / str(k), quick=args.quick, model=args.model).model_copy(
                update={**point, **changes}
            )
            for k, point in enumerate(points)
        ]
        records = train_together(configs)
    return [
        {
            "method": method,
            **point,
            "quick": args.quick,
            "epochs": record.config["epochs"],
            "validation": record.validation["accuracy"],
            "test": (record.test or {})["accuracy"],
            "trainable": record.parameters.trainable,
            **made_here(),
        }
        for point, record in zip(points, records, strict=True)
    ]


def made_here() -> dict[str, Any]:
    """The machine and the versions that a row is of."""
    found = about("cuda" if torch.cuda.is_available() else "cpu", "float32")
    return {key: found[key] for key in ("device", "processor", "versions")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--model", help="folder of the encoder; default: the packaged one")
    parser.add_argument("--quick", action="store_true", help="the demo's short form")
    parser.add_argument("--max-steps", type=int, help="for a dry run")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/learning_rates.json"))
    args = parser.parse_args()
    args.model = args.model or encoder_folder()
    rows: list[dict[str, Any]] = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    rows = [row for row in rows if row["method"] not in args.methods or row["quick"] != args.quick]
    others = {r["method"] for r in rows if r["quick"] == args.quick and not made_here().items() <= r.items()}
    if others:
        parser.error(
            f"{', '.join(sorted(others))} in '{args.output}' were measured on another machine or with other versions, "
            "and cannot join these: measure all methods here (no --methods), or give another --output"
        )
    for method in args.methods:
        rows += measure(method, args)
        write(args.output, rows)
    summarise([row for row in rows if row["quick"] == args.quick])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: (row["quick"], row["method"], row["learning_rate"], row["seed"]))
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def summarise(rows: list[dict[str, Any]]) -> None:
    points = defaultdict(list)
    for row in rows:
        points[row["method"], row["learning_rate"]].append(row)
    for (method, rate), group in sorted(points.items()):
        means = [f"{name} {mean(row[name] for row in group):.4f}" for name in ("validation", "test")]
        spread = stdev(row["test"] for row in group) if len(group) > 1 else 0.0
        print(f"{method:8} {rate:<6g} {'  '.join(means)} (sd {spread:.4f})  {group[0]['trainable']:,} trained")


if __name__ == "__main__":
    main()
