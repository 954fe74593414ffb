"""Which learning rates the demo should use: every method over a grid, on validation, with seeds.

    python benchmarks/learning_rates.py --seeds 3 --processes 8 -o benchmarks/results/learning_rates.json

Runs on the GPU where there is one. Each row is one training run of the demo's length; the last lines are means.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

HEAD_RATES = (0.01, 0.03, 0.1, 0.3)
RATES = {
    "adp": (1e-3, 2e-3, 4e-3, 8e-3),
    "rep": (1e-3, 2e-3, 4e-3, 8e-3),
    "lora": (1e-3, 2e-3, 4e-3, 8e-3),
    "norms": (1e-3, 2e-3, 4e-3, 8e-3),
}


def grid(seeds: int) -> list[dict[str, Any]]:
    """Head-only over its rates; the others over theirs, with the head at the demo's rate."""
    from loretta.cli.demo import HEAD_LEARNING_RATE

    points = [{"method": "head", "learning_rate": rate, "head_learning_rate": rate} for rate in HEAD_RATES]
    points += [
        {"method": method, "learning_rate": rate, "head_learning_rate": HEAD_LEARNING_RATE}
        for method, rates in RATES.items()
        for rate in rates
    ]
    return [{**point, "seed": seed} for seed in range(seeds) for point in points]


def run(job: tuple[dict[str, Any], str, dict[str, Any]]) -> dict[str, Any]:
    point, model, changes = job
    import warnings

    import torch

    from loretta.cli.demo import run_config
    from loretta.training.run import train

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(point["method"], Path(folder), quick=False, model=model)
        record = train(config.model_copy(update={**point, **changes, "cpu": False}))
    return {
        **point,
        "epochs": record.config["epochs"],
        "validation": record.validation["accuracy"],
        "test": (record.test or {})["accuracy"],
        "trainable": record.parameters.trainable,
        "seconds": round(record.train_seconds, 1),
        "device": record.device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model", help="folder of the encoder; default: the packaged one")
    parser.add_argument("--epochs", type=float, help="default: the demo's")
    parser.add_argument("--limit", type=int, help="rows a split, for a dry run")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/learning_rates.json"))
    args = parser.parse_args()
    if args.model is None:
        from loretta.cli.demo import encoder_folder

        args.model = encoder_folder()
    changes = {key: value for key in ("epochs", "limit") if (value := getattr(args, key)) is not None}
    jobs = [(point, args.model, changes) for point in grid(args.seeds)]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        rows = []
        for row in pool.imap_unordered(run, jobs):
            rows.append(row)
            write(args.output, rows, len(jobs))
    summarise(rows)


def write(path: Path, rows: list[dict[str, Any]], wanted: int) -> None:
    packages = ("torch", "transformers", "peft")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    rows = sorted(rows, key=lambda row: (row["method"], row["learning_rate"], row["seed"]))
    content = {"wanted": wanted, "versions": versions, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summarise(rows: list[dict[str, Any]]) -> None:
    points = defaultdict(list)
    for row in rows:
        points[row["method"], row["learning_rate"]].append(row)
    for (method, rate), group in sorted(points.items()):
        scores = [f"{name} {mean(row[name] for row in group):.4f}" for name in ("validation", "test")]
        print(f"{method:6} {rate:<6g} {'  '.join(scores)}  ({len(group)} seeds)")


if __name__ == "__main__":
    main()
