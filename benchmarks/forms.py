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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from methods import ALL, FROZEN, GROUPS, IA3, METHODS, NORMS, OURS, QV, UNTRAINED, Method, grid
from prompts import give_head, option_tokens, write_words
from protocol import HEAD_RATE, OFFICIAL_LENGTH, TASKS, at_edge, best_rate, cell_of, interval, read_rows, split

from loretta.population import training as population_training
from loretta.population.loop import Loop
from loretta.population.rows import Rows
from loretta.population.training import prepare
from loretta.training.config import RunConfig
from loretta.training.data import load_config_task
from loretta.training.forms import form_of
from loretta.training.model import load_tokenizer

TOKENS_AT_ONCE = 250_000  # scored
LONGEST_PROMPT = 1024  # tokens, of the official rows

PER_RATE = ("held_out", "official", "curve", "train_loss")

__all__ = ["GROUPS", "METHODS", "Method", "main"]


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


@contextlib.contextmanager
def heads_alike(tokens: Sequence[int]) -> Iterator[None]:
    """Runs of which the final layer of the head alone is trained, as PEFT's own methods train it.

    With ``tokens`` the head is what the output embeddings say of these, and nothing of it is trained.
    """

    def frozen(*args: Any) -> Any:
        model, found = ordinary(*args)
        for name, parameter in model.named_parameters():
            if any(part in name for part in FROZEN):
                parameter.requires_grad_(False)
        if tokens:
            give_head(model, tokens)
        return model, found

    ordinary = population_training.prepare_model
    with mock.patch.object(population_training, "prepare_model", frozen):
        yield


def configs_of(cell: Cell, args: argparse.Namespace, data: Path, scratch: Path) -> list[RunConfig]:
    method, plan = METHODS[cell.method], TASKS[cell.task]
    kind = transformers.AutoConfig.from_pretrained(str(args.model)).model_type
    options = dict(method.options)
    if method.targets is not None:
        options["target_modules"] = (QV if method.targets == "qv" else ALL)[kind]
        options["exclude_modules"] = ["pooler.dense", "classifier.dense"]
    elif method.method == "ia3":
        options |= IA3.get(kind, {})
    data_of = {"data": cell.task, "data_dir": str(data)}
    if plan.kind != "glue":
        files = {name: str(data / cell.task / f"{name}.jsonl.gz") for name in ("train", "validation")}
        data_of = {"data": files["train"], "validation": files["validation"], "text": "text"}
        data_of |= {"label": "label"} if plan.kind == "words" else {"kind": "language_modeling"}
    trains_head = plan.kind == "glue"
    if method.method in OURS:
        options |= {"train_norms": method.norms, "train_head": "dense" if trains_head else "frozen"}
    elif method.norms and method.method != "norms":
        options["modules_to_save"] = NORMS[kind]
    return [
        RunConfig(
            model=str(args.model), **data_of, method=method.method, method_args=options,
            epochs=cell.epochs, max_steps=args.max_steps, max_length=plan.length, limit=args.limit,
            batch_size=plan.batch, learning_rate=rate,
            head_learning_rate=HEAD_RATE if trains_head and method.method != "head" else None,
            eval_batch_size=256, logging_steps=20, seed=seed, bf16=not args.cpu,
            cuda_graph=not args.cpu, cpu=args.cpu, output=str(scratch / f"{rate}-{seed}"),
            head_policy="method" if trains_head or method.method in OURS else "frozen",
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
        "rates": list(cell.rates), "seeds": list(cell.seeds), "epochs": cell.epochs, "batch": TASKS[cell.task].batch,
        "length": TASKS[cell.task].length,
    }  # fmt: skip
    if method.family == "LoRETTA":
        options = {"tensor_rank": 5, "train_norms": method.norms, **method.options}
        row["config"] = {
            "method": method.method,
            "options": {**options, "target_modules": "all-linear"} if method.targets == "all" else options,
        }
    for key in PER_RATE:
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


def score_widely(loop: Loop) -> None:
    """Score more rows of each member at once than are trained: small models wait for the CPU otherwise."""

    def evaluate() -> list[dict[str, float]]:
        tokens = loop.rows["validation"].longest * loop.population.size
        with mock.patch.object(
            loop.rules, "batch_size", max(loop.rules.batch_size, min(256, TOKENS_AT_ONCE // tokens))
        ):
            return ordinary()

    ordinary = loop.evaluate
    if loop.kind != "language_modeling":
        loop.evaluate = evaluate  # type: ignore[method-assign]


def trained(configs: Sequence[RunConfig], cell: Cell, args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """What is noted of each member of one population."""
    plan = TASKS[cell.task]
    words = load_tokenizer(str(args.model)) if plan.kind == "words" else None
    with heads_alike([] if words is None else option_tokens(cell.task, words, args.data_dir)):
        loop = prepare(configs, scratch)
    set_factors(loop, METHODS[cell.method].factors)
    sizes = {name: where.stop - where.start for name, where in loop.population.slices.items()}
    head = sum(size for name, size in sizes.items() if "classifier" in name or "score" in name)
    train = loop.rows["train"]
    train.longest = min(train.longest, configs[0].max_length)
    train.lengths = torch.full_like(train.lengths, train.longest)
    loop.parts = 1
    score_widely(loop)
    if cell.method == UNTRAINED:
        for member, scores in zip(loop.members, loop.evaluate(), strict=True):
            member.trainer.state.log_history.append(scores)
    else:
        loop.train()
    name = "eval_" + str(loop.args.metric_for_best_model).removeprefix("eval_")
    held_out = len(loop.members[0].encoded["validation"])
    official, count = official_scores(loop, cell, args)
    same = {
        "trained": 0 if cell.method == UNTRAINED else sum(sizes.values()) - head,
        "head": head, "metric": name.removeprefix("eval_"),
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


def official_scores(loop: Loop, cell: Cell, args: argparse.Namespace) -> tuple[list[dict[str, float]], int]:
    """The scores of all members on the official validation rows, with the values of their best epoch."""
    first = loop.members[0]
    length = {"glue": OFFICIAL_LENGTH, "words": LONGEST_PROMPT}.get(TASKS[cell.task].kind, first.config.max_length)
    if TASKS[cell.task].kind == "glue":
        where = {"data_dir": str(args.data_dir)}
    else:
        where = {"validation": str(Path(first.config.data).with_name("official.jsonl.gz"))}
    config = first.config.model_copy(update={**where, "max_length": length})
    task: Any = load_config_task(config)
    tokenizer = load_tokenizer(config.model)
    encoded: Any = form_of(task.kind).encode(config, task, tokenizer, "validation")
    collator: Any = first.trainer.data_collator
    split_of_each = [encoded] * len(loop.members)
    loop.rows["validation"] = Rows(
        split_of_each, collator, loop.device, on_left=tokenizer.padding_side == "left", rounded=False, kind=loop.kind
    )
    for member in loop.members:
        member.encoded["validation"] = encoded  # type: ignore[index]
    loop.population.values.copy_(loop.best)
    return loop.evaluate(), len(encoded)


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


def cells_beyond(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """For every row whose best rate is at the edge of its grid, the same with the next rate beyond."""
    found = []
    for row in rows:
        if row["part"] == "front" and row["method"] in METHODS and at_edge(row):
            rate, rates = float(best_rate(row)), [float(rate) for rate in row["held_out"]]
            rate = float(f"{rate * 2 if rate == max(rates) else rate / 2:.3g}")
            found.append(
                Cell(
                    task=row["task"],
                    method=row["method"],
                    rates=(rate,),
                    seeds=tuple(row["seeds"]),
                    epochs=row["epochs"],
                )
            )
    return found


def joined(known: Sequence[dict[str, Any]], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of a cell with the rates that it was measured at before."""
    row = make()
    for other in known:
        if cell_of(other) == cell_of(row):
            for key in PER_RATE:
                row[key] = {**other[key], **row[key]}
            row["rates"] = sorted({*other["rates"], *row["rates"]})
            row["seconds"] += other["seconds"]
            row["command"] = f"{other['command']}; then --extend"
    return row


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
    parser.add_argument(
        "--extend", action="store_true", help="of the cells in the file: a rate beyond a best one at an edge"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=int, default=3, help="learning rates of a grid")
    parser.add_argument("--epochs", type=float, help="of every task")
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs that a task has")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--first-gpu", type=int, default=0)
    parser.add_argument("--each", type=int, default=3, help="processes of a GPU: one prepares while another trains")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cell after that time")
    parser.add_argument("--grace", type=float, default=1e9, help="seconds that begun cells then have")
    parser.add_argument("--queue", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = [row for row in read_rows([args.out]) if row["model"] == args.model.name]
    done = {cell_of(row) for row in known}
    cells = [c for c in cells_of(args.order, args) if (c.part, args.model.name, c.task, c.method) not in done]
    if args.extend:
        cells = cells_beyond(known)
    if args.queue is not None:
        with graphable():
            jobs = ((cell.file, partial(measure, cell, args, args.queue / "data")) for cell in cells)
            take(((name, partial(joined, known, job)) for name, job in jobs), args.queue, args.until)
        return
    until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        queue = Path(folder)
        for task in {cell.task for cell in cells}:
            if TASKS[task].kind == "glue":
                split(task, args.data_dir, queue / "data")
            else:
                write_words(task, load_tokenizer(str(args.model)), args.data_dir, queue / "data")
        words = [*sys.argv, "--queue", folder, "--until", str(until)]
        gpus = [] if args.cpu else list(range(args.first_gpu, args.first_gpu + max(1, args.gpus)))
        end = until + args.grace
        oversee(words, queue, args.out, count=len(cells), gpus=gpus, each=args.each, until=until, end=end)
    print(table(read_rows([args.out])))


if __name__ == "__main__":
    main()
