"""What is left of a task after two others: the paper's Table 4, in all orders of SST-2, MRPC and QNLI.

One classifier is trained on the three tasks in turn, its head and its adapter going on from where they are, and is then
scored on the official validation rows of each. A row of campaign.py is one method: every order and seed, as
populations of all members that train on the same task at the same time. ``CYCLES`` are half of the orders, of which
each task has each place once. Nothing is chosen on the way: one rate, the middle of the method's grid, and the last
step of each task.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import forms
import peft
import torch
import transformers
from cells import Cell, joined_versions
from methods import METHODS
from protocol import SHARES, epochs_of
from torch import Tensor

from loretta.population.loop import Loop
from loretta.population.training import prepare

SEQUENCE = ("sst2", "mrpc", "qnli")
ORDERS = tuple(itertools.permutations(SEQUENCE))
CYCLES = tuple(SEQUENCE[k:] + SEQUENCE[:k] for k in range(len(SEQUENCE)))
Member = tuple[tuple[str, ...], int]  # an order or its beginning, and a seed


def jobs(
    options: argparse.Namespace, known: Sequence[dict[str, Any]], split_of: Callable[[str], Path]
) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What each method lacks: a name, and what makes the whole row.

    A row gets one thing at a time, since both are added to the row that is there: first the orders that it lacks, with
    the seeds that it has, and then the seeds, in the orders that it has.
    """
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    rows = {row["method"]: row for row in known}
    orders, seeds = CYCLES if options.cycles else ORDERS, range(options.seeds)
    for name in options.methods:
        label = name.replace(" ", "-")
        if (row := rows.get(name)) is None:
            found.append((label, partial(measure, name, orders, seeds, options, split_of)))
            continue
        make = partial(measure, name, args=options, split_of=split_of)
        if lacking := [order for order in orders if ">".join(order) not in row["scores"]]:
            found.append((f"{label}-orders", partial(_joined, row, partial(make, lacking, row["seeds"]))))
        elif more := sorted({*seeds} - {*row["seeds"]}):
            of_row = [tuple(order.split(">")) for order in row["scores"]]
            found.append((f"{label}-from-{more[0]}", partial(_joined, row, partial(make, of_row, more))))
    return found


def _joined(row: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row with further orders of its seeds, or further seeds of its orders."""
    more = make()
    if more["seeds"] == row["seeds"]:
        seeds, scores = row["seeds"], {**row["scores"], **more["scores"]}
    else:
        seeds = row["seeds"] + more["seeds"]
        scores = {
            order: {task: before + more["scores"][order][task] for task, before in of_order.items()}
            for order, of_order in row["scores"].items()
        }
    both = {"seeds": seeds, "scores": scores, "seconds": row["seconds"] + more["seconds"]}
    return {**more, **both, "versions": joined_versions(row, more)}


def measure(
    name: str,
    orders: Sequence[tuple[str, ...]],
    seeds: Sequence[int],
    args: argparse.Namespace,
    split_of: Callable[[str], Path],
) -> dict[str, Any]:
    begin = time.perf_counter()
    values: dict[Member, Tensor] = {((), seed): torch.empty(0) for seed in seeds}
    scores: dict[Member, dict[str, float]] = {}
    trained = 0
    for length in range(1, len(SEQUENCE) + 1):
        found: dict[Member, Tensor] = {}
        for task in SEQUENCE:
            begun = {order[:length] for order in orders if order[length - 1] == task}
            if not begun:  # of a row that lacks few orders
                continue
            members = [(beginning, seed) for beginning in sorted(begun) for seed in seeds]
            loop = turn(name, task, [(m, values[m[0][:-1], m[1]]) for m in members], args, split_of(task))
            found |= {member: loop.population.values[k].clone() for k, member in enumerate(members)}
            if length == len(SEQUENCE):
                scores |= dict(zip(members, accuracies(loop, args), strict=True))
            trained = sum(w.stop - w.start for n, w in loop.population.slices.items() if "classifier" not in n)
            del loop
        values = found
    return {
        "part": "forgetting", "model": Path(args.model).name, "task": ",".join(SEQUENCE), "method": name,
        "family": METHODS[name].family, "trained": trained, "learning_rate": METHODS[name].middle,
        "seeds": list(seeds), "metric": "accuracy",
        "scores": {
            ">".join(order): {task: [scores[order, seed][task] for seed in seeds] for task in SEQUENCE}
            for order in orders
        },
        "share": SHARES.get(Path(args.model).name, 1.0), "seconds": time.perf_counter() - begin,
        "device": "cpu" if args.cpu else torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "command": "python benchmarks/campaign.py --models FOLDER --data-dir DATA",
    }  # fmt: skip


def turn(name: str, task: str, members: Sequence[tuple[Member, Tensor]], args: argparse.Namespace, data: Path) -> Loop:
    """Train members on one task from the values that they have; empty ones are those of a fresh adapter."""
    cell = Cell(
        task=task,
        method=name,
        rates=(METHODS[name].middle,),
        seeds=tuple(seed for (_, seed), _ in members),
        epochs=epochs_of(task, args.model),
    )
    with tempfile.TemporaryDirectory() as folder:
        configs = forms.configs_of(cell, args, data, Path(folder))
        configs = [c.model_copy(update={"output": f"{folder}/{k}"}) for k, c in enumerate(configs)]
        with forms.heads_alike([]):
            loop = prepare(configs, Path(folder))
    for row, (_, values) in zip(loop.population.values, members, strict=True):
        if len(values):
            row.copy_(values)
    loop.parts, loop.most = forms.parts_of(loop), forms.LARGE_PART if forms.is_large(loop) else loop.most
    forms.score_widely(loop)
    loop.train()
    return loop


def accuracies(loop: Loop, args: argparse.Namespace) -> list[dict[str, float]]:
    """The accuracy of each member on the official validation rows of each task, as it is behind its last step."""
    loop.best.copy_(loop.population.values)
    found: list[dict[str, float]] = [{} for _ in loop.members]
    for task in SEQUENCE:
        forms.show_official(loop, task, args)
        for of_member, output in zip(found, loop.answers("validation"), strict=True):
            of_member[task] = float((output.predictions.argmax(-1) == output.label_ids).mean())
    return found
