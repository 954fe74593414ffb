"""Populations beside runs one after the other: examples per second, memory, and where the time goes.

all-MiniLM-L6-v2 on CoLA and RTE at batch 32, trained to the end with logging and evaluation, and the step of a
LLaMA-2-7B shape with random weights on 1x256 tokens a member, beside the floor: the frozen base by itself on the tokens
of 8 members, forward, loss and backward with the gradient of its input.

    python benchmarks/population.py --model FOLDER --data-dir FOLDER --out benchmarks/results/population.json

--data-dir has cola/ and rte/. Without a GPU give --device cpu, and --llama tiny to try the second part, or none.

Of a run's seconds "start" ends with the first step, "recording" is that of CUDA graphs, "steps" are those of the
training without it and without evaluations, "evaluation" is what it takes to score on validation (with the recording of
that), and "saving" all that follows the training. The file is written after each row.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import METHODS, build_base, perturbed, wrap
from timing import about, captured, kinds_of, timed
from torch import Tensor, nn

from loretta.population import loop
from loretta.population.attention import PackedAttention
from loretta.population.casts import OneCast
from loretta.population.loop import Loop
from loretta.population.optimizer import MemberAdamW
from loretta.population.population import Population, Start
from loretta.population.rows import row_losses
from loretta.population.training import train_together
from loretta.training.config import RunConfig
from loretta.training.recordings import Recorder
from loretta.training.run import train
from loretta.training.trainer import TwoRateTrainer

RATES = (5e-4, 1e-3, 2e-3, 5e-3)
TOKENS = 256  # of each LLaMA member


def one_cast(members: int) -> OneCast:
    return OneCast()


# modes of our own in the place of torch's functions
KERNELS: dict[str, tuple[Callable[[int], Any], ...]] = {
    "plain": (),
    "packed": (PackedAttention, one_cast),
}


def config(args: argparse.Namespace, folder: str, method: str, task: str, member: int, epochs: float, **kwargs: Any):
    """One run: a sweep of rates over seeds, as a comparison has it."""
    return RunConfig(
        model=args.model,
        data=task,
        data_dir=args.data_dir,
        limit=args.limit,
        method=method,
        epochs=epochs,
        batch_size=32,
        bf16=args.device == "cuda",
        cpu=args.device == "cpu",
        seed=member // len(RATES),
        learning_rate=RATES[member % len(RATES)],
        output=f"{folder}/{kwargs.pop('name', 'run')}-{member}",
        **kwargs,
    )


def reset_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


class Split:
    """Where the seconds of a run, or of a population, went; see above."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, {"evaluation": 0.0, "recording": 0.0}
        self.evaluates = False

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note when trainings begin and end in this block, and what their evaluations take."""
        begin = self.now()

        def trained(ordinary: Any) -> Any:
            def train(*args: Any, **kwargs: Any) -> Any:
                started = self.now()
                result = ordinary(*args, **kwargs)
                steps = self.now() - started - self.times["evaluation"] - self.times["recording"]
                self.times |= {"start": started - begin, "steps": steps}
                return result

            return train

        def evaluated(ordinary: Any) -> Any:
            def evaluate(*args: Any, **kwargs: Any) -> Any:
                started, self.evaluates = self.now(), True
                result = ordinary(*args, **kwargs)
                self.times["evaluation"] += self.now() - started
                self.evaluates = False
                return result

            return evaluate

        def recorded(ordinary: Any) -> Any:
            def record(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter() if self.evaluates else self.now()
                result = ordinary(*args, **kwargs)
                self.times["recording"] += 0.0 if self.evaluates else time.perf_counter() - started
                return result

            return record

        with (
            mock.patch.object(Loop, "train", trained(Loop.train)),
            mock.patch.object(TwoRateTrainer, "train", trained(TwoRateTrainer.train)),
            mock.patch.object(Recorder, "record", recorded(Recorder.record)),
            mock.patch.object(Loop, "_evaluate", evaluated(Loop._evaluate)),
            mock.patch.object(TwoRateTrainer, "evaluate", evaluated(TwoRateTrainer.evaluate)),
        ):
            yield
        self.whole = self.now() - begin
        self.times["saving"] = self.whole - sum(self.times.values())


def measured(args: argparse.Namespace, runs: list[RunConfig], work: Callable[..., list[Any]]) -> dict[str, Any]:
    """The time of ``work``, which trains the runs from their options to their folders."""
    reset_memory(args.device)
    split, processor = Split(args.device), time.process_time()
    with split.watching():
        records = work(runs)
    processor = time.process_time() - processor
    seconds = sum(record.train_seconds for record in records)
    examples = args.epochs * records[0].sizes["train"] * len(runs)
    return {
        "examples_per_s": examples / seconds,
        "whole_examples_per_s": examples / split.whole,
        "train_s": seconds,
        "whole_s": split.whole,
        "split_s": split.times,
        "processor_s": processor,
        "peak_bytes": peak(args.device),
        "score": statistics.median(record.validation[record.metric] for record in records),
    }


def alone(args: argparse.Namespace, method: str, task: str, *, graph: bool) -> dict[str, Any]:
    """The second of two runs one after the other: the first one pays for what a process loads once."""
    with tempfile.TemporaryDirectory() as folder:
        short = config(args, folder, method, task, 0, min(1, args.epochs), cuda_graph=graph)
        train(short)
        run = config(args, folder, method, task, 1, args.epochs, cuda_graph=graph)
        return measured(args, [run], lambda runs: [train(run) for run in runs])


def together(args: argparse.Namespace, method: str, task: str, size: int, *, graph: bool) -> dict[str, Any]:
    """A population from its options to its folders."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [config(args, folder, method, task, k, args.epochs, cuda_graph=graph) for k in range(size)]
        return measured(args, runs, train_together)


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        row.get(name)
        for name in ("part", "task", "model", "layers", "method", "members", "how", "graph", "pieces", "kernels")
    )


def minilm(args: argparse.Namespace, save: Any) -> None:
    for task in args.tasks:
        for method in args.methods:
            common = {"part": "training", "task": task, "method": method, "batch": 32}
            for graph in args.graphs:
                save({**common, "members": 1, "how": "alone", "graph": graph, **alone(args, method, task, graph=graph)})
            how = {"how": "together", "graph": args.graphs[-1], "pieces": args.pieces}
            for size in args.sizes:
                for kernels in args.kernels:
                    Population.modes_on_gpu = KERNELS[kernels]
                    row = {**common, **how, "members": size, "kernels": kernels}
                    save({**row, **together(args, method, task, size, graph=bool(how["graph"]))})


def random_starts(model: Any, size: int) -> list[Start]:
    """Members in the middle of a training, without building the base once for each."""
    starts = []
    for seed in range(size):
        generator = torch.Generator().manual_seed(seed)
        values = {
            name: p.detach().cpu() + 1e-3 * torch.randn(p.shape, generator=generator).to(p.dtype)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        start = Start.of(model, model)
        starts.append(Start(values=values, scales=start.scales, config=start.config))
    return starts


def llama_step(args: argparse.Namespace, method: str | None, size: int | None, *, graph: bool) -> dict[str, Any]:
    """Milliseconds of a step, of one ordinary model (no size), of a population, or of the frozen base (no method)."""
    reset_memory(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    base = build_base(args.llama, device=args.device, dtype=dtype, layers=args.layers)
    vocabulary = base.config.vocab_size
    tokens = TOKENS if args.device == "cuda" else 16
    ids = torch.randint(5, vocabulary, (size or 1, tokens), device=args.device)
    if method is None:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()

        def work() -> None:
            sums, counts = row_losses(base(inputs_embeds=embedded).logits, ids, "language_modeling")
            torch.autograd.grad((sums / counts).sum(), embedded)
    elif size is None:
        model = wrap(base, method, "llama-7b")
        trained = [p for p in model.parameters() if p.requires_grad]
        ordinary = torch.optim.AdamW(trained, lr=1e-4, fused=args.device == "cuda", capturable=args.device == "cuda")

        def work() -> None:
            for parameter in trained:
                parameter.grad = None
            sums, counts = row_losses(model(input_ids=ids).logits, ids, "language_modeling")
            (sums.sum() / counts.sum()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            ordinary.step()
    else:
        wrapped = perturbed(base, METHODS[method]("CAUSAL_LM"))
        population = Population(wrapped, random_starts(wrapped, size))
        rates = population.values.new_full((size, 1), 1e-4)
        ours = MemberAdamW(population.values, population.gradient, rates=rates, decays=torch.zeros_like(rates))
        factor: Tensor = torch.ones_like(rates)

        def work() -> None:
            sums, counts = row_losses(population(input_ids=ids).logits, ids, "language_modeling")
            population.backward(sums / counts)
            ours.step(factor)

    step = captured(work) if graph else work
    found = {"ms": statistics.median(timed(step, args.steps, args.device)), "peak_bytes": peak(args.device)}
    return found if args.device == "cpu" else {**found, **kinds_of(step)}


def llama(args: argparse.Namespace, save: Any) -> None:
    common = {"part": "step", "model": args.llama, "tokens": TOKENS, "layers": args.layers}
    for graph in args.graphs:
        row = {**common, "method": "frozen base", "members": 8, "how": "floor", "graph": graph}
        save({**row, **llama_step(args, None, 8, graph=graph)})
    for method in args.llama_methods:
        common["method"] = method
        for graph in args.graphs:
            for size in (None, 8):
                row = {**common, "members": size or 1, "how": "together" if size else "alone", "graph": graph}
                save({**row, **llama_step(args, method, size, graph=graph)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tasks", nargs="*", default=["cola", "rte"])
    parser.add_argument("--methods", nargs="*", default=["lora", "rep", "adp"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--llama", default="llama-7b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--graphs", nargs="*", type=lambda word: word == "yes", help="no, yes, or both in this order")
    parser.add_argument("--seconds", type=float, default=None, help="start nothing new after so many")
    parser.add_argument("--pieces", type=int, default=loop.PIECES, help="of a batch, of which its parts are made")
    parser.add_argument("--kernels", nargs="*", default=["packed"], choices=KERNELS, help="in the place of torch's")
    parser.add_argument("--layers", type=int, default=None, help="of the LLaMA, to be quick; default: all it has")
    parser.add_argument("--llama-methods", nargs="*", default=["lora q,v", "rep q,v", "adp"])
    args = parser.parse_args()
    loop.PIECES = args.pieces
    if args.graphs is None:
        args.graphs = [False, True] if args.device == "cuda" else [False]
    # what the file holds already stays: parts may be measured one by one
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    begin = time.perf_counter()

    def save(row: dict[str, Any]) -> None:
        rows[:] = [*(old for old in rows if case_of(old) != case_of(row)), row]
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        head = about(args.device, "bfloat16" if args.device == "cuda" else "float32")
        head["load"] = os.getloadavg()[0]  # of the machine, for which time of the processor is the better measure
        args.out.write_text(json.dumps({**head, "epochs": args.epochs, "rows": rows}, indent=1) + "\n")
        if args.seconds is not None and time.perf_counter() - begin > args.seconds:
            print(f"{args.seconds:g} s are over: what is left is not measured")
            raise SystemExit(0)

    if args.llama != "none":
        llama(args, save)
    minilm(args, save)


if __name__ == "__main__":
    main()
