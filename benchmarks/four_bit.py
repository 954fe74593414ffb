"""A LLaMA whose base is in 4 bits, trained on one GPU: step, bytes, and the frozen floor in the same process.

The weights are random, and made and quantized matrix by matrix, so that a 70B shape takes 35 GB and never 140. The
blocks are checkpointed. Needs bitsandbytes. Each row is written when it is measured.

    python benchmarks/four_bit.py --out benchmarks/results/four_bit.json
    python benchmarks/four_bit.py --shape tiny --size 1 16 --device cpu --out /tmp/four_bit.json
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cases import METHODS, SHAPES, inputs, perturbed
from timing import about, timed
from torch import nn
from transformers import AutoModelForCausalLM

FLOOR = "floor"


def in_four_bits(shape: str, layers: int | None, device: str) -> nn.Module:
    """A frozen LLaMA whose blocks hold 4-bit linear layers; norms, embedding and head are in bfloat16."""
    import bitsandbytes as bnb

    config: Any = SHAPES[shape].config()
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            size = module.in_features, module.out_features
            packed = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            weight = 0.02 * torch.randn(*module.weight.shape, dtype=torch.bfloat16, device=device)
            packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed).to(device)
            model.set_submodule(name, packed)
        elif name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config=config).to(device))  # the angles are computed
        elif module._parameters and not list(module.children()):
            module.to_empty(device=device)
            with torch.no_grad():
                for weight in module.parameters():
                    weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 0.02)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).train()


def measure(base: nn.Module, method: str, size: tuple[int, int], times: int, device: str) -> dict[str, Any]:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = base if method == FLOOR else perturbed(base, METHODS[method]("CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
    batch = inputs(base, *size)

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        batch["inputs_embeds"].grad = None

    found = timed(step, times, device)
    row = {"method": method, "batch": size[0], "tokens": size[1], "trained": sum(each.numel() for each in trained)}
    row |= {"ms": statistics.median(found), "min": min(found), "max": max(found)}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    if model is not base:
        model.unload()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-70b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", type=int, nargs=2, metavar=("BATCH", "TOKENS"))
    parser.add_argument("--methods", default="lora q+v,rep q+v,adp")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begin = time.monotonic()
    base = in_four_bits(args.shape, args.layers, args.device)
    head = {"shape": args.shape, "layers": base.config.num_hidden_layers, **about(args.device, "bfloat16")}
    head["build_seconds"] = time.monotonic() - begin
    rows: list[dict[str, Any]] = []
    batch, tokens = args.size or SHAPES[args.shape].sizes[0]
    for method in [FLOOR, *(name.replace("q+v", "q,v") for name in args.methods.split(","))]:
        row = measure(base, method, (batch, tokens), args.steps, args.device)
        row["ratio"] = row["ms"] / (rows[0]["ms"] if rows else row["ms"])
        rows.append(row)
        print(f"{method:10} {row['ms']:9.1f} ms x{row['ratio']:.3f} {row['peak_gib'] or 0:.1f} GiB", flush=True)
        args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
