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
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import peers  # noqa: F401  (adds its methods to METHODS)
import peft
import torch
import transformers
from cells import PER_RATE, Cell, cells_beyond, cells_of, command_of, joined, left, table
from claims import Worker, oversee, take
from encoders import graphable
from methods import HIDDEN, IA3, METHODS, NO_BIAS, NORMS, OURS, UNTRAINED, Method, places_of
from prompts import give_head, option_tokens, perplexities, write_words
from protocol import HEAD_RATE, OFFICIAL_LENGTH, TASKS, read_rows, split

from loretta.errors import InputError
from loretta.population import training as population_training
from loretta.population.loop import Loop
from loretta.population.rows import Rows
from loretta.population.training import prepare
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.methods import virtual_tokens
from loretta.training.model import load_tokenizer
from loretta.tuners.adp.layer import AdpLinear
from loretta.tuners.rep.layer import RepLinear
from loretta.tuners.shared.layer import SharedLinear

# tokens of all members: as many as one part of a step has, and as are scored at once; of large models fewer, so that
# eight processes find room on one GPU
TOKENS_OF_A_PART, LARGE_PART = 8192, 6144
TOKENS_AT_ONCE, LARGE_AT_ONCE = 250_000, 32_000
LARGE = 4096  # layers times width
MOST_PARTS = 8
LONGEST_PROMPT = 1024  # tokens, of the official rows


@cache
def encoded_once(config: str) -> Any:
    """The data of a config as token ids; all cells of a process that have the same data share it."""
    options = RunConfig.model_validate_json(config)
    return encode_splits(options, load_config_task(options), load_tokenizer(options.model))


def data_options(config: RunConfig) -> str:
    """What of a config says which data it has, where the validation rows are not drawn by its seed."""
    names = ["model", "data", "data_dir", "validation", "text", "label", "kind", "limit", "max_length"]
    if virtual_tokens(config.method, config.method_args):
        names += ["method", "method_args"]
    return RunConfig(**{name: getattr(config, name) for name in names}).model_dump_json()


@contextlib.contextmanager
def heads_alike(tokens: Sequence[int], *, hidden: bool = False) -> Iterator[None]:
    """Runs of which the final layer of the head alone is trained, as PEFT's own methods train it.

    With ``hidden`` its hidden layer is trained as far as the method does it. With ``tokens`` the head is what the
    output embeddings say of these, and nothing of it is trained. All members have one copy of their data.
    """

    def frozen(*args: Any) -> Any:
        model, found = ordinary(*args)
        for name, parameter in model.named_parameters():
            if any(part in name for part in (NO_BIAS, *(() if hidden else HIDDEN))):
                parameter.requires_grad_(False)
        if tokens:
            give_head(model, tokens)
        return model, found

    ordinary = population_training.prepare_model
    with (
        mock.patch.object(population_training, "prepare_model", frozen),
        mock.patch.object(
            population_training, "load_task_to_train", lambda config: encoded_once(data_options(config)).task
        ),
        mock.patch.object(
            # a dictionary of its own: show_official puts other rows into it, and later cells of the process would be
            # scored on these
            population_training,
            "encode_splits",
            lambda config, *_: replace(
                data := encoded_once(data_options(config)), config=config, splits=copy(data.splits)
            ),
        ),
    ):
        yield


def configs_of(cell: Cell, args: argparse.Namespace, data: Path, scratch: Path) -> list[RunConfig]:
    method, plan = METHODS[cell.method], TASKS[cell.task]
    base = transformers.AutoConfig.from_pretrained(str(args.model))
    kind = base.model_type
    options = method.placed(kind, base.num_hidden_layers)
    trains_head = plan.kind == "glue"
    if method.method == "ia3":
        options |= IA3.get(kind, {})
    elif trains_head and method.targets is not None and method.method != "norms":
        options["exclude_modules"] = r".*(pooler|classifier)\.dense"
    data_of = {"data": cell.task, "data_dir": str(data)}
    if plan.kind != "glue":
        files = {name: str(data / cell.task / f"{name}.jsonl.gz") for name in ("train", "validation")}
        data_of = {"data": files["train"], "validation": files["validation"], "text": "text"}
        data_of |= {"label": "label"} if plan.kind == "words" else {"kind": "language_modeling"}
    if method.method in OURS:
        options |= {"train_norms": method.norms, "train_head": (method.head or "dense") if trains_head else "frozen"}
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


def targets_of(method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """The places of a form in the words of its config: none where these are its own."""
    if method.targets in (None, "qv"):
        return {}
    kind = transformers.AutoConfig.from_pretrained(str(args.model)).model_type
    return {"target_modules": "all-linear" if method.targets == "all" else places_of(method.targets, kind)}


def measure(cell: Cell, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The row of one cell. Members that do not fit into the memory together are trained in halves."""
    begin = time.perf_counter()
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        configs = configs_of(cell, args, data, Path(folder))
        try:
            found = in_halves(configs, cell, args, Path(folder))
        except InputError as error:
            print(f"{cell.file}: without CUDA graphs, since {error}", flush=True)
            configs = [config.model_copy(update={"cuda_graph": False}) for config in configs]
            found = in_halves(configs, cell, args, Path(folder))
    method = METHODS[cell.method]
    row = {
        "part": cell.part, "model": Path(args.model).name, "task": cell.task, "method": cell.method,
        "family": method.family, "norms": method.norms, **found[0]["same"],
        "rates": list(cell.rates), "seeds": list(cell.seeds), "epochs": cell.epochs, "batch": TASKS[cell.task].batch,
        "length": TASKS[cell.task].length,
    }  # fmt: skip
    if method.family == "LoRETTA" and not method.factors and method.small_cores == 1:  # no options of the package
        row["config"] = {
            "method": method.method,
            "options": {"tensor_rank": 5, "train_norms": method.norms, **method.options, **targets_of(method, args)},
        }
    for key in (key for key in PER_RATE if key in found[0]):
        each = iter([member[key] for member in found])
        row[key] = {str(rate): [next(each) for _ in cell.seeds] for rate in cell.rates}
    return row | {
        "seconds": time.perf_counter() - begin,
        "device": "cpu" if args.cpu else torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "command": command_of(cell, args),
    }


def in_halves(
    configs: Sequence[RunConfig], cell: Cell, args: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    try:
        if len(configs) <= METHODS[cell.method].together:
            return trained(configs, cell, args, scratch)
    except (torch.OutOfMemoryError, MemoryError):
        if len(configs) == 1:
            raise
    half = len(configs) // 2
    found = []
    for some in (configs[:half], configs[half:]):
        gc.collect()
        torch.cuda.empty_cache()
        found += in_halves(some, cell, args, scratch)
    return found


def set_factors(loop: Loop, method: Method) -> None:
    """Put a method's factors on the rates of parameters, and of the cores of its trains."""
    if not method.factors and not method.bonds and method.small_cores == 1:
        return
    of_numbers = loop.optimizer.of_numbers(loop.optimizer.rates)
    rates = loop.optimizer.rates = of_numbers.expand_as(loop.population.values).clone()
    for name, where in loop.population.slices.items():
        for word, factor in method.factors.items():
            if word in name:
                rates[:, where] *= factor
    if method.small_cores != 1:
        skeleton: Any = loop.population.model
        with loop.population.released(0):
            (shape,) = {m.placements["default"].seat.train for m in skeleton.modules() if isinstance(m, SharedLinear)}
        (where,) = (w for name, w in loop.population.slices.items() if name.endswith("shared_train.default.values"))
        before, small = sum(side.n_params for side in shape.left), (shape.layers + shape.projections) * shape.rank**2
        rates[:, where][:, before : before + small] *= method.small_cores
    if method.bonds:
        skeleton: Any = loop.population.model
        with loop.population.released(0):
            layers = [(name, m) for name, m in skeleton.named_modules() if isinstance(m, (RepLinear, AdpLinear))]
        for name, layer in layers:
            placement = layer.placements["default"]
            sides = zip(("down", "up"), placement.larger_starts(), (placement.down, placement.up), strict=True)
            for part, larger, shape in sides:
                each = torch.tensor(larger).repeat_interleave(torch.tensor([math.prod(core) for core in shape.cores]))
                where = loop.population.slices[f"{name}.{layer.prefix}{part}.default.values"]
                rates[:, where] /= each.to(rates) ** method.bonds


def is_large(loop: Loop) -> bool:
    config = loop.population.model.config
    return bool(config.num_hidden_layers * config.hidden_size > LARGE)


def parts_of(loop: Loop) -> int:
    """In how many parts, the short rows first, a batch is trained: padding is saved, and memory."""
    tokens = loop.population.size * loop.rules.batch_size * loop.rows["train"].longest
    return min(MOST_PARTS, max(1, round(tokens / (LARGE_PART if is_large(loop) else TOKENS_OF_A_PART))))


def score_widely(loop: Loop) -> None:
    """Score more rows of each member at once than are trained: small models wait for the CPU otherwise."""
    at_once = LARGE_AT_ONCE if is_large(loop) else TOKENS_AT_ONCE

    def evaluate() -> list[dict[str, float]]:
        tokens = loop.rows["validation"].longest * loop.population.size
        with mock.patch.object(loop.rules, "batch_size", max(8, min(256, at_once // tokens))):
            return ordinary()

    ordinary = loop.evaluate
    if loop.kind != "language_modeling":
        loop.evaluate = evaluate  # type: ignore[method-assign]


def trained(configs: Sequence[RunConfig], cell: Cell, args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """What is noted of each member of one population."""
    plan = TASKS[cell.task]
    words = load_tokenizer(str(args.model)) if plan.kind == "words" else None
    tokens = [] if words is None else option_tokens(cell.task, words, args.data_dir)
    with heads_alike(tokens, hidden=bool(METHODS[cell.method].head)):
        loop = prepare(configs, scratch)
    set_factors(loop, METHODS[cell.method])
    sizes = {name: where.stop - where.start for name, where in loop.population.slices.items()}
    head = sum(size for name, size in sizes.items() if any(part in name for part in ("classifier", "score", "pooler")))
    loop.parts, loop.most = parts_of(loop), LARGE_PART if is_large(loop) else loop.most
    score_widely(loop)
    if cell.method == UNTRAINED:
        for member, scores in zip(loop.members, loop.evaluate(), strict=True):
            member.trainer.state.log_history.append(scores)
    else:
        loop.train()
    name = "eval_" + str(loop.args.metric_for_best_model).removeprefix("eval_")
    held_out = len(loop.members[0].splits["validation"])
    official, count = official_scores(loop, cell, args)
    wiki = perplexities(loop, words, args.data_dir) if words is not None else []
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
        more: dict[str, Any] = {"wiki": None if failed else wiki[k]} if wiki else {}
        if cell.part == "long":
            more["losses"] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        found.append(
            {
                "same": same, "curve": curve,
                "held_out": None if failed else sign * max(sign * score for score in curve),
                "official": None if failed else official[k][name],
                "train_loss": None if failed or not losses else mean(losses[-max(1, len(losses) // 8) :]),
                **more,
            }
        )  # fmt: skip
    return found


def official_scores(loop: Loop, cell: Cell, args: argparse.Namespace) -> tuple[list[dict[str, float]], int]:
    """The scores of all members on the official validation rows, with the values of their best epoch."""
    count = show_official(loop, cell.task, args)
    loop.population.values.copy_(loop.best)
    return loop.evaluate(), count


def show_official(loop: Loop, task: str, args: argparse.Namespace) -> int:
    """Put the official validation rows of a task in the place of those held out; returns their number."""
    first, plan = loop.members[0], TASKS[task]
    length = {"glue": OFFICIAL_LENGTH, "words": LONGEST_PROMPT}.get(plan.kind, first.config.max_length)
    if plan.kind == "glue":
        where = {"data": task, "data_dir": str(args.data_dir), "limit": args.limit or plan.official}
    else:
        where = {"validation": str(Path(first.config.data).with_name("official.jsonl.gz"))}
    config = first.config.model_copy(update={**where, "max_length": length})
    encoded: Any = encoded_once(data_options(config)).splits["validation"]
    tokenizer = load_tokenizer(config.model)
    collator: Any = first.trainer.data_collator
    split_of_each = [encoded] * len(loop.members)
    loop.rows["validation"] = Rows(
        split_of_each, collator, loop.device, on_left=tokenizer.padding_side == "left", kind=loop.kind
    )
    for member in loop.members:
        member.splits["validation"] = encoded  # type: ignore[index]
    return len(encoded)


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
    cells = cells_beyond(known) if args.extend else left(cells_of(args.order, args, known), args.model.name, known)
    if args.queue is not None:
        with graphable():
            jobs = ((cell.file, partial(measure, cell, args, args.queue / "data")) for cell in cells)
            take(
                ((f"{args.out.name}@{name}", partial(joined, known, job)) for name, job in jobs), args.queue, args.until
            )
        return
    until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        queue = Path(folder)
        for task in {cell.task for cell in cells}:
            write_split(task, args.model, args.data_dir, queue / "data")
        words = [*sys.argv, "--queue", folder]
        gpus = [] if args.cpu else list(range(args.first_gpu, args.first_gpu + max(1, args.gpus)))
        workers = [Worker(gpu=gpu) for _ in range(args.each) for gpu in gpus or [None]]
        oversee(words, queue, [args.out], workers=workers, count=len(cells), until=until, end=until + args.grace)
    print(table(read_rows([args.out])))


def write_split(task: str, model: Path, source: Path, target: Path) -> None:
    """Write what a task trains on and is scored on into ``target / task``."""
    if TASKS[task].kind == "glue":
        split(task, source, target)
    else:
        write_words(task, load_tokenizer(str(model)), source, target)


if __name__ == "__main__":
    main()
