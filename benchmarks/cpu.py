"""Time of a training step on a CPU against PEFT's LoRA, the methods taking turns: a machine that slows down slows all.

A step is forward, backward and AdamW; the floor is the frozen base with only the gradient of its input. Each method
has a model of its own, and each round steps all of them once. Prints a table and writes JSON.

    python benchmarks/cpu.py --out benchmarks/results/cpu.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from cases import SHAPES, build_base, inputs, wrap
from speed import FLOOR, step_of
from timing import WARM_UP, about

REFERENCE = "lora q,v"
METHODS = [FLOOR, REFERENCE, "rep q,v", "adp", "rep q,v norms", "adp norms", f"{REFERENCE} again"]


def measure(shape: str, size: tuple[int, int], rounds: int) -> list[dict]:
    """A row for each method at one size."""
    steps, trained, times = {}, {}, {method: [] for method in METHODS}
    for method in METHODS:
        base = build_base(shape, device="cpu", dtype=torch.float32)
        model = base if method == FLOOR else wrap(base, method.removesuffix(" again"), shape)
        steps[method], trained[method] = step_of(model, inputs(base, *size), model)
    for number in range(WARM_UP + rounds):
        # turned around every other round: no method always follows the same one
        for method in METHODS if number % 2 else reversed(METHODS):
            begin = time.perf_counter()
            steps[method]()
            if number >= WARM_UP:
                times[method].append(1e3 * (time.perf_counter() - begin))
    medians = {method: statistics.median(times[method]) for method in METHODS}
    return [
        {
            "shape": shape,
            "method": method,
            "batch": size[0],
            "tokens": size[1],
            "ms": medians[method],
            "min": min(times[method]),
            "max": max(times[method]),
            "lora_ms": medians[REFERENCE],
            "ratio": medians[method] / medians[REFERENCE],
            "trained": sum(parameter.numel() for parameter in trained[method]),
        }
        for method in METHODS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="minilm,stories260k")
    parser.add_argument("--sizes", help="such as 16x64,32x128; default: those of the shape")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    head = {"rounds": args.rounds, **about("cpu", "float32")}
    given = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")] if args.sizes else None
    rows: list[dict] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for shape in args.shapes.split(","):
        for size in given or SHAPES[shape].sizes:
            for row in measure(shape, size, args.rounds):
                rows.append(row)
                print(
                    f"{shape:12} {size[0]}x{size[1]:<4} {row['method']:16} {row['ms']:8.2f} ms "
                    f"[{row['min']:.2f}, {row['max']:.2f}] x{row['ratio']:.3f}",
                    flush=True,
                )
            args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
