"""How the overhead of a training step grows: with the number of layers, with the width, with the tensor rank.

Each step is one CUDA graph of forward, backward and AdamW on a LLaMA shape; its floor is the frozen model with only
the gradient of its input. Each point is written when it is measured, and nothing new is begun once the budget is spent.

    python benchmarks/growth.py --out benchmarks/results/growth.json
    python benchmarks/growth.py --tiny --out /tmp/growth.json  # tries the script on a CPU
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator

import torch
from cases import build_llama, inputs, perturbed
from speed import step_of
from timing import about, add_options, captured, timed

from loretta import LorettaAdpConfig, LorettaRepConfig

# axis -> values, while the other two stay at these constants
CENTRE = {"layers": 8, "width": 2048, "rank": 5}
AXES = {"layers": (8, 16, 32, 80), "width": (1024, 2048, 4096, 8192), "rank": (2, 4, 8, 16, 32)}
# points and axes of a size that a CPU can step through
TINY = {"layers": 2, "width": 128, "rank": 2}, {"layers": (2, 4), "width": (128, 256), "rank": (2, 4)}
METHODS = {"rep": LorettaRepConfig, "adp": LorettaAdpConfig}


def measure(device: str, dtype: torch.dtype, size: tuple[int, int], steps: int, point: dict[str, int]) -> Iterator:
    """Rows of the floor and both methods at one point."""
    base = build_llama(layers=point["layers"], width=point["width"], device=device, dtype=dtype)
    floor = None
    for method in ("floor", *METHODS):
        model = base
        if method != "floor":
            config = METHODS[method](task_type="CAUSAL_LM", train_norms=False, tensor_rank=point["rank"])
            model = perturbed(base, config)
        batch = inputs(base, *size)
        step, trained = step_of(model, batch, model)
        times = timed(captured(step) if device == "cuda" else step, steps, device)
        ms = statistics.median(times)
        floor = floor or ms
        yield {
            **point,
            "method": method,
            "batch": size[0],
            "tokens": size[1],
            "ms": ms,
            "min": min(times),
            "max": max(times),
            "floor_ms": floor,
            "ratio": ms / floor,
            "trained": sum(parameter.numel() for parameter in trained),
        }
        del step
        if model is not base:
            model.unload()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--size", default="2x512", help="batch x tokens")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="small values on the CPU, to try the script")
    add_options(parser, budget=240)
    args = parser.parse_args()
    centre, axes = TINY if args.tiny else (CENTRE, AXES)
    if args.tiny:
        args.size, args.device, args.steps = "1x16", "cpu", 3
    batch, tokens = map(int, args.size.split("x"))
    head = {"steps": args.steps, "centre": centre, **about(args.device, args.dtype)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    begin, rows = time.monotonic(), []
    for axis in args.axes.split(","):
        for value in axes[axis]:
            if time.monotonic() - begin > args.budget:
                print(f"not measured, the budget is spent: {axis} {value}")
                continue
            point = {**centre, axis: value}
            try:
                for row in measure(args.device, getattr(torch, args.dtype), (batch, tokens), args.steps, point):
                    rows.append({"axis": axis, **row})
                    print(f"{axis:6} {value:5} {row['method']:5} {row['ms']:8.2f} ms x{row['ratio']:.3f}", flush=True)
            except RuntimeError as error:  # out of memory too
                print(f"{axis} {value}: {' '.join(str(error).split())[:120]}", flush=True)
            args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
