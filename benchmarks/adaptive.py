"""Ranks that adapt, beside constant ranks and AdaLoRA with as many parameters at the end.

Runs of campaign.py, one at a time. Tasks, held-out rows and heads are those of protocol.py, with three epochs. A run's
score is that of its best epoch on the held-out rows; of a run whose ranks adapt, of those behind the last cut.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from protocol import BATCH, HEAD_RATE, TASKS, lines_of
from transformers import TrainerCallback

from loretta.training import adaptive_ranks as adapting
from loretta.training import run as running
from loretta.training.config import RunConfig

COUNT = 18_600  # parameters at the end without the final layer: LoRA of rank 2 on query and value has 18,432 here
EPOCHS = 3
RATES = (1.5e-3, 3e-3, 7.5e-4, 6e-3)  # in the order of their value
ALL = {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": r".*(pooler|classifier)\.dense"}
QV = {"target_modules": ["query", "value"]}
COMPACT = {"r": 1, "tensor_rank": 5, "modes_per_side": 2, "lora_alpha": 10, **ALL}
WIDE = {**COMPACT, "tensor_rank": 10, "lora_alpha": 20}
EVEN = {"even_rates": True}  # each core at a rate of its own, by what it sums
ONE_MODE = {"r": 2, "tensor_rank": 2, "modes_per_side": 1, "lora_alpha": 4, **QV}
# name -> (method of a run, options, what becomes of the ranks)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA r=2": ("lora", {"r": 2, "lora_alpha": 4, **QV}, "constant"),
    "AdaLoRA 4 to 2": ("peft:adalora", {"init_r": 4, "target_r": 2, "lora_alpha": 4, **QV}, "AdaLoRA"),
    "one mode, rank 2": ("rep", ONE_MODE, "constant"),
    "one mode, adaptive from 4": ("rep", {**ONE_MODE, "r": 4, "tensor_rank": 4, "lora_alpha": 8}, "adaptive"),
    "compact, rank 5": ("rep", COMPACT, "constant"),
    "compact, rank 10": ("rep", WIDE, "constant"),  # what the adaptive ones begin with, of more parameters
    "compact, adaptive from 10": ("rep", WIDE, "adaptive"),
    "compact, adaptive, moments kept": ("rep", WIDE, "adaptive, moments kept"),
    "compact even, rank 5": ("rep", {**COMPACT, **EVEN}, "constant"),
    "compact even, adaptive from 10": ("rep", {**WIDE, **EVEN}, "adaptive"),
}


class Allocate(TrainerCallback):
    """What AdaLoRA wants to be called behind each step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.max_steps > 1:  # the only step would be the one that cuts by what earlier ones have noted
            model.base_model.update_and_allocate(state.global_step + 1)


def run(name: str, task: str, rate: float, seed: int, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train one run, and count what it has at the end."""
    method, options, ranks = METHODS[name]
    if method == "rep":
        options = {**options, "train_norms": False, "train_head": "dense"}
    if ranks == "AdaLoRA":
        rows = args.limit or len(lines_of(data / task / "train.jsonl.gz"))
        steps = args.max_steps or EPOCHS * -(-rows // BATCH)
        options = {**options, "total_step": steps, "tinit": steps // 5, "tfinal": steps * 2 // 5, "deltaT": 10}
    found: dict[str, Any] = {}

    def with_frozen_pooler(*given: Any) -> Any:
        model, half = prepare_model(*given)
        for parameter in model.get_submodule("base_model.model.bert.pooler").parameters():
            parameter.requires_grad_(False)
        return model, half

    def with_callback(*given: Any) -> Any:
        trainer = found["trainer"] = make_trainer(*given)
        if ranks == "AdaLoRA":
            trainer.add_callback(Allocate())
            # PEFT cannot load an adapter of lower ranks into the one that trains
            trainer.args.load_best_model_at_end = False
        elif ranks != "constant":
            trainer.add_callback(adapting.AdaptiveRanks(COUNT + _head(trainer.model)))
        return trainer

    prepare_model, make_trainer = running.prepare_model, running.make_trainer
    forget = adapting.forget if ranks == "adaptive" else (lambda optimizer, parameters: None)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(running, "prepare_model", with_frozen_pooler),
        mock.patch.object(running, "make_trainer", with_callback),
        mock.patch.object(adapting, "forget", forget),
    ):
        config = RunConfig(
            model=str(args.model), data=task, data_dir=str(data), method=method, method_args=options, epochs=EPOCHS,
            max_steps=args.max_steps, limit=args.limit, max_length=TASKS[task].length, batch_size=BATCH,
            eval_batch_size=256, learning_rate=rate, head_learning_rate=HEAD_RATE, seed=seed, bf16=not args.cpu,
            cuda_graph=False, cpu=args.cpu, logging_steps=50, output=f"{folder}/run",
        )  # fmt: skip
        record = running.train(config, say=lambda line: None)
    model = found["trainer"].model
    if ranks == "AdaLoRA":
        pattern = model.peft_config["default"].rank_pattern or {}
        sizes = {n: m.in_features + m.out_features + 1 for n, m in model.named_modules() if hasattr(m, "lora_E")}
        kept = {key.partition(".lora_E")[0]: sum(flags) for key, flags in pattern.items()}
        # without a pattern, of a run too short for its first cut, all have the rank that they began with
        begun = model.peft_config["default"].init_r
        of_each = {name: next((k for n, k in kept.items() if name.endswith(n)), begun) for name in sizes}
        count = sum(size * of_each[name] for name, size in sizes.items())
        used = sorted(of_each.values())
    else:
        count = record.parameters.trainable - _head(model)
        used = sorted(max(train.ranks) for train in record.trains for _ in range(train.count))
    evaluated = [point for point in record.history if point.split == "validation"]
    if ranks != "constant":  # those of before had more parameters
        evaluated = [point for point in evaluated if point.step > 0.6 * evaluated[-1].step]
    return {
        "part": "adaptive", "model": Path(args.model).name, "task": task, "method": name, "rate": rate, "seed": seed,
        "trained": count,
        "score": max(point.values[record.metric] for point in evaluated), "metric": record.metric,
        "ranks": [used[0], used[len(used) // 2], used[-1]] if used else [], "epochs": EPOCHS,
        "seconds": record.train_seconds, "device": record.device,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "command": "python benchmarks/campaign.py --models FOLDER --data-dir DATA",
    }  # fmt: skip


def _head(model: Any) -> int:
    """Parameters of the final layer, which all methods train."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" in n)


def jobs(
    options: argparse.Namespace, known: Sequence[dict[str, Any]], split_of: Callable[[str], Path]
) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The runs that no row has: a name, and what makes the row."""
    done = {(row["method"], row["task"], row["rate"], row["seed"]) for row in known}
    runs = [
        (name, task, rate, seed)
        for seed in range(options.seeds)
        for task in options.tasks
        for name in options.methods or METHODS
        for rate in RATES[: options.rates]
        if (name, task, rate, seed) not in done
    ]
    return [
        (
            "-".join([task, f"{rate:g}", str(seed), *name.replace(",", "").split()]),
            lambda one=one: run(*one, options, split_of(one[1])),  # type: ignore[misc]
        )
        for one in runs
        for name, task, rate, seed in [one]
    ]
