"""What a step of a population is made of on a GPU: kernels by kind, with torch's functions and ours, and the floor.

64 members of rep on a MiniLM and CoLA under bfloat16 autocast, 2,048 rows of 16 tokens: forward, backward and update as
one CUDA graph. The floor is the frozen base by itself, forward and backward with the gradient of its input; "compiled"
has what lies between its products and its attention compiled by inductor.

    python benchmarks/population_step.py --model FOLDER --data-dir FOLDER --out benchmarks/results/population_step.json

--data-dir has cola/, or the folder of another --task, whose rows may be longer. With --device cpu, few --members and a
--limit it is tried without a GPU, in float32.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from population import KERNELS, config
from timing import about, captured, kinds_of, timed
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
FLOORS: dict[str, tuple[Callable[[int], Any], ...]] = {
    **{f"floor, {name}": modes for name, modes in KERNELS.items()},
    "floor, packed, compiled": (PackedAttention,),  # inductor casts once by itself
}


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


@contextmanager
def compiled_between(base: Any) -> Iterator[None]:
    """Until the block ends, an encoder's layers are compiled, without their attention."""
    layers = base.base_model.encoder.layer
    modules = [module for layer in layers for module in (layer.attention.output, layer.intermediate, layer.output)]
    for module in modules:
        module.compile()
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def floor(population: Population, part: dict[str, Tensor], modes: Any, device: str, compiled: bool) -> dict[str, Any]:
    with frozen_base(population) as base, compiled_between(base) if compiled else nullcontext():
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


def padded(loop: Loop) -> float:
    """The tokens that an epoch has for each of its examples, as its steps are cut and padded."""
    order = loop.rules.order(0)
    parts = (part for rows in order.split(loop.rules.batch_size, 1) for part in loop.in_parts(rows))
    return sum(part["input_ids"].numel() for part in parts) / order.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--method", default="rep")
    parser.add_argument("--task", default="cola")
    parser.add_argument("--tokens", nargs="*", type=int, default=[16, 12])
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--cases", nargs="*", default=[*VARIANTS, *FLOORS])
    args = parser.parse_args()
    args.epochs, rows = 3, []

    def save(row: dict[str, Any]) -> None:
        about_task = {"task": args.task, "tokens_an_example": mean_tokens, "padded_tokens_an_example": padded_tokens}
        n_rows = args.members * loop.rules.batch_size
        rows.append({"members": args.members, "method": args.method, "rows": n_rows, **about_task, **row})
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps({**about(args.device, "bfloat16"), "rows": rows}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        runs = [config(args, folder, args.method, args.task, k, 3, cuda_graph=True) for k in range(args.members)]
        loop = prepare(runs, Path(folder))
    mean_tokens = float(loop.rows["train"].lengths[: loop.rules.size].double().mean())
    padded_tokens = padded(loop)
    loop.population.train()
    for tokens in args.tokens:
        part = batch(loop, tokens)
        for name, (ours, modes) in VARIANTS.items():
            if name in args.cases:
                save({"tokens": tokens, "case": name, **step(loop, part, ours, modes, args.device)})
    for case, modes in FLOORS.items():
        for tokens in args.tokens if case in args.cases else ():
            row = floor(loop.population, batch(loop, tokens), modes, args.device, "compiled" in case)
            save({"tokens": tokens, "case": case, **row})


if __name__ == "__main__":
    main()
