"""Which adapter earns its parameters: scores of many forms and sizes, each at a learning rate of its own.

Each cell (model, task, method) is one population: three rates, a factor of 2 apart, times the seeds. How a score comes
about is in protocol.py. Cells are taken in the order of their value by several processes on each GPU; what is in the
file already is not run again, and the file is written after every cell.

    python benchmarks/forms.py --model FOLDER --data-dir FOLDER --out benchmarks/results/forms_minilm.json

--data-dir has one folder a task with the official files. ``make tables`` puts the results into docs/choosing.md and
RESULTS.md.
"""

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from claims import oversee, take
from encoders import graphable
from protocol import BATCH, HEAD_RATE, OFFICIAL_LENGTH, TASKS, best_rate, cell_of, interval, read_rows, split

from loretta.population import training as population_training
from loretta.population.loop import Loop
from loretta.population.rows import Rows
from loretta.population.training import prepare
from loretta.tasks import load_task
from loretta.training.config import RunConfig
from loretta.training.data import encode
from loretta.training.model import load_tokenizer

QV = {"bert": ["query", "value"], "mpnet": ["attn.q", "attn.v"], "llama": ["q_proj", "v_proj"]}
ALL = {
    "bert": ["query", "key", "value", "dense"],
    "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
NORMS = {
    "bert": ["LayerNorm"],
    "mpnet": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "model.norm"],
}
# what no method trains: hidden layers of heads, and of MPNet what has "bias" in its name and is none
FROZEN = (
    "pooler.dense",
    "classifier.dense",
    "classifier.modules_to_save.default.dense",
    "classifier.original_module.dense",
    "relative_attention_bias",
)
OURS = ("rep", "adp", "shared", "adapters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a run is given.

    ``middle`` is the middle of its grid of rates, and ``factors`` are on the rates of what has a word in its name.
    """

    name: str
    family: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: str | None = None
    norms: bool = False
    middle: float = 1.5e-3
    factors: dict[str, float] = field(default_factory=dict)


def lora(rank: int, targets: str = "qv", *, norms: bool = False, **more: Any) -> Method:
    name = f"LoRA r={rank}" + (" all linear" if targets == "all" else "") + (" + norms" if norms else "")
    options = {"r": rank, "lora_alpha": 2 * rank}
    return Method(name=name, family="LoRA", method="lora", options=options, targets=targets, norms=norms, **more)


def ours(name: str, method: str, options: dict[str, Any] | None = None, **more: Any) -> Method:
    name += " + norms" if more.get("norms") else ""
    return Method(name=name, family="LoRETTA", method=method, options=options or {}, **more)


def compact(rank: int = 1, *, norms: bool, inner: int = 4) -> Method:
    name = "compact" + (f" r={rank}" if rank > 1 else "") + (f" inner {inner}" if inner != 4 else "")
    inner = max(inner, rank)
    options = {"r": rank, "tensor_rank": inner, "modes_per_side": 2, "lora_alpha": 2 * inner}
    return ours(name, "rep", options, targets="all", norms=norms)


def shared(rank: int, targets: str = "all", *, norms: bool) -> Method:
    name = f"shared r={rank}" + (" q,v" if targets == "qv" else "")
    return ours(name, "shared", {"tensor_rank": rank, "lora_alpha": 2 * rank}, targets=targets, norms=norms)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="head only", family="base", method="head", middle=1e-2),
        Method(name="norms", family="base", method="norms", norms=True, middle=3e-3),
        Method(name="BitFit", family="base", method="bitfit", middle=3e-3),
        Method(name="IA3", family="PEFT", method="ia3", middle=5e-3),
        *(lora(rank) for rank in (1, 2, 4, 8, 16, 32)),
        lora(1, "all"), lora(2, "all"), lora(1, norms=True), lora(2, norms=True), lora(1, "all", norms=True),
        Method(name="adapters b=64", family="PEFT", method="adapters", options={"dense": True}),
        Method(name="adapters b=4", family="PEFT", method="adapters", options={"dense": True, "bottleneck_size": 4}),
        ours("rep", "rep", targets="qv"), ours("rep", "rep", targets="qv", norms=True),
        ours("adp", "adp"), ours("adp", "adp", norms=True),
        *(compact(norms=norms) for norms in (False, True)), *(compact(2, norms=norms) for norms in (False, True)),
        *(compact(rank, norms=False) for rank in (4, 16, 32)), compact(inner=2, norms=False),
        *(shared(rank, norms=norms) for rank in (2, 4, 8) for norms in (False, True)),
        *(shared(rank, norms=False) for rank in (1, 16, 32)), shared(16, "qv", norms=False),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One population. ``part`` is "front", or "rates" where the grid itself is looked at."""

    task: str
    method: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    part: str = "front"
    epochs: float

    @property
    def file(self) -> str:
        return "-".join([self.part, self.task, *self.method.replace("+", "and").split()])


def grid(method: str, count: int = 3, apart: float = 2.0) -> tuple[float, ...]:
    """``count`` rates around the middle of a method, ``apart`` from each other."""
    middle = METHODS[method].middle
    return tuple(float(f"{middle * apart ** (k - (count - 1) / 2):.3g}") for k in range(count))


@contextlib.contextmanager
def heads_alike() -> Iterator[None]:
    """Runs of which the final layer of the head alone is trained, as PEFT's own methods train it."""

    def frozen(*args: Any) -> Any:
        model, found = ordinary(*args)
        for name, parameter in model.named_parameters():
            if any(part in name for part in FROZEN):
                parameter.requires_grad_(False)
        return model, found

    ordinary = population_training.prepare_model
    with mock.patch.object(population_training, "prepare_model", frozen):
        yield


def configs_of(cell: Cell, args: argparse.Namespace, data: Path, scratch: Path) -> list[RunConfig]:
    method, plan = METHODS[cell.method], TASKS[cell.task]
    kind = json.loads((Path(args.model) / "config.json").read_text())["model_type"]
    options = dict(method.options)
    if method.targets is not None:
        options["target_modules"] = (QV if method.targets == "qv" else ALL)[kind]
        options["exclude_modules"] = ["pooler.dense", "classifier.dense"]
    if method.method in OURS:
        options |= {"train_norms": method.norms, "train_head": "dense"}
    elif method.norms and method.method != "norms":
        options["modules_to_save"] = NORMS[kind]
    return [
        RunConfig(
            model=str(args.model), data=cell.task, data_dir=str(data), method=method.method, method_args=options,
            epochs=cell.epochs, max_steps=args.max_steps, max_length=plan.length, limit=args.limit, batch_size=BATCH,
            learning_rate=rate, head_learning_rate=None if method.method == "head" else HEAD_RATE,
            eval_batch_size=256, logging_steps=20, seed=seed, bf16=not args.cpu,
            cuda_graph=not args.cpu, cpu=args.cpu, output=str(scratch / f"{rate}-{seed}"), head_policy="method",
        )
        for rate in cell.rates
        for seed in cell.seeds
    ]  # fmt: skip


def measure(cell: Cell, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The row of one cell. Members that do not fit into the memory together are trained in two halves."""
    begin = time.perf_counter()
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        configs = configs_of(cell, args, data, Path(folder))
        found = in_halves(configs, cell, args, Path(folder))
    method = METHODS[cell.method]
    row = {
        "part": cell.part, "model": Path(args.model).name, "task": cell.task, "method": cell.method,
        "family": method.family, "norms": method.norms, **found[0]["same"],
        "rates": list(cell.rates), "seeds": list(cell.seeds), "epochs": cell.epochs, "batch": BATCH,
        "length": TASKS[cell.task].length,
    }  # fmt: skip
    if method.family == "LoRETTA":
        options = {"tensor_rank": 5, "train_norms": method.norms, **method.options}
        row["config"] = {
            "method": method.method,
            "options": {**options, "target_modules": "all-linear"} if method.targets == "all" else options,
        }
    for key in ("held_out", "official", "curve", "train_loss"):
        each = iter([member[key] for member in found])
        row[key] = {str(rate): [next(each) for _ in cell.seeds] for rate in cell.rates}
    return row | {
        "seconds": time.perf_counter() - begin,
        "device": "cpu" if args.cpu else torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "command": command_of(cell, args),
    }


def command_of(cell: Cell, args: argparse.Namespace) -> str:
    """What makes this row alone."""
    order = f"{'rates' if cell.part == 'rates' else cell.method}:{cell.task}"
    words = [f"--model {Path(args.model).name} --data-dir DATA --order '{order}'"]
    words += [f"--seeds {len(cell.seeds)} --rates {len(cell.rates)} --epochs {cell.epochs:g} --out FILE"]
    words += [f"--{key} {value}" for key in ("max_steps", "limit") if (value := getattr(args, key)) is not None]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]).replace("max_steps", "max-steps")


def in_halves(
    configs: Sequence[RunConfig], cell: Cell, args: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    try:
        return trained(configs, cell, args, scratch)
    except torch.OutOfMemoryError:
        if len(configs) == 1:
            raise
    gc.collect()
    torch.cuda.empty_cache()
    half = len(configs) // 2
    return [*in_halves(configs[:half], cell, args, scratch), *in_halves(configs[half:], cell, args, scratch)]


def set_factors(loop: Loop, factors: Mapping[str, float]) -> None:
    for word, factor in factors.items():
        rates = loop.optimizer.rates = loop.optimizer.rates.expand_as(loop.population.values).clone()
        for name, where in loop.population.slices.items():
            if word in name:
                rates[:, where] *= factor


def trained(configs: Sequence[RunConfig], cell: Cell, args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """What is noted of each member of one population."""
    with heads_alike():
        loop = prepare(configs, scratch)
    set_factors(loop, METHODS[cell.method].factors)
    sizes = {name: where.stop - where.start for name, where in loop.population.slices.items()}
    head = sum(size for name, size in sizes.items() if "classifier" in name or "score" in name)
    train = loop.rows["train"]
    train.longest = min(train.longest, configs[0].max_length)
    train.lengths = torch.full_like(train.lengths, train.longest)
    loop.parts = 1
    loop.train()
    name = "eval_" + str(loop.args.metric_for_best_model).removeprefix("eval_")
    held_out = len(loop.members[0].encoded["validation"])
    official, count = official_scores(loop, args)
    same = {
        "trained": sum(sizes.values()) - head, "head": head, "metric": name.removeprefix("eval_"),
        "rows": {"train": loop.rules.size, "held_out": held_out, "official": count},
    }  # fmt: skip
    found = []
    for k, member in enumerate(loop.members):
        history = member.trainer.state.log_history
        curve = [entry[name] for entry in history if name in entry]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        failed = k in loop.not_finite or not curve
        sign = 1 if loop.args.greater_is_better else -1
        found.append(
            {
                "same": same, "curve": curve,
                "held_out": None if failed else sign * max(sign * score for score in curve),
                "official": None if failed else official[k][name],
                "train_loss": None if failed or not losses else mean(losses[-max(1, len(losses) // 8) :]),
            }
        )  # fmt: skip
    return found


def official_scores(loop: Loop, args: argparse.Namespace) -> tuple[list[dict[str, float]], int]:
    """The scores of all members on the official validation rows, with the values of their best epoch."""
    first = loop.members[0]
    task = load_task(first.config.data, data_dir=args.data_dir)
    if args.limit is not None:
        task = task.limited(args.limit)
    tokenizer = load_tokenizer(first.config.model)
    encoded = encode(task.validation, task, tokenizer, OFFICIAL_LENGTH)
    collator: Any = first.trainer.data_collator
    split_of_each = [encoded] * len(loop.members)
    loop.rows["validation"] = Rows(
        split_of_each, collator, loop.device, on_left=tokenizer.padding_side == "left", rounded=False, kind=loop.kind
    )
    for member in loop.members:
        member.encoded["validation"] = encoded  # type: ignore[index]
    loop.population.values.copy_(loop.best)
    return loop.evaluate(), len(encoded)


# in the order of their value; which tasks and in which order is for the command
GROUPS: dict[str, list[str]] = {
    "core": [
        "LoRA r=1", "compact + norms", "shared r=2", "shared r=4 + norms", "norms", "LoRA r=8", "rep", "compact",
        "shared r=2 + norms", "LoRA r=1 + norms", "adp + norms", "LoRA r=2", "LoRA r=1 all linear", "head only",
    ],
    "more": [
        "shared r=8 + norms", "LoRA r=4", "BitFit", "shared r=4", "IA3", "rep + norms", "adp", "compact r=2 + norms",
        "LoRA r=2 + norms", "shared r=8", "LoRA r=1 all linear + norms", "compact r=2", "LoRA r=2 all linear",
        "adapters b=4", "compact inner 2", "shared r=16", "shared r=16 q,v", "adapters b=64",
    ],
    "rates": [
        "LoRA r=1", "compact", "shared r=1", "LoRA r=8", "compact r=4", "shared r=4", "compact r=32", "shared r=32",
        "LoRA r=32", "compact r=16", "shared r=16",
    ],
}  # fmt: skip


def cells_of(orders: Sequence[str], args: argparse.Namespace) -> list[Cell]:
    """``core:cola,mrpc``: all tasks of a method before the next one; ``METHOD:cola`` for one method."""
    cells: dict[tuple[str, str, str], Cell] = {}
    for order in orders:
        group, _, tasks = order.rpartition(":")
        part = "rates" if group == "rates" else "front"
        for method in GROUPS.get(group, [group]):
            for task in tasks.split(","):
                rates = grid(method, 6) if part == "rates" else grid(method, args.rates)
                seeds = range(2 if part == "rates" else args.seeds)
                epochs = args.epochs or TASKS[task].epochs * args.share
                cells[part, task, method] = Cell(
                    part=part, task=task, method=method, rates=rates, seeds=tuple(seeds), epochs=epochs
                )
    return list(cells.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["task"], row["trained"])):
        rate = best_rate(row)
        scores = [score for score in row["held_out"][rate] if score is not None]
        official = [score for score in row["official"][rate] if score is not None]
        (held, half), (final, _) = (interval(s) if s else (0.0, 0.0) for s in (scores, official))
        lines.append(
            f"{row['model'][:10]:10} {row['part']:5} {row['task']:5} {row['method']:28} {row['trained']:8,} "
            f"{held:.4f} +- {half:.4f}  official {final:.4f}  at {rate} ({row['seconds']:.0f} s)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--order", nargs="+", default=["core:cola,mrpc,stsb,sst2,rte", "more:cola,mrpc,stsb,sst2,rte"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=int, default=3, help="learning rates of a grid")
    parser.add_argument("--epochs", type=float, help="of every task")
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs that a task has")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--each", type=int, default=3, help="processes of a GPU: one prepares while another trains")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cell after that time")
    parser.add_argument("--grace", type=float, default=1e9, help="seconds that begun cells then have")
    parser.add_argument("--queue", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    done = {cell_of(row) for row in read_rows([args.out])}
    cells = [c for c in cells_of(args.order, args) if (c.part, args.model.name, c.task, c.method) not in done]
    if args.queue is not None:
        with graphable():
            take(
                ((cell.file, partial(measure, cell, args, args.queue / "data")) for cell in cells),
                args.queue,
                args.until,
            )
        return
    until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        queue = Path(folder)
        for task in {cell.task for cell in cells}:
            split(task, args.data_dir, queue / "data")
        words = [*sys.argv, "--queue", folder, "--until", str(until)]
        gpus, end = 0 if args.cpu else max(1, args.gpus), until + args.grace
        oversee(words, queue, args.out, count=len(cells), gpus=gpus, each=args.each, until=until, end=end)
    print(table(read_rows([args.out])))


if __name__ == "__main__":
    main()
