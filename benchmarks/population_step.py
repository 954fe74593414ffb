"""What a step of a population is made of on a GPU: kernels by kind, with torch's functions and ours, and the floor.

64 members of rep on a MiniLM and CoLA under bfloat16 autocast, 2,048 rows of 16 tokens: forward, backward and update as
one CUDA graph. The floor is the frozen base by itself, forward and backward with the gradient of its input.

    python benchmarks/population_step.py --model FOLDER --data-dir FOLDER --out benchmarks/results/population_step.json

--data-dir has cola/, or the folder of another --task, whose rows may be longer. With --device cpu, few --members and a
--limit it is tried without a GPU, in float32.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from population import KERNELS, config
from timing import about, captured, timed
from torch import Tensor
from torch.nn.functional import cross_entropy

from loretta.population import members as members_of
from loretta.population.attention import PackedAttention
from loretta.population.casts import OneCast
from loretta.population.loop import Loop
from loretta.population.population import Population
from loretta.population.training import prepare

# name -> whether norms are a kernel of ours, and the modes
VARIANTS: dict[str, tuple[bool, tuple[Callable[[int], Any], ...]]] = {
    "torch's functions": (False, ()),
    "norms": (True, ()),
    "one cast": (False, (lambda _: OneCast(),)),
    "rows beside each other": (False, (PackedAttention,)),
    "all, rows beside each other": (True, KERNELS["packed"]),
}
KINDS = {
    "attention": r"sdpa|fmha|attention|compute_dot_do_o|convert_dq",
    "products": r"nvjet|gemm|cutlass|splitK",
    "norms": r"layer_norm|_norm",
    "dropout": r"dropout|masked_scale",
    "casts": r"copy_kernel",
}


def kinds_of(replay: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of a step and their milliseconds by kind."""
    times = dict.fromkeys((*KINDS, "other"), 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    for event in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        times[kind] += event.self_device_time_total / 1e3
    return {"kernels": sum(event.count for event in events), "kinds_ms": times}


def measured(work: Callable[[], Any], device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"ms": statistics.median(timed(work, 1, device))}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    replay = captured(work)
    times = timed(replay, 20, device)
    return {"ms": statistics.median(times), "peak_bytes": torch.cuda.max_memory_allocated(), **kinds_of(replay)}


@contextmanager
def frozen_base(population: Population) -> Iterator[Any]:
    """The base alone, as it is where nothing is trained."""
    with population.released(0) as model, model.disable_adapter():
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        yield model.get_base_model()
        for parameter in trained:
            parameter.requires_grad_(True)


def floor(population: Population, part: dict[str, Tensor], modes: Any, device: str) -> dict[str, Any]:
    with frozen_base(population) as base:
        x = base.get_input_embeddings()(part["input_ids"]).detach().requires_grad_()

        def work() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode(population.size))
                logits = base(inputs_embeds=x, attention_mask=part["attention_mask"]).logits
            torch.autograd.grad(cross_entropy(logits.float(), part["labels"]), x)

        return measured(work, device)


def step(loop: Loop, part: dict[str, Tensor], ours: bool, modes: Any, device: str) -> dict[str, Any]:
    before = loop.population.values.clone()

    def work() -> None:
        loop.losses(part)
        loop._update({})

    loop.population.modes = modes
    with mock.patch.object(members_of, "has_triton", return_value=ours):
        row = measured(work, device)
    loop.population.values.copy_(before)
    return row


def batch(loop: Loop, tokens: int) -> dict[str, Tensor]:
    """The first batch whose longest row has so many tokens or more, cut to them."""
    for rows in loop.rules.order(0).split(loop.rules.batch_size, 1):
        (part,) = loop.rows["train"].parts(rows, 1)
        if part["input_ids"].shape[1] >= tokens:
            return {name: x[:, :tokens].contiguous() if x.dim() > 1 else x for name, x in part.items()}
    raise SystemExit(f"no batch has a row of {tokens} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--task", default="cola")
    parser.add_argument("--tokens", nargs="*", type=int, default=[16, 12])
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--cases", nargs="*", default=[*VARIANTS, *(f"floor, {name}" for name in KERNELS)])
    args = parser.parse_args()
    args.epochs, rows = 3, []

    def save(row: dict[str, Any]) -> None:
        rows.append({"members": args.members, "method": "rep", "task": args.task, **row})
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps({**about(args.device, "bfloat16"), "rows": rows}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        runs = [config(args, folder, "rep", args.task, k, 3, cuda_graph=True) for k in range(args.members)]
        loop = prepare(runs, Path(folder))
    loop.population.train()
    for tokens in args.tokens:
        part = batch(loop, tokens)
        for name, (ours, modes) in VARIANTS.items():
            if name in args.cases:
                save({"tokens": tokens, "case": name, **step(loop, part, ours, modes, args.device)})
        for name, modes in KERNELS.items():
            if f"floor, {name}" in args.cases:
                row = floor(loop.population, part, modes, args.device)
                save({"tokens": tokens, "case": f"floor, {name}", **row})


if __name__ == "__main__":
    main()
