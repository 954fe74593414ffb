"""Time of a training step against the frozen floor, in one process: eager, compiled, or as one CUDA graph.

"compile" is torch.compile as it is, "reduce-overhead" its mode with CUDA graphs of its own. On a GPU a row also says
how many kernels a step has and how long they take: one that takes much longer waits for the CPU. Each row is written
when it is measured, and nothing new is begun once the budget is spent.

The floor is the frozen base, forward and backward with only the gradient of its input. A method's step is forward,
backward and a fused AdamW. Prints a table and writes JSON.

    python benchmarks/speed.py --shape llama-7b --modes eager,graph --out benchmarks/results/speed-7b.json
"""

import argparse
import gc
import json
import statistics
import time

import torch
from cases import METHODS, SHAPES, build_base, inputs, wrap
from timing import about, add_options, captured, kernels, timed
from torch import nn

from loretta.tuners.contraction import Contraction

FLOOR = "floor"
# the joint contraction of a method's trains alone, forward and backward: part of the method's time
ALONE = " contraction"
COMPILED = {"compile": None, "reduce-overhead": "reduce-overhead"}


def step_of(model: nn.Module, batch: dict[str, torch.Tensor], call) -> tuple:
    """A training step, and what it updates."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = batch["labels"].is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True, capturable=on_gpu) if trained else None

    def step() -> None:
        call(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        batch["inputs_embeds"].grad = None

    return step, trained


def contraction_of(model: nn.Module) -> tuple:
    """What the wrapped model does with its trains in every step, without the model."""
    contraction = Contraction.of(model.get_base_model())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def factors() -> list[torch.Tensor]:
        return [factor for found in contraction.contract().values() for factor in found if factor.requires_grad]

    grads = [torch.ones_like(factor) for factor in factors()]

    def step() -> None:
        torch.autograd.backward(factors(), grads)
        for parameter in trained:
            parameter.grad = None

    return step, trained


def measure(base: nn.Module, args, method: str, mode: str, size: tuple[int, int]) -> dict:
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    model = base if method.startswith(FLOOR) else wrap(base, method.removesuffix(ALONE), args.shape)
    call = torch.compile(model, dynamic=False, mode=COMPILED[mode]) if mode in COMPILED else model
    if method.endswith(ALONE):
        step, trained = contraction_of(model)
    else:
        step, trained = step_of(model, inputs(base, *size), call)
    begin = time.perf_counter()
    run = captured(step) if mode == "graph" else step
    times = timed(run, args.steps, args.device)
    row = {
        "method": method,
        "mode": mode,
        "batch": size[0],
        "tokens": size[1],
        "ms": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "trained": sum(parameter.numel() for parameter in trained),
        "peak_gib": (torch.cuda.max_memory_allocated() - weights) / 2**30 if args.device == "cuda" else None,
        "setup_s": time.perf_counter() - begin,
        **(kernels(run) if args.device == "cuda" and mode != "graph" else {}),
    }
    del run, step, call
    if model is not base:
        model.unload()
    if mode in COMPILED:
        torch._dynamo.reset()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sizes", help="such as 1x256,8x512; default: those of the shape")
    parser.add_argument(
        "--methods", default=",".join([*METHODS, f"rep q,v{ALONE}", f"adp{ALONE}"]).replace("q,v", "q+v")
    )
    parser.add_argument("--modes", default="eager,graph")
    parser.add_argument("--steps", type=int, default=15)
    add_options(parser, budget=3600)
    args = parser.parse_args()
    begin = time.monotonic()
    given = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")] if args.sizes else None
    sizes = given or SHAPES[args.shape].sizes
    methods = [name.replace("q+v", "q,v") for name in args.methods.split(",")]
    base = build_base(args.shape, device=args.device, dtype=getattr(torch, args.dtype), layers=args.layers)
    head = {
        "shape": args.shape,
        "layers": base.config.num_hidden_layers,
        "steps": args.steps,
        **about(args.device, args.dtype),
    }
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for mode in args.modes.split(","):
        for size in sizes:
            floor = None
            # the floor once more at the end shows how far the machine itself moved
            for method in [FLOOR, *methods, f"{FLOOR} again"]:
                if time.monotonic() - begin > args.budget:
                    print(f"not measured, the budget is spent: {mode} {size[0]}x{size[1]} {method}", flush=True)
                    continue
                try:
                    row = measure(base, args, method, mode, size)
                except RuntimeError as error:  # out of memory too
                    print(f"{mode} {size} {method}: {' '.join(str(error).split())[:120]}", flush=True)
                    continue
                floor = floor or row["ms"]
                row["ratio"] = row["ms"] / floor
                rows.append(row)
                peak = f"{row['peak_gib']:7.2f} GiB" if row["peak_gib"] is not None else ""
                print(
                    f"{mode:8} {size[0]}x{size[1]:<5} {method:16} {row['ms']:9.2f} ms "
                    f"[{row['min']:.2f}, {row['max']:.2f}] x{row['ratio']:.3f} {peak} ({row['setup_s']:.0f} s)",
                    flush=True,
                )
                args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
