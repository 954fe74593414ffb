"""A decoder on tasks in words whose answers are texts.

SQuAD and DROP are generated; of COPA, WSC and ReCoRD the likelier option is the answer.

Runs of campaign.py, one at a time, as ``loretta train`` does them. The seed draws the examples: at most 1,000 of the
official training rows to train on and 500 to choose the epoch and a method's rate by the loss, and at most 1,000 of the
official validation rows for the score, as in the paper's Tables 2 and 3. The untrained model is scored on the same.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from instruct import record_of, row_of
from methods import METHODS, UNTRAINED

from loretta.tasks.prompted import PROMPTED

# the files here have 500 training rows of SQuAD, of one sentence each, and 32 of ReCoRD
SAMPLES = {
    "squad": {"train": 400, "validation": 100}, "drop": {"train": 1000, "validation": 200},
    "record": {"train": 24, "validation": 8},
}  # fmt: skip
LENGTHS = {"squad": 384, "drop": 512, "record": 768}  # tokens; those of COPA and WSC are short
EPOCHS = {"copa": 5, "wsc": 5, "squad": 5, "drop": 2, "record": 10}
NAMES = (UNTRAINED, "LoRA r=8", "compact + norms", "adp + norms", "rep + norms", "LoRA r=1", "norms")
RATES = (1.0, 0.5)  # times the middle of a method's grid


def run(name: str, task: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    trains = name != UNTRAINED
    record = record_of(
        name, args, data=task, data_dir=str(args.data_dir), sample=SAMPLES.get(task, {}), max_new_tokens=20,
        epochs=EPOCHS[task], max_length=LENGTHS.get(task, 128), learning_rate=rate if trains else 1e-12, seed=seed,
        max_steps=args.max_steps if trains else 1, eval_batch_size=8 if task == "record" else 32,
    )  # fmt: skip
    losses = [point.values["loss"] for point in record.history if point.split == "validation"]
    metric, test = PROMPTED[task].metrics[0], record.test or {}
    return {
        **row_of("answers", task, name, rate, seed, record, args), "held_out": min(losses), "official": test[metric],
        "metric": metric, "scores": test, "curve": losses, "epochs": EPOCHS[task],
    }  # fmt: skip


def jobs(
    options: argparse.Namespace, known: Sequence[dict[str, Any]]
) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The runs that no row has: a name, and what makes the row."""
    done = {(row["method"], row["task"], row["rate"], row["seed"]) for row in known}
    return [
        (f"{task}-{rate:g}-{seed}-{name.replace(' ', '-')}", partial(run, name, task, rate, seed, options))
        for task in options.tasks
        for factor in RATES[: options.rates]
        for seed in range(options.seeds)
        for name in options.methods or NAMES
        for rate in [factor * METHODS[name].middle]
        if (name, task, rate, seed) not in done and not (name == UNTRAINED and factor != RATES[0])
    ]
