"""Seconds to wrap a 7B-shaped model, to save its adapter and to load it again, on a CPU.

The base has all its weights in memory of the process, allocated and never written: to wrap, save and load reads none
of them but the norms that are trained. Adapters are made with real starting values. Loading includes the wrapping. The
methods take turns, and the first round of each stands apart. Prints a table and writes JSON.

    python benchmarks/wrapping.py --out benchmarks/results/wrapping.json
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from cases import METHODS, SHAPES
from peft import PeftModel, get_peft_model
from timing import about
from torch import nn
from transformers import AutoModelForCausalLM

MEASURED = ["lora q,v", "lora all-linear", "rep q,v", "adp", "rep q,v norms", "adp norms"]
PHASES = ["wrap", "save", "load"]


def build(shape: str) -> nn.Module:
    """A base whose weights are allocated and hold whatever was there."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=torch.bfloat16)
    return base.to_empty(device="cpu").requires_grad_(False)


def round_of(base: nn.Module, method: str, shape: str) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each phase, and the sizes of what was made."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        model = get_peft_model(base, METHODS[method](SHAPES[shape].task_type))
        seconds["wrap"] = time.perf_counter() - begin
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        begin = time.perf_counter()
        model.save_pretrained(folder)
        seconds["save"] = time.perf_counter() - begin
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        model.unload()
        begin = time.perf_counter()
        model = PeftModel.from_pretrained(base, folder)
        seconds["load"] = time.perf_counter() - begin
        model.unload()
    return seconds, {"trained": trained, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # a base without a name, whose config is not to be found
    base = build(args.shape)
    found = {method: [] for method in MEASURED}
    sizes = {}
    for _ in range(1 + args.rounds):
        for method in MEASURED:
            seconds, sizes[method] = round_of(base, method, args.shape)
            found[method].append(seconds)
    rows = []
    for method in MEASURED:
        for phase in PHASES:
            first, *times = [seconds[phase] for seconds in found[method]]
            row = {"method": method, "phase": phase, "s": statistics.median(times), "min": min(times)}
            reference = statistics.median(seconds[phase] for seconds in found[MEASURED[0]][1:])
            rows.append({**row, "max": max(times), "first_s": first, "lora_s": reference, **sizes[method]})
            rows[-1]["ratio"] = row["s"] / reference
            print(f"{method:16} {phase:5} {row['s']:.3f} s [{min(times):.3f}, {max(times):.3f}], first {first:.3f}")
    head = {"shape": args.shape, "layers": base.config.num_hidden_layers, "rounds": args.rounds}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**head, **about("cpu", "bfloat16"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
