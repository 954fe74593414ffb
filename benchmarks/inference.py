"""Tokens per second of greedy decoding with a static cache: base, merged, and adapters as they are.

One decoding step is a forward pass of one token per row on a cache that holds the prompt; the next token is its
argmax. Each method is timed eagerly and as one CUDA graph per step. Prints a table and writes JSON.

    python benchmarks/inference.py --out benchmarks/results/inference.json
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from cases import SHAPES, build_base, wrap
from timing import about, captured, timed
from torch import nn
from transformers import StaticCache

METHODS = ["base", "rep q,v merged", "rep q,v", "adp", "lora q,v"]


def decoding(model: nn.Module, config, batch: int, prompt: int, new: int, device: str):
    """One step of greedy decoding behind a prompt, on its own cache, which starts over when it is full."""
    cache = StaticCache(config=config, max_cache_len=prompt + new)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (batch, prompt), generator=generator, device=device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    token = logits[:, -1:].argmax(-1)

    def step() -> None:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    def restart() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    return step, restart


@torch.no_grad()
def measure(base: nn.Module, method: str, mode: str, batch: int, args) -> dict:
    name = method.removesuffix(" merged")
    model = base if name == "base" else wrap(base, name, args.shape).eval()
    if method.endswith("merged"):
        model.merge_adapter()
    step, restart = decoding(model, base.config, batch, args.prompt, args.new, args.device)
    run = captured(step) if mode == "graph" else step
    times = []
    # in pieces: the cache must never run over
    for _ in range(args.rounds):
        restart()
        times += timed(run, args.new - 8, args.device)
    ms = statistics.median(times)
    row = {
        "method": method,
        "mode": mode,
        "batch": batch,
        "prompt": args.prompt,
        "new": args.new,
        "ms": ms,
        "min": min(times),
        "max": max(times),
        "tokens_per_second": 1e3 * batch / ms,
    }
    del run, step, restart
    if model is not base:
        if method.endswith("merged"):
            model.unmerge_adapter()
        model.unload()
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", choices=SHAPES)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--modes", default="graph,eager")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=300, help="seconds after which nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begin = time.monotonic()
    base = build_base(args.shape, device=args.device, dtype=getattr(torch, args.dtype)).eval()
    rows: list[dict] = []
    for mode in args.modes.split(","):
        for batch in map(int, args.batches.split(",")):
            reference = None
            for method in [*METHODS, "base"]:
                if time.monotonic() - begin > args.budget:
                    print(f"not measured, the budget is spent: {mode} {batch} {method}")
                    continue
                row = measure(base, method, mode, batch, args)
                reference = reference or row["ms"]
                row["ratio"] = row["ms"] / reference
                rows.append(row)
                print(
                    f"{mode:6} batch {batch:3} {method:16} {row['ms']:8.3f} ms [{row['min']:.3f}, {row['max']:.3f}] "
                    f"{row['tokens_per_second']:8.0f} tokens/s x{row['ratio']:.3f}",
                    flush=True,
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"shape": args.shape, **about(args.device, args.dtype), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
