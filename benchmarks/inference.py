"""Tokens per second of greedy decoding with a static cache: base, merged, and adapters as they are or served.

One decoding step is a forward pass of one token per row on a cache that holds the prompt; the next token is its
argmax. Each method is timed eagerly and as one CUDA graph per step; "serving" is within ``loretta.serving``, where a
step contracts no trains (a graph always does). Each row is written when it is measured, and nothing new is begun once
the budget is spent.

    python benchmarks/inference.py --out benchmarks/results/inference.json
    python benchmarks/inference.py --tiny --out /tmp/inference.json  # tries the script on a CPU
"""

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext

import torch
from cases import SHAPES, build_base, wrap
from timing import about, add_options, captured, timed
from torch import nn
from transformers import StaticCache

from loretta import serving

BASE = "base"
MERGED, SERVING = " merged", " serving"
METHODS = ["rep q,v merged", "rep q,v", "rep q,v serving", "adp", "adp serving", "lora q,v"]


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
    name = method.removesuffix(MERGED).removesuffix(SERVING)
    model = base if name.startswith(BASE) else wrap(base, name, args.shape).eval()
    if method.endswith(MERGED):
        model.merge_adapter()
    times = []
    with serving(model) if method.endswith(SERVING) else nullcontext():
        step, restart = decoding(model, base.config, batch, args.prompt, args.new, args.device)
        run = captured(step) if mode == "graph" else step
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
        if method.endswith(MERGED):
            model.unmerge_adapter()
        model.unload()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", choices=SHAPES)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--modes", default="graph,eager")
    parser.add_argument("--methods", default=",".join(METHODS).replace("q,v", "q+v"), help="besides the base")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    add_options(parser, budget=240)
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.device, args.modes, args.prompt, args.new = "tiny", "cpu", "eager", 8, 24
    begin = time.monotonic()
    base = build_base(args.shape, device=args.device, dtype=getattr(torch, args.dtype)).eval()
    head = {"shape": args.shape, "layers": base.config.num_hidden_layers, **about(args.device, args.dtype)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for mode in args.modes.split(","):
        for batch in map(int, args.batches.split(",")):
            reference = None
            # the base once more at the end shows how far the machine itself moved
            methods = [name.replace("q+v", "q,v") for name in args.methods.split(",")]
            for method in [BASE, *methods, f"{BASE} again"]:
                if mode == "graph" and method.endswith(SERVING):
                    continue
                if time.monotonic() - begin > args.budget:
                    print(f"not measured, the budget is spent: {mode} {batch} {method}")
                    continue
                try:
                    row = measure(base, method, mode, batch, args)
                except RuntimeError as error:  # out of memory too
                    print(f"{mode} {batch} {method}: {' '.join(str(error).split())[:120]}", flush=True)
                    continue
                reference = reference or row["ms"]
                row["ratio"] = row["ms"] / reference
                rows.append(row)
                print(
                    f"{mode:6} batch {batch:3} {method:16} {row['ms']:8.3f} ms [{row['min']:.3f}, {row['max']:.3f}] "
                    f"{row['tokens_per_second']:8.0f} tokens/s x{row['ratio']:.3f}",
                    flush=True,
                )
                args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
