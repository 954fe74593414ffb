"""Instruction tuning of a decoder: what LoRETTA and LoRA make of conversations about six tasks, by their held-out loss.

Runs of campaign.py, one at a time, through TRL as ``loretta train`` does. The conversations are rows of SQuAD, BoolQ,
RTE, COPA, CB and SST-2 put in words, at most 500 of each task's training data, of which a tenth chooses the epoch and a
method's rate, and at most 100 of its validation data for the loss that is reported.
"""

import argparse
import gzip
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from methods import FULL, METHODS, OURS, UNTRAINED
from protocol import HELD_OUT, lines_of

from loretta.record import RunRecord
from loretta.tasks.prompted import PROMPTED
from loretta.training import run as running
from loretta.training.config import RunConfig

TASKS = ("squad", "boolq", "rte", "copa", "cb", "sst2")
TRAINED, REPORTED = 500, 100  # rows of a task
RATES = (7.5e-4, 1.5e-3)
NAMES = ("LoRA r=1", "LoRA r=2", "LoRA r=16", "compact", "compact + norms", "shared r=4 + norms")
LENGTH, BATCH, EPOCHS = 256, 16, 2


def conversations(task: str, split: str, source: Path, count: int) -> list[str]:
    """Lines of JSON, a conversation each."""
    lines = lines_of(source / task / f"{split}.jsonl.gz")
    random.Random(0).shuffle(lines)
    found: list[str] = []
    for line in lines:
        example = PROMPTED[task].example({**json.loads(line), "split": split})
        if example is not None and len(example.prompt) < 3 * LENGTH and len(found) < count:
            said = [("user", example.prompt.strip()), ("assistant", example.completion.strip())]
            found.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    return found


def write(source: Path, target: Path) -> Path:
    """The folder with ``train``, ``validation`` (a tenth of the training rows) and ``official``."""
    folder = target / "conversations"
    if not folder.exists():
        rows = {"train": [], "validation": [], "official": []}  # type: dict[str, list[str]]
        for task in TASKS:
            pool = conversations(task, "train", source, TRAINED)
            cut = round(HELD_OUT * len(pool))
            rows["validation"] += pool[:cut]
            rows["train"] += pool[cut:]
            rows["official"] += conversations(task, "validation", source, REPORTED)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as half:
            for name, lines in rows.items():
                random.Random(0).shuffle(lines)
                with gzip.open(Path(half) / f"{name}.jsonl.gz", "wt") as file:
                    file.writelines(lines)
            try:
                Path(half).rename(folder)
            except OSError:  # another process was first
                assert folder.exists()
            Path(half).mkdir(exist_ok=True)
    return folder


def run(name: str, rate: float, seed: int, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    folder = write(args.data_dir, data)
    record = record_of(
        name, args, data=str(folder / "train.jsonl.gz"), validation=str(folder / "validation.jsonl.gz"),
        test=str(folder / "official.jsonl.gz"), kind="chat", epochs=EPOCHS, max_length=LENGTH, learning_rate=rate,
        seed=seed,
    )  # fmt: skip
    held_out = [point.values["loss"] for point in record.history if point.split == "validation"]
    return {
        **row_of("instruct", "conversations", name, rate, seed, record, args), "held_out": min(held_out),
        "official": (record.test or {})["loss"], "curve": held_out, "epochs": EPOCHS,
    }  # fmt: skip


def record_of(name: str, args: argparse.Namespace, **what: Any) -> RunRecord:
    """The record of one run of a decoder."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # of torch 2.11: some gradients of masked rows are NaN
    method = METHODS[name]
    options = method.placed("llama", transformers.AutoConfig.from_pretrained(str(args.model)).num_hidden_layers)
    if name == FULL:  # of the whole decoder: what the method lists are places of an encoder
        method, options = replace(method, method="ft"), {}
    if method.method in OURS:
        options["train_norms"] = method.norms
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model=str(args.model), method=method.method, method_args=options, output=f"{scratch}/run",
            **{
                "max_steps": args.max_steps, "limit": args.limit, "batch_size": BATCH, "eval_batch_size": 32,
                "bf16": not args.cpu, "cpu": args.cpu, "logging_steps": 50, **what,
            },
        )  # fmt: skip
        return running.train(config, say=lambda line: None)


def row_of(
    part: str, task: str, name: str, rate: float, seed: int, record: RunRecord, args: argparse.Namespace
) -> dict[str, Any]:
    """What the rows of all runs of a decoder say."""
    return {
        "part": part, "model": Path(args.model).name, "task": task, "method": name, "rate": rate, "seed": seed,
        "family": METHODS[name].family, "trained": 0 if name == UNTRAINED else record.parameters.trainable,
        "seconds": record.train_seconds, "device": record.device,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "command": "python benchmarks/campaign.py --models FOLDER --data-dir DATA",
    }  # fmt: skip


def jobs(
    options: argparse.Namespace, known: Sequence[dict[str, Any]], data: Path
) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The runs that no row has: a name, and what makes the row."""
    done = {(row["method"], row["rate"], row["seed"]) for row in known}
    names = options.methods or NAMES
    runs = [(name, rate, seed) for seed in range(options.seeds) for name in names for rate in RATES]
    return [
        (f"chat-{rate:g}-{seed}-{name.replace(' ', '-')}", partial(run, name, rate, seed, options, data))
        for name, rate, seed in runs
        if (name, rate, seed) not in done
    ]
