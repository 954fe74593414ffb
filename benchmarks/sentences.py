"""Sentences of RESULTS.md, docs/choosing.md and README whose figures the generated tables and result files have.

Here are those whose figures are computed; what a cell has stands in prose.txt. A sentence has {} for each figure, and
the values that these must be; prose.py compares. Markdown's marks are left out.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from statistics import mean

from answers import SAMPLES
from cited import (
    CHOOSING,
    PAGE,
    README,
    beaten,
    by_order,
    cell,
    cells,
    core,
    counted,
    epochs,
    fallen,
    first,
    fronts,
    gained,
    held_out,
    number,
    official,
    planned,
    rank,
    risen,
    run,
    scored,
    searched,
    shares,
    tiny,
    trained_on,
    tuned,
)
from prompts import TRAINED
from protocol import HEAD_RATE, TASKS, edge
from rated import Said, of_rates
from tables import ROOT
from targets import LIMIT
from verdicts import MARGIN, MODELS


def of_results() -> Iterator[Said]:
    encoders = [(model, form) for model in ("MiniLM", "MPNet") for form in ("compact + norms", "adp + norms")]
    stsb = [official("tables", "to LoRA r=8", model, "stsb", form) for model, form in encoders]
    rte, sst2, cola = beaten("MPNet", "rte"), beaten("MiniLM", "sst2"), beaten("MiniLM", "cola")
    times = official("instruct", "trained", "LoRA r=16") / official("instruct", "trained", "compact + norms")
    mrpc = list(map(number, cells(PAGE, "overfitting", "score at the end", "MiniLM", "mrpc")))
    drop = list(map(number, cells(PAGE, "answers", "score", "drop")))[1:]
    squad = list(map(number, cells(PAGE, "answers", "to untrained", "squad")))
    parts = shares()
    compact = "compact + norms"
    seen = [bool(edge(row)) for file in ("minilm", "mpnet") for row in fronts(file, seen=True)]
    yield "In {} of {} cells of these tasks the best rate is at an end", (sum(seen), len(seen))
    others = [[bool(edge(row)) for row in fronts(file, seen=False)] for file in ("minilm", "mpnet", "smollm2")]
    yield (
        "in {} of {} cells of MiniLM, in {} of {} of MPNet (QNLI, MNLI and QQP apart) and in {} of {} of SmolLM2.",
        (*(count for of in others for count in (sum(of), len(of))),),
    )
    yield "On MNLI {} of {} forms are below LoRA r=8 on MiniLM.", beaten("MiniLM", "mnli")
    yield "On MPNet's RTE {} of {} forms lose to LoRA r=8, and", rte
    yield "in instruction tuning LoRA with {} times the parameters", (times,)
    yield "It trains a {} to a {} of the parameters of LoRA r=8", (max(parts), min(parts))
    yield "the whole interval lies above {}:", (-MARGIN,)
    yield "reaches beyond {}, and", (-MARGIN,)
    yield "RTE on MPNet. {} of {} forms are below LoRA r=8", rte
    mrpc_lost, cola_lost = beaten("MPNet", "mrpc"), beaten("MPNet", "cola")
    yield "Of {} forms {} are below LoRA r=8 on MRPC and {} on CoLA.", (*mrpc_lost[::-1], cola_lost[0])
    of_values, rep = (official("tables", "trained", "MPNet", "cola", name) for name in ("LoRA r=1 v", "rep"))
    yield "which has a {} less. Beside", (1 - of_values / rep,)
    yield "Of {} forms {} are below LoRA r=8 on SST-2", sst2[::-1]
    yield "On CoLA {} are.", cola[:1]
    yield "LoRA of {} times the parameters.", (times,)
    yield (
        "rises by a {} of what LoRA r=8's does",
        (mean([risen("adp + norms"), risen("rep + norms")]) / risen("LoRA r=8"),),
    )
    yield "above LoRA r=8 on both encoders, by {} to {}.", (min(stsb), max(stsb))
    scales, lora = official("standing", "trained", "SmolLM2", "shared r=4 + scales"), "LoRA r=8"
    yield "with a {} of the parameters. Rank 1 with scales", (scales / official("reading", "trained", lora),)
    forms = [cell for cell in cells(PAGE, "standing", "form", "SmolLM2") if cell]
    yield "Both are the best of {} forms.", (len(forms),)
    yield "SST-2 trains on {} drawn rows", (TASKS["sst2"].rows or 0,)
    yield "QNLI, MNLI and QQP on {}.", (trained_on("qnli"),)
    yield "QQP is scored on {} drawn ones.", (TASKS["qqp"].official or 0,)
    yield "The epochs of MPNet are {} fifths", (5 * epochs("all-mpnet-base-v2") / epochs("all-MiniLM-L6-v2"),)
    yield "its final layer learns at {} in", (HEAD_RATE,)
    yield "have few validation rows ({} and {})", (scored("rte"), scored("mrpc"))
    yield "compact goes from {} at rank 1 to {} at rank 32, with {} times as many numbers", gained("compact")
    yield "LoRA goes from {} to {}, with {} times as many", gained("LoRA")
    gains = [rank(form, 32, "SmolLM2")[0] - rank(form, 1, "SmolLM2")[0] for form in ("LoRA", "compact", "shared")]
    yield "On SmolLM2's SST-2 rank 32 gains {} to {}.", (min(gains), max(gains))
    rep, adp = (f"{form}, by the rank of its trains" for form in ("rep", "adp"))
    yield (
        "At rank 32 the paper's rep ({}) and adp ({}) are below LoRA ({}) on MPNet,",
        tuple(rank(form, 32, "MPNet")[0] for form in (rep, adp, "LoRA")),
    )
    ends = [rank(rep, of, model)[0] for model in ("MPNet", "SmolLM2") for of in (1, 32)]
    yield "by the rank of its trains it goes from {} to {} on MPNet and from {} to {} on SmolLM2.", tuple(ends)
    yield "Adp has {} at rank 1 and {} at rank 5 on MPNet,", tuple(rank(adp, of, "MPNet")[0] for of in (1, 5))
    yield "the held-out loss of adp rises by {} from its minimum and rep's by {}", (
        risen("adp + norms"), risen("rep + norms"),
    )  # fmt: skip
    yield "Compact's rises by {}, LoRA r=8's by {}, the dense adapters' by {} with", (
        risen(compact), risen("LoRA r=8"), risen("adapters b=64"),
    )  # fmt: skip
    long = partial(official, "overfitting", "trained", "MiniLM", "mrpc")
    yield "rep has {} LoRA r=1's parameters", (round(long("rep + norms") / long("LoRA r=1")),)
    yield "The norms alone rise least ({})", (risen("norms"),)
    yield "on MRPC all end between {} and {}.", (min(mrpc), max(mrpc))
    yield (
        "at the rate of {} that they like best",
        (float(cells(CHOOSING, "front SmolLM2-135M-Instruct", "rates", "norms last 8")[0].split()[0].strip("*")),),
    )
    yield "LoRA of {} times the parameters: its loss", (times,)
    yield "the higher of its two rates by far ({} for {} on held-out rows)", (tuned(1.5e-3), tuned(7.5e-4))
    share = official("instruct", "trained", "shared r=4 + norms") / official("instruct", "trained", "LoRA r=2")
    yield "Shared r=4 has less than {} of LoRA r=2's parameters", (share,)
    yield "every method gains at least {} of F1 on SQuAD", (math.floor(100 * sorted(squad)[1]) / 100,)
    yield "on MPNet adp is between {} lower and {} higher.", by_order("adp + norms", "MPNet")
    lowest = list(map(number, cells(PAGE, "overfitting", "lowest loss", "MiniLM", "rte")))
    yield "their lowest losses are {} to {}, and a coin's is {}.", (min(lowest), max(lowest), math.log(2))
    yield "that was run goes from {} to between {} and {} of F1", (
        official("answers", "score", "drop", "untrained"), min(drop), max(drop),
    )  # fmt: skip
    yield "at most {} to train on and {} of the official validation rows", (SAMPLES["drop"]["train"], 1_000)
    yield "time of a step, {} times the frozen model's", (LIMIT,)


def of_choosing() -> Iterator[Said]:
    minilm, mpnet = "front all-MiniLM-L6-v2", "front all-mpnet-base-v2"
    compact = "compact + norms"
    times = official("instruct", "trained", "LoRA r=16") / official("instruct", "trained", compact)
    parts = shares()
    bar = [
        cell for column in ("5,000", "10,000", "20,000", "40,000", "80,000") for cell in cells(CHOOSING, "bar", column)
    ]
    came = [cell.split()[0] for cell in bar]
    won, lost, level = (came.count(word) for word in ("better", "worse", "level"))
    yield "on three models, with a {} to a {} of its parameters", (max(parts), min(parts))
    yield (
        "Of {} cells of model and size the best form wins {}, loses {} and is level in {}.",
        (len(came), won, lost, level),
    )
    yield "In {} its mean is the higher one.", (sum("(+" in cell for cell in bar),)
    yield "Of {} cells it loses {}, wins {} and is level with the best in {}.", (len(came), lost, won, level)
    yield "below LoRA of {} times its parameters", (times,)
    trained = partial(held_out, mpnet, "trained")
    yield "below LoRA r=1 of {} times its count", (round(trained("LoRA r=1") / trained("shared r=1")),)
    yield "compact with frozen norms has {} as many numbers as with norms", (trained("compact") / trained(compact),)
    largest = [
        held_out(f"front {name}", "trained", "LoRA r=8")
        / counted(cell(CHOOSING, f"sizes {name}", "best LoRETTA form", "80,000"))
        for name in ("all-MiniLM-L6-v2", "all-mpnet-base-v2", "SmolLM2-135M-Instruct")
    ]
    yield "LoRA r=8, with {} to {} times as many, is", (round(min(largest)), round(max(largest)))
    yield "below LoRA r=1, which has a {} more, and", (trained("LoRA r=1") / trained("rep") - 1,)
    yield "below LoRA r=1 of the values, which has a {} less", (1 - trained("LoRA r=1 v") / trained("rep"),)
    yield "which has {} as many more. With", (trained("shared r=1") / trained("Uni-LoRA d=5000") - 1,)
    kept = held_out("fits", "kept", "the paper's shapes, rank 5") / held_out("fits", "kept", "LoRA r=1")
    yield "the paper's shapes can express about {} of what LoRA r=1 can", (kept,)
    more = held_out(minilm, "trained", "shared r=6 attention") / held_out(minilm, "trained", "shared r=1")
    yield "on MiniLM, with {} times as many numbers", (more,)
    yield "MPNet has {} fifths of MiniLM's epochs", (5 * epochs("all-mpnet-base-v2") / epochs("all-MiniLM-L6-v2"),)
    yield (
        "has a {} less parameters on MiniLM (16,128), a {} less on MPNet (55,296)",
        tuple(1 - held_out(front, "trained", "IA3") / held_out(front, "trained", compact) for front in (minilm, mpnet)),
    )
    yield "it trains {} times what rep's defaults do, and {} of what rep with a rank and a bottleneck of 16 does", (
        planned("shared") / planned("rep"), planned("shared") / planned("rep", "tensor_rank=16", "r=16"),
    )  # fmt: skip
    yield "({} or more below the best rate's median) in {} of {} cells at 3e-3, in {} of {} at 1.5e-3, in {} of {}", (
        0.15, *fallen("0.003"), *fallen("0.0015"), *fallen("0.00075"),
    )  # fmt: skip
    yield "So {} on STS-B, {} on MRPC and {} on CoLA", tuple(tiny(task) for task in ("stsb", "mrpc", "cola"))
    yield (
        "VeRA of rank 256 {} ({} numbers), VB-LoRA {} ({}), Uni-LoRA {} ({}), FourierFT {} ({}), TinyLoRA {} ({}).",
        (searched("peers_mpnet.json", "VeRA", "VB-LoRA", "Uni-LoRA", "FourierFT", "TinyLoRA")),
    )
    yield (
        "Uni-LoRA {} ({}), VeRA {} ({}), TinyLoRA {} ({}), VB-LoRA {} ({}), FourierFT {} ({}).",
        (searched("peers_smollm2.json", "Uni-LoRA", "VeRA", "TinyLoRA", "VB-LoRA", "FourierFT")),
    )
    yield from of_rates()
    inner = "rep 2 modes, inner {}, cut {}"
    for name, shown in (
        (inner.format(8, 2), "in place of 1 gives {} for {} times the parameters"),
        (inner.format(5, 5), "cut 5 gives {} for {} times."),
    ):
        yield shown, (first(name, "cola"), first(name, "trained") / first(inner.format(8, 1), "trained"))
    yield from of_cores()
    yield "one token each, on {} training examples", (TRAINED,)
    yield "is no wider than {} to each side", (MARGIN,)
    yield "with norms on MiniLM {} for {}, with {} as many numbers more", (
        held_out(minilm, "mean", "compact inner 8 + norms"), held_out(minilm, "mean", compact),
        held_out(minilm, "trained", "compact inner 8 + norms") / held_out(minilm, "trained", compact) - 1,
    )  # fmt: skip


def of_cores() -> Iterator[Said]:
    """The section on the gradients and conditions of the cores."""
    yield (
        "Beside the cut rep's are {} and {}, and grow to {} and {}.",
        tuple(core("condition", "rep", name, behind) for behind in (0, 1) for name in ("input 3", "output 1")),
    )
    used = {
        method: list(map(number, cells(CHOOSING, "conditioning", "used", method))) for method in ("rep", "LoRA r=1")
    }
    yield (
        "Those of rep's cores use {} to {}, those of LoRA r=1 {} and {}.",
        (min(used["rep"]), max(used["rep"]), *used["LoRA r=1"]),
    )
    yield (
        "The whole step has {} of the cosine with the weights' gradient that it could have, that of LoRA r=1 {}.",
        tuple(run("cosine / reach", name) for name in ("rep", "LoRA r=1")),
    )
    yield (
        "Even directions change nothing: {} for {}, where LoRA r=1 ends at {}.",
        tuple(run("loss", name) for name in ("rep, even directions", "rep", "LoRA r=1")),
    )
    yield (
        "rep's cores reach {}, those of LoRA r=1 {}. Compact's reach {}, but",
        tuple(run("reach", name) for name in ("rep", "LoRA r=1", "compact")),
    )
    yield (
        "which is {} times rep's. In all",
        (round(run("weights", "compact") / run("weights", "rep")),),
    )
    yield (
        "rep reaches {}, LoRA r=1 {} and compact {}.",
        tuple(run("weights", name) * run("reach", name) for name in ("rep", "LoRA r=1", "compact")),
    )
    moved = {
        method: list(map(number, cells(CHOOSING, "conditioning", "Adam moves", method)))
        for method in ("rep", "compact")
    }
    others = sorted(moved["rep"])[:-1], sorted(moved["compact"])[:-1]
    yield (
        "rep's update moves {} per unit of the rate, by one on any other core {} to {}.",
        (max(moved["rep"]), others[0][0], others[0][-1]),
    )
    gradients = sorted(map(number, cells(CHOOSING, "conditioning", "gradient", "rep")))
    yield "Its gradient is {} of its norm, theirs are at most {}.", (gradients[-1], gradients[-2])
    yield "In compact it is the same ({}, and {} to {})", (max(moved["compact"]), others[1][0], others[1][-1])
    yield "at half its rate rep ends at {}.", (run("other", "rep"),)


def of_readme() -> Iterator[Said]:
    yield "level with LoRA of rank 8 at a {} to a {} of its numbers", (max(shares()), min(shares()))
    asked = (ROOT / "pyproject.toml").read_text()
    oldest = [float(found) for found in re.findall(r'"(?:|torch|transformers)>=(\d+\.\d+)"', asked)]
    yield "Python {} or later, torch {}, transformers {}, PEFT", tuple(oldest)
    yield "(all-MiniLM-L6-v2, {} million parameters)", (number(MODELS["all-MiniLM-L6-v2"].partition(", ")[2]),)
    rates = list(map(number, cells(README, "demo", "test accuracy")))
    yield (
        "684 test sentences (a standard error of {} points)",
        (max(100 * math.sqrt(p * (1 - p) / 684) for p in rates),),
    )
