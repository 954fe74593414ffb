"""Sentences of docs/choosing.md on learning rates, with their figures."""

import math
from collections import Counter
from collections.abc import Iterator
from statistics import mean

from cited import CHOOSING, RULED, both_encoders, cell, curves, held_out, lines, number, rows_of, ruled, ruled_peaks
from rates import SECOND
from second import second_peaks
from verdicts import MODELS

from loretta.training.methods import METHODS, PAPERS_RANK

Said = tuple[str, tuple[float, ...]]
REP, ADP = "rep x1.25^0.75", "adp x2^0.75"  # with a scale that falls as LoRA's


def of_rates() -> Iterator[Said]:
    """One learning rate over ranks, forms, models and tasks."""
    yield "a peak is no surer than a factor of {}.", (math.sqrt(2),)
    minilm_peaks, mpnet_peaks = ruled_peaks("MiniLM"), ruled_peaks("MPNet")
    both = [*minilm_peaks, *mpnet_peaks]
    yield "that were run lie between {} and {} on MiniLM, and", (min(minilm_peaks), max(minilm_peaks))
    yield "between {} and {} on MPNet. So", (min(mpnet_peaks), max(mpnet_peaks))
    one = math.sqrt(min(both) * max(both))
    yield "So {} is within a factor of {} of each", (one, math.ceil(10 * max(both) / one) / 10)
    peaks = {form: ruled_peaks("SmolLM2", form) for form in RULED}
    ends = {form: (min(of_form), max(of_form)) for form, of_form in peaks.items()}
    yield "compact's peaks lie between {} and {}, LoRA's between {} and {}, shared's between {} and {}: each within", (
        *ends["compact"], *ends["LoRA"], *ends["shared"],
    )  # fmt: skip
    yield "all of them within {}. The curves", (max(map(max, ends.values())) / min(map(min, ends.values())),)
    common, near = 4.24e-3, 2.12e-3
    yield "the one rate {} loses at most {} at any rank of the three forms.", (common, lost_at(common, "SmolLM2"))
    yield (
        "The nearest rate that was, {}, loses up to {} of Matthews' correlation there.",
        (near, lost_at(near, "MiniLM", "MPNet")),
    )
    yield "at the next one, {}, seeds fail, and MPNet loses up to {}.", (common, lost_at(common, "MPNet"))
    yield from on_second_task()
    everywhere = [*both, *(peak for of_form in peaks.values() for peak in of_form)]
    yield "From the encoders to the decoder the peaks lie within {}.", (max(everywhere) / min(everywhere),)
    yield from in_units(both)
    yield "the peak moves by at most {} at the same rank", (max(max(a / b, b / a) for a, b in both_encoders()),)
    (whole,) = (line.cells for line in lines(CHOOSING, "rates") if {"compact^0.5 r=32", "MiniLM"} <= line.words)
    alive = [float(column) for column, cell in whole.items() if column.startswith("0.") and float(cell or 0) > 0]
    yield "whatever the scale, seeds fail above {} at rank 32", (max(alive),)


def in_units(encoders: list[float]) -> Iterator[Said]:
    """One learning rate where the decoder's scale is in units of its weights; the peaks of the encoders are given."""
    factor = "x2.8"
    ends = {form: (min(at), max(at)) for form in RULED if (at := ruled_peaks("SmolLM2", form, times=factor))}
    sizes = {row["model"]: (row["qv"], row["all"]) for row in rows_of("units.json")}
    *encoder, decoder = (sizes[model] for model in MODELS)
    ratios = [large / mean(small) for large, *small in zip(decoder, *encoder, strict=True)]
    yield "What is adapted of SmolLM2 is about {} times as large", (math.sqrt(math.prod(ratios)),)
    yield (
        "LoRA's peaks on SmolLM2 lie between {} and {}, compact's between {} and {}, shared's between {} and {}. All",
        (*ends["LoRA"], *ends["compact"], *ends["shared"]),
    )
    every = [*encoders, *(end for both in ends.values() for end in both)]
    within = math.ceil(10 * max(every) / min(every)) / 10
    yield "All peaks of the three models then lie within {},", (within,)
    yield "a scale in units of the weights brings it within {}.", (within,)
    yield "With {} times its scale, so with lora_alpha={} * rank", (2.8, 2 * 2.8)
    yield "At 8 times the scale, about the square of {},", (2.8,)
    fixed = [*encoders, *(peak for form in RULED for peak in ruled_peaks("SmolLM2", form)), *second_peaks()]
    of_four = [*every, *second_peaks(in_units=True)]
    yield "such a scale brings all peaks within {}, where a fixed one leaves {}.", (
        max(of_four) / min(of_four), max(fixed) / min(fixed),
    )  # fmt: skip
    yield "and {} times that on SmolLM2.", (2.8,)
    yield "root mean squares, about {} on the encoders.", (mean(size for small in encoder for size in small),)
    one = math.sqrt(min(every) * max(every))
    yield "Then {} is within a factor of {} of every peak", (one, math.ceil(10 * max(every) / one) / 10)
    curves = [*ruled("MiniLM", *RULED), *ruled("MPNet", *RULED), *ruled("SmolLM2", *RULED, times=factor)]
    best = {max(of := scores_of(curve), key=of.__getitem__) for curve in curves}
    yield "a factor of 2 apart, the best is {} or {} in all {} curves.", (*sorted(best), len(curves))
    near = 2.12e-3
    yield "At {}, the nearest rate that was run, the decoder loses at most {} at any rank.", (
        near, lost_at(near, "SmolLM2", times=factor),
    )  # fmt: skip
    moved = [
        before / after
        for form in RULED
        for before, after in zip(ruled_peaks("SmolLM2", form), ruled_peaks("SmolLM2", form, times=factor), strict=True)
    ]
    yield "as the root of the scale, by {}, since", (math.sqrt(2.8),)
    yield "both factors; it moves by {} to {}.", (min(moved), max(moved))
    largest = ruled_peaks("SmolLM2", "compact", times="x8")
    yield "compact's peaks lie between {} and {}, below those of the encoders.", (min(largest), max(largest))
    peaks = {form: [moved_by(form, model) for model in ("MiniLM", "MPNet", "SmolLM2")] for form in ("adp", "rep")}
    yield "adp's peak moves by {}, {} and {} on MiniLM, MPNet and SmolLM2, and rep's by {}, {} and at least {}.", (
        *peaks["adp"], *peaks["rep"],
    )  # fmt: skip


def on_second_task() -> Iterator[Said]:
    """One learning rate on STS-B, and what LoRA's rule does to rep and adp."""
    minilm = ruled_peaks("MiniLM", second=True)
    few = [*ruled_peaks("MPNet", "LoRA", second=True), *ruled_peaks("MPNet", "compact", second=True)]
    shared = ruled_peaks("MPNet", "shared", second=True)
    yield (
        "On MiniLM they are between {} and {}, on MPNet those of LoRA and compact between {} and {}, those of shared "
        "between {} and {}.",
        (min(minilm), max(minilm), min(few), max(few), min(shared), max(shared)),
    )
    best = {max(of := scores_of(curve), key=of.__getitem__) for curve in ruled("MPNet", "LoRA", "compact", second=True)}
    (best_rate,) = best
    yield "Of the rates that were run {} is the best for LoRA and compact on MPNet,", (best_rate,)
    yield (
        "On STS-B LoRA's moves by {} on MiniLM and {} on MPNet, shared's by {} and {}.",
        tuple(
            moved_by(form, f"{model}, stsb") for form in ("LoRA^0.75", "shared^0.75") for model in ("MiniLM", "MPNet")
        ),
    )
    yield "On STS-B it stays, {} on both.", (moved_by("compact cores^1", "MiniLM, stsb"),)
    yield from of_cores()
    yield from of_root()
    yield (
        "rep's moves by {} and {}, adp's by at least {} and by {}.",
        tuple(moved_by(form, f"MPNet{task}") for form in (REP, ADP) for task in ("", ", stsb")),
    )
    yield (
        "On MiniLM's STS-B rep's moves by {} and adp's by at least {}.",
        tuple(moved_by(form, "MiniLM, stsb") for form in (REP, ADP)),
    )
    decoder = [held_out("rates", "peak", f"rep x3.5^0.75 r={rank}", "SmolLM2") for rank in (5, 16, 32)]
    yield "On SmolLM2 rep's lies between {} and {} from rank 5 to 32,", (min(decoder), max(decoder))
    (failing,) = {fails_at(of) for of in curves() if (of["form"], of["task"]) == (f"{ADP} r=32", SECOND)}
    yield "and still its seeds fail on STS-B from {} on, on both encoders.", (failing,)


def of_root() -> Iterator[Said]:
    """What is left of the movement of rep's and adp's peaks where the rate is divided by the root of the rank."""
    yield (
        "adp's peak then moves by {} on MiniLM, {} on MPNet and {} on SmolLM2, rep's by {}, {} and at least {}.",
        tuple(rooted(form, model) for form in ("adp", "rep") for model in ("MiniLM", "MPNet", "SmolLM2")),
    )
    yield (
        "On STS-B, at the falling scale, adp's moves by at least {} and by {}, rep's by {} and {}.",
        tuple(rooted(form, model, second=True) for form in (ADP, REP) for model in ("MiniLM", "MPNet")),
    )
    first = METHODS["adp"].learning_rate
    yield (
        "start at {} times the root of {} over the rank, but for those with even_rates: at {} adp's seeds fail",
        (first, PAPERS_RANK, first),
    )


def of_cores() -> Iterator[Said]:
    """Rep and adp with a rate for each core, from the paper's rank on."""
    places = (("MPNet", "cola"), ("MPNet", SECOND), ("MiniLM", SECOND), ("SmolLM2", "sst2-words"))
    adp, rep = ([cores_curves(form, *place) for place in places] for form in ("adp", "rep"))
    yield (
        "from rank 5 to 32 its peak moves by {} on MPNet's CoLA, by {} on its STS-B, by {} on MiniLM's STS-B and by {} "
        "on SmolLM2.",
        tuple(map(spread, adp)),
    )
    cola, wide, small, decoder = map(spread, rep)
    yield (
        "Rep's peaks move by {} on MiniLM's STS-B, by {} on MPNet's, by at least {} on SmolLM2, and by {} on MPNet's "
        "CoLA,",
        (small, wide, decoder, cola),
    )
    peaks = [number(of["peak"]) for some in adp for of in some]
    yield "Adp's lie between {} and {} then,", (min(peaks), max(peaks))
    every = [of for of in curves() if of["form"].startswith("adp cores^1 ")]
    best = Counter(max(of := scores_of(curve), key=of.__getitem__) for curve in every)
    (lower, one), (upper, other) = sorted(best.most_common(2))
    yield "the best is {} or {} in {} of {} curves;", (lower, upper, one + other, len(every))
    scores = [
        max(scores_of(of).values())
        for model, task in (places[0], places[3])
        for name in ("adp cores^1 r=32", "adp r=32")
        for of in curves()
        if (of["form"], of["model"], of["task"]) == (name, model, task)
    ]
    yield "{} on MPNet's CoLA, for {} with one rate for all cores, and {} on SmolLM2, for {}.", tuple(scores)
    (rank_5,) = (of for of in rep[0] if of["form"].endswith(" r=5"))
    yield "where seeds of rank 5 fail at {}.", (fails_at(rank_5),)


def cores_curves(form: str, model: str, task: str) -> list[dict[str, str]]:
    """The curves of a form with a rate for each core, but for that of rank 1, which has no other rate."""
    found = [of for of in curves() if of["form"].startswith(f"{form} cores^1 r=")]
    return [of for of in found if (of["model"], of["task"]) == (model, task) and not of["form"].endswith("r=1")]


def spread(some: list[dict[str, str]], power: float = 0.0) -> float:
    """The factor between the peaks of some curves, each times that power of its rank."""
    peaks = [number(of["peak"]) * float(of["form"].rpartition(" r=")[2]) ** power for of in some]
    return max(peaks) / min(peaks)


def rooted(form: str, model: str, *, second: bool = False) -> float:
    """The factor between the peaks of a form, each times the root of its rank."""
    found = [of for of in curves() if of["form"].startswith(f"{form} r=") and of["model"] == model]
    return spread([of for of in found if (of["task"] == SECOND) == second], power=0.5)


def fails_at(curve: dict[str, str]) -> float:
    """The first rate above the best one at which the score is less than half of the best."""
    scores = scores_of(curve)
    best = max(scores, key=scores.__getitem__)
    return min(rate for rate, score in scores.items() if rate > best and score < scores[best] / 2)


def moved_by(form: str, model: str) -> float:
    return number(cell(CHOOSING, "rates", model, form).strip("≥ "))


def lost_at(rate: float, *models: str, times: str = "") -> float:
    """What one rate loses to the best one of a form and rank, where that is the most."""
    curves = [curve for model in models for curve in ruled(model, *RULED, times=times)]
    return max(max(of.values()) - of[rate] for of in map(scores_of, curves))


def scores_of(curve: dict[str, str]) -> dict[float, float]:
    return {float(at): float(score) for at, score in curve.items() if at.startswith("0.") and score}
