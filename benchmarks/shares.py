"""Where the CPU's time goes in a compiled step: guards, generated code, what is around it, the optimiser. Needs no GPU.

The model is as deep as a 1B LLaMA and as narrow as a tiny one, so that products cost next to nothing. What the CPU
does besides is what a step waits for on a GPU. Each method has a process of its own, and they take turns. The least of
many steps counts, since other processes can only slow a step down; so the parts need not sum to the step.

    python benchmarks/shares.py --out benchmarks/results/shares.json
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import build_base, inputs, wrap
from launches import ON_GPU
from speed import FLOOR
from timing import about
from torch._dynamo.guards import CheckFunctionManager
from torch._inductor.output_code import CompiledFxGraph

from loretta.layers import fused

METHODS = (FLOOR, "lora q,v", "rep q,v", f"adp{ON_GPU}")
PARTS = ("guards", "code forward", "code backward", "around forward", "around backward", "optimiser", "step")


class Clock:
    """Collects the milliseconds that a processor works at what it wraps."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            result = work(*args, **kwargs)
            self.found.append(1e3 * (time.thread_time() - begin))
            return result

        return timed


def work(method: str, layers: int, steps: int) -> None:
    """In a process of its own: for each line that comes in, the least of ``steps`` steps."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    base = build_base("tiny", device="cpu", dtype=torch.float32, layers=layers)
    fused.one_matrix_pays = lambda *_: method.endswith(ON_GPU)
    model = base if method == FLOOR else wrap(base, method.removesuffix(ON_GPU), "tiny")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None
    batch, code, managers = inputs(base, 1, 8), Clock(), list[Any]()
    call, made = torch.compile(model, dynamic=False), CheckFunctionManager.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        managers.append(self.guard_manager)

    def step() -> dict[str, float]:
        code.found.clear()
        times = [time.thread_time()]
        loss = call(**batch).loss
        times.append(time.thread_time())
        loss.backward()
        times.append(time.thread_time())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        batch["inputs_embeds"].grad = None
        times.append(time.thread_time())
        forward, backward, update = (1e3 * (b - a) for a, b in pairwise(times))
        first, second = code.found
        return {
            "code forward": first,
            "code backward": second,
            "around forward": forward - first,
            "around backward": backward - second,
            "optimiser": update,
            "step": forward + backward + update,
        }

    with (
        patch.object(CheckFunctionManager, "__init__", noted),
        patch.object(CompiledFxGraph, "__call__", code.around(CompiledFxGraph.__call__)),
    ):
        call(**batch).loss.backward()  # compiles
        bound = inspect.signature(type(model).forward).bind(model, **batch)
        bound.apply_defaults()
        for _ in sys.stdin:
            found, guards = [step() for _ in range(steps)], Clock()
            if model is not base:  # whose decorators have guards of their own
                check = guards.around(managers[0].check)
                assert len(managers) == 1
                assert all(check(dict(bound.arguments)) for _ in range(steps))
            least = {part: min(each[part] for each in found) for part in PARTS[1:]}
            row = {"method": method, "tensors": len(trained), "guards": min(guards.found, default=None), **least}
            print(json.dumps(row), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of each turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, required="--works" not in sys.argv)
    parser.add_argument("--works", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.works is not None:
        work(args.works, args.layers, args.steps)
        return
    own = [sys.executable, __file__, "--layers", str(args.layers), "--steps", str(args.steps), "--works"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*own, method], **pipes) for method in METHODS]
    turns: list[list[dict[str, Any]]] = []
    for _ in range(args.rounds):
        turns.append([])
        for worker in workers:
            print("go", file=worker.stdin, flush=True)
            turns[-1].append(json.loads(worker.stdout.readline()))
    rows = [
        {**own[0], **{part: min(each[part] for each in own) for part in PARTS if own[0][part]}}
        for own in zip(*turns, strict=True)
    ]
    for worker, row in zip(workers, rows, strict=True):
        worker.stdin.close()
        print(f"{row['method']:16} " + ", ".join(f"{part} {row[part] or 0:.2f}" for part in PARTS), flush=True)
    head = {"shape": "tiny", "layers": args.layers, "steps": args.steps, "rounds": args.rounds}
    args.out.write_text(json.dumps({**head, **about("cpu", "float32"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
