"""What an adapter adds to a small step that is one CUDA graph, kernel by kernel, with an empty kernel as the bound.

"empty kernel" is the frozen floor with one kernel that does nothing behind each module that rep adapts, forward and
backward: no adapter that launches anything can be faster. Each method's kernels are those of a replay, as the profiler
sees them, without as many of the same name as the floor has. Prints tables and writes JSON.

    python benchmarks/small_graphs.py --out benchmarks/results/small_graphs.json
    python benchmarks/small_graphs.py --shapes tiny --device cpu --dtype float32 --out /tmp/small_graphs.json
"""

import argparse
import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from cases import SHAPES, build_base, inputs, wrap
from speed import FLOOR, step_of
from timing import about, add_options, captured, timed
from torch import Tensor, nn

EMPTY = "empty kernel"
METHODS = ("lora q,v", "rep q,v", "adp")
MODULES = (".q_proj", ".v_proj", ".query", ".value")  # what rep adapts

Row = dict[str, Any]


def nothing(device: str) -> Callable[[], None]:
    """A kernel that does nothing."""
    if device == "cpu":
        return lambda: None
    import triton

    @triton.jit
    def nothing_kernel(count):
        return

    return lambda: nothing_kernel[(1,)](0)


class Empty(torch.autograd.Function):
    """The same tensor, behind an empty kernel, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, launch: Callable[[], None]) -> Tensor:
        ctx.launch = launch
        launch()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.launch()
        return grads[0], None


def with_empty_kernels(base: nn.Module, device: str) -> list[Any]:
    """Hooks that launch them; to be removed."""
    launch = nothing(device)

    def behind(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return Empty.apply(output, launch)  # type: ignore[no-any-return,no-untyped-call]

    return [m.register_forward_hook(behind) for name, m in base.named_modules() if name.endswith(MODULES)]


def kernels_of(run: Callable[[], Any], times: int) -> dict[str, tuple[int, float]]:
    """How often each kernel runs in one call, and the microseconds of all its runs there; empty where that fails."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(times):
                run()
            torch.cuda.synchronize()
    except RuntimeError:
        return {}
    count: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            spent[event.name] += event.self_device_time_total
    return {name: (count[name] // times, spent[name] / times) for name in count}


def beyond(kernels: dict[str, tuple[int, float]], floor: dict[str, tuple[int, float]]) -> list[Row]:
    """The kernels that the floor has not, and how much longer those take that it has; the longest first."""
    rows = []
    for name in kernels.keys() | floor.keys():
        (count, us), (floor_count, floor_us) = kernels.get(name, (0, 0.0)), floor.get(name, (0, 0.0))
        rows.append({"kernel": name[:90], "count": count - floor_count, "us": us - floor_us})
    return sorted((row for row in rows if row["count"] or abs(row["us"]) >= 1), key=lambda row: -abs(row["us"]))


def measure(base: nn.Module, method: str, shape: str, size: tuple[int, int], args: argparse.Namespace) -> tuple:
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    hooks = with_empty_kernels(base, args.device) if method == EMPTY else []
    model = base if method in (FLOOR, EMPTY) else wrap(base, method, shape)
    step, _ = step_of(model, inputs(base, *size), model)
    run = captured(step) if args.device == "cuda" else step
    times = timed(run, args.steps, args.device)
    found = kernels_of(run, 5) if args.device == "cuda" else {}
    row = {"shape": shape, "method": method, "batch": size[0], "tokens": size[1], "ms": statistics.median(times)}
    row |= {"min": min(times), "max": max(times), "modules": len(hooks) or None}
    row["kernels"] = sum(count for count, _ in found.values())
    row["gpu_ms"] = sum(us for _, us in found.values()) / 1e3
    del run, step
    for hook in hooks:
        hook.remove()
    if model is not base:
        model.unload()
    return row, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="llama-7b,llama-1b,roberta-base")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--methods", default=",".join(METHODS).replace("q,v", "q+v"))
    parser.add_argument("--steps", type=int, default=40)
    add_options(parser, budget=3600)
    args = parser.parse_args()
    begin = time.monotonic()
    rows: list[Row] = []
    for shape in args.shapes.split(","):
        base = build_base(shape, device=args.device, dtype=getattr(torch, args.dtype), layers=args.layers)
        size, floor = SHAPES[shape].sizes[0], {}
        for method in [FLOOR, EMPTY, *(name.replace("q+v", "q,v") for name in args.methods.split(","))]:
            if time.monotonic() - begin > args.budget:
                print(f"not measured, the budget is spent: {shape} {method}", flush=True)
                continue
            row, found = measure(base, method, shape, size, args)
            if method == FLOOR:
                floor, reference = found, row["ms"]
            more = beyond(found, floor)
            rows.append({**row, "layers": base.config.num_hidden_layers, "ratio": row["ms"] / reference, "more": more})
            print(
                f"{shape} {size[0]}x{size[1]} {method:12} {row['ms']:8.3f} ms [{row['min']:.3f}, {row['max']:.3f}] "
                f"x{rows[-1]['ratio']:.4f} {row['kernels']} kernels, {row['gpu_ms']:.3f} ms",
                flush=True,
            )
            for each in more[:12]:
                print(f"    {each['count']:5} {each['us']:9.1f} us  {each['kernel'][:80]}", flush=True)
            args.out.write_text(json.dumps({**about(args.device, args.dtype), "rows": rows}, indent=1) + "\n")
        del base


if __name__ == "__main__":
    main()
