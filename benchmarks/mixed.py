"""One forward pass of a batch whose rows name adapters of their own: 1, 8 and 64 of them, beside PEFT's LoRA.

Every row names one adapter, in turn, so that a batch of 64 rows may name 64. The base is the same batch without names.
Each row is written when it is measured, and nothing new is begun once the budget is spent.

    python benchmarks/mixed.py --out benchmarks/results/mixed.json
    python benchmarks/mixed.py --shape tiny --device cpu --rows 8 --adapters 1,8 --out /tmp/mixed.json
"""

import argparse
import gc
import json
import statistics
import time

import torch
from cases import METHODS, SHAPES, build_base, perturbed
from timing import about, add_options, timed
from torch import nn

BASE = "base"


def wrapped(base: nn.Module, method: str, shape: str, adapters: int) -> nn.Module:
    """``base`` with as many adapters, none of which is at its start."""
    config = METHODS[method](SHAPES[shape].task_type)
    model = perturbed(base, config)
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", METHODS[method](SHAPES[shape].task_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".a{number}." in name for number in range(1, adapters)):
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--adapters", default="1,8,64")
    parser.add_argument("--methods", default="lora q+v,rep q+v,adp")
    parser.add_argument("--steps", type=int, default=5)
    add_options(parser, budget=60)
    args = parser.parse_args()
    begin = time.monotonic()
    base = build_base(args.shape, device=args.device, dtype=getattr(torch, args.dtype), layers=args.layers).eval()
    head = {"shape": args.shape, "layers": base.config.num_hidden_layers, **about(args.device, args.dtype)}
    ids = torch.randint(5, base.config.vocab_size, (args.rows, args.tokens), device=args.device)
    rows: list[dict] = []
    reference = None
    for adapters in map(int, args.adapters.split(",")):
        for method in [BASE, *(name.replace("q+v", "q,v") for name in args.methods.split(","))]:
            if time.monotonic() - begin > args.budget:
                print(f"not measured, the budget is spent: {adapters} {method}", flush=True)
                continue
            model = base if method == BASE else wrapped(base, method, args.shape, adapters)
            names = ["default", *(f"a{number}" for number in range(1, adapters))]
            options = {} if method == BASE else {"adapter_names": [names[row % adapters] for row in range(args.rows)]}
            with torch.no_grad():
                times = timed(lambda m=model, o=options: m(input_ids=ids, **o), args.steps, args.device)
            ms = statistics.median(times)
            reference = reference or ms
            row = {"method": method, "adapters": adapters, "batch": args.rows, "tokens": args.tokens, "ms": ms}
            rows.append({**row, "min": min(times), "max": max(times), "ratio": ms / reference})
            print(f"{adapters:3} adapters {method:10} {ms:9.2f} ms x{ms / reference:.3f}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            if model is not base:
                model.unload()
            gc.collect()


if __name__ == "__main__":
    main()
