"""Sentences of RESULTS.md and docs/choosing.md that compare two methods: paired differences with their intervals.

prose.txt names them; differences of means are made anew from the rows of both methods. What is said without a figure
stands below, with whether it is so.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from cited import CHOOSING, PAGE, cell, cells, fallen, gap, less, lines, number, ours, pair, rows_of, verdict_of
from named import WITHOUT_RTE
from protocol import SEEN, best_rate, edge, interval
from runs import by_rate, by_seed
from sentences import Said
from verdicts import MARGIN, MODELS, SIZES

ENCODERS, ALL = ("MiniLM", "MPNet"), ("MiniLM", "MPNet", "SmolLM2")
COMPACT, ADP, REP, SHARED = "compact + norms", "adp + norms", "rep + norms", "shared r=4 + norms"
SCALED = "compact + k,v scales"
FIVE = ("cola", "mrpc", "stsb", "rte", "sst2")


TASKS_OF = {"SEEN": SEEN, "FOUR": WITHOUT_RTE}
OF_CELL = re.compile(r"(?:(RESULTS|choosing): )?(-?)cell (.+?) / (.+?) / (.+)")
OF_METHODS = re.compile(r"(official |held-out )?(\w+) (.+?) (over|under) (.+?)(?: on ([\w-]+))?")


def figure(page: Path, text: str) -> tuple[float, float]:
    """A difference or a cell as prose.txt names it, and half of its interval."""
    if found := OF_CELL.fullmatch(text):
        other, turned, section, column, row = found.groups()
        here = {"RESULTS": PAGE, "choosing": CHOOSING}.get(other, page)
        middle, _, half = cell(here, section, column, *row.split(" & ")).partition(" ± ")
        both = number(middle), number(half) if half else math.nan
        return less(both) if turned else both
    found = OF_METHODS.fullmatch(text)
    assert found, text
    official = page == PAGE if found[1] is None else found[1] == "official "
    which = "official" if official else "held_out"
    tasks = TASKS_OF.get(found[6], (found[6],)) if found[6] else ()
    both = gap(which, found[2], found[3], found[5], *tasks)
    return less(both) if found[4] == "under" else both


def named(page: Path) -> Iterator[Said]:
    """The sentences of a page in prose.txt."""
    text = (Path(__file__).parent / "prose.txt").read_text()
    (mine,) = re.findall(rf"^\[{page.name}\]\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    for line in mine.splitlines():
        sentence, _, sources = line.rpartition(" | ")
        both = [figure(page, source) for source in sources.split("; ")]
        marks = re.findall(r"±|\{\}", sentence)
        values = [x for mark, pair in zip(marks, both, strict=True) for x in (pair if mark == "±" else pair[:1])]
        yield sentence.replace("±", "{} ± {}"), tuple(values)


def at_sizes(word: str) -> set[tuple[str, str]]:
    """The cells of model and size where the best form is "better", "worse" or "level", on held-out rows."""
    models = [shown.partition(" ")[0] for shown in MODELS.values()]
    sizes = [f"{size:,}" for size in SIZES]
    return {(m, size) for m in models for size in sizes if cell(CHOOSING, "bar", size, m).startswith(word)}


def so_in_results() -> dict[str, bool]:
    def came(model: str, one: str, other: str, *tasks: str) -> str:
        return verdict_of("official", model, one, other, *tasks)

    def everywhere(word: str, one: str, other: str, *tasks: str, on: Sequence[str] = ENCODERS) -> bool:
        return {came(model, one, other, *tasks) for model in on} == {word}

    seen = [came("MiniLM", form, "norms", *SEEN) for form in (COMPACT, SHARED, ADP, REP)]
    full = {
        task: [came("MiniLM", "full fine-tuning", form, task) for form in ours("MiniLM")] for task in ("sst2", "cola")
    }
    turns = [*((form, model) for form in (COMPACT, ADP, REP) for model in ENCODERS), (SHARED, "MiniLM")]
    kept = {(form, model): pair(PAGE, "forgetting", "to LoRA r=8", form, model) for form, model in turns}
    tuned = [pair(PAGE, "instruct", "to LoRA r=2", form) for form in (COMPACT, SHARED)]
    rises = cell(
        PAGE, "claims", "MPNet",
        "the held-out loss of adp and rep rises less than LoRA r=8's in 30 epochs (Figure 4)",
    )  # fmt: skip
    above = [shown for shown in cells(PAGE, "standing", "to LoRA r=8") if shown.startswith("above")]
    return {
        "The paper's rep with frozen norms loses to LoRA r=1 on both encoders.": everywhere("worse", "rep", "LoRA r=1"),
        "With trained norms the paper's rep and adp are below LoRA r=8 there,": (
            everywhere("worse", REP, "LoRA r=8") and everywhere("worse", ADP, "LoRA r=8")
        ),
        "is level with LoRA r=8 in the mean over tasks on all three models.": (
            everywhere("level", COMPACT, "LoRA r=8", on=ALL)
        ),
        "and not above it on the decoder.": came("SmolLM2", "rep", "LoRA r=1") != "better",
        "Beside trained norms its trains add something sure on MPNet alone.": (
            [model for model in ALL if came(model, REP, "norms") == "better"] == ["MPNet"]
        ),
        "compact with norms among them.": came("MiniLM", COMPACT, "LoRA r=8", "sst2") == "worse",
        "With norms compact and shared are above the norms alone on MiniLM, adp and rep are level with them.": (
            seen == ["better", "better", "level", "level"]
        ),
        "On MiniLM it is above every form on SST-2 and above all but four on CoLA,": (
            set(full["sst2"]) == {"better"} and len(full["cola"]) - full["cola"].count("better") == 4
        ),
        "and above adp and rep with norms. It trains": (
            came("MiniLM", "IA3", ADP) == "better" == came("MiniLM", "IA3", REP)
        ),
        "Compact with norms is level with it on all three models.": everywhere("level", COMPACT, "IA3", on=ALL),
        "and with compact with norms.": came("MPNet", "compact v, MLP + scales", COMPACT) == "level",
        "On MPNet that is open.": rises.count(" open ") == 2,
        "Adp, rep and compact end lower than LoRA r=8 on both encoders, and no form ends higher.": (
            {of for of, gap in kept.items() if sum(gap) < 0}
            == {(form, model) for form in (ADP, REP, COMPACT) for model in ENCODERS}
            and not any(middle > half for middle, half in kept.values())
        ),
        "rank 2 on the encoders (18,432 and 73,728) and rank 1 on SmolLM2 (57,600) have fewer numbers": (
            everywhere("level", COMPACT, "LoRA r=2") and came("SmolLM2", COMPACT, "LoRA r=1") == "level"
        ),
        "On SmolLM2 the norms alone would pass, too,": (
            (of := gap("official", "SmolLM2", "norms", "LoRA r=8"))[0] - of[1] > -MARGIN
        ),
        "and level with the norms alone (38,400;": came("MPNet", "compact", "norms") == "level",
        "The norms alone are level with both.": (
            {came("SmolLM2", form, "norms") for form in ("shared r=4 + scales", "shared r=1 + v scales")} == {"level"}
        ),
        "By that loss they are level with it,": (
            all(abs(middle) <= half for middle, half in (answered("drop", form) for form in (COMPACT, ADP)))
        ),
        "dense adapters, prefixes and full fine-tuning were not run on texts.": not {
            row["method"]
            for file in ("forms_smollm2.json", "peers_smollm2.json")
            for row in rows_of(file)
            if row["task"] == "stories"
            and row["method"].startswith(("FourierFT", "VB-", "TinyLoRA", "adapters", "prefix", "full"))
        },
        "above LoRA r=1. It is level with LoRA r=8.": came("MiniLM", "shared r=2 + scales", "LoRA r=8") == "level",
        "Compact and adp with norms are above LoRA r=8 on both encoders": (
            everywhere("better", COMPACT, "LoRA r=8", "stsb") and everywhere("better", ADP, "LoRA r=8", "stsb")
        ),
        "Compact and shared end with a lower loss than LoRA of as many parameters.": (
            all(middle + half < 0 for middle, half in tuned)
        ),
        "From 10,000 to 80,000 parameters the best form of LoRETTA has the lowest loss of all that were run.": (
            cells(PAGE, "texts", "") == ["level", *4 * ["better"]]
        ),
        "and no other method is by its interval.": (
            [
                line.cells["method"]
                for line in lines(PAGE, "answers")
                if line.cells["task"] == "copa" and is_above(line.cells["to untrained"])
            ]
            == [SCALED, "LoRA r=8"]
        ),
        "These three have five seeds at 1.5e-3 and at half of it.": {
            (line.cells["seeds"], line.cells["rate"])
            for line in lines(PAGE, "answers")
            if line.cells["task"] in ("squad", "drop") and line.cells["method"] in (COMPACT, ADP, "LoRA r=8")
        }
        == {("5", "0.0015")},
        "SmolLM2 reads 700 short stories twice, with five seeds in this table.": {
            seeds
            for name in {
                shown.rpartition(" (")[0]
                for column in ("best LoRETTA form", "best other method")
                for shown in cells(PAGE, "texts", column)
            }
            for seeds in cells(PAGE, "tables", "seeds", "SmolLM2", "stories", name)
        }
        == {"5"},
        # those two stand above it
        "No other form with fewer parameters is above LoRA r=8 in a mean.": len(above) == 2,
    }  # fmt: skip


def answered(task: str, method: str) -> tuple[float, float]:
    """The held-out loss of a task with answers beside that of LoRA r=8, at the rate of five seeds."""
    runs = by_rate("answers.json")[task]
    own, other = (by_seed(runs[name][1.5e-3], "held_out") for name in (method, "LoRA r=8"))
    return interval(list(own - other))


def is_sure(difference: str) -> bool:
    """Whether a difference, as a table has it, is further from zero than its interval."""
    middle, _, half = difference.partition(" ± ")
    return bool(half) and abs(float(middle)) > float(half)


def is_above(difference: str) -> bool:
    return is_sure(difference) and number(difference) > 0


def not_run_in_results() -> dict[str, bool]:
    lower = [row for row in rows_of("answers.json") if row["rate"] in (7.5e-4, 5e-3, 2.5e-5)]
    seeds = Counter((row["task"], row["method"]) for row in lower)
    higher = Counter((row["task"], row["method"]) for row in rows_of("answers.json") if row not in lower)
    wiki = [row for row in rows_of("forms_smollm2.json") if row["task"] == "wiki" and row["method"] != "untrained"]
    six = ("LoRA r=8", COMPACT, SCALED, ADP, "IA3", "full fine-tuning")
    forms = {row["method"] for row in rows_of("forms_smollm2.json") if row["family"] == "LoRETTA"}
    return {
        "All six orders were run, with five seeds.": {
            (len(row["scores"]), len(row["seeds"])) for row in rows_of("forgetting.json")
        }
        == {(6, 5)},
        "a second rate of what has answers, but for six methods;": (
            seeds.keys() == {(task, method) for task in ("squad", "drop", "wsc", "copa") for method in six}
        ),
        "(compact with scales of keys and values has four on DROP at 7.5e-4 and three on WSC at 1.5e-3):": (
            {of: count for of, count in seeds.items() if count != 5} == {("drop", SCALED): 4}
            and {of: count for of, count in higher.items() if count < 5 and of in seeds} == {("wsc", SCALED): 3}
        ),
        "one train for all layers is ahead of LoRA r=1 with a sixth of its numbers.": (
            verdict_of("official", "SmolLM2", "shared r=2", "LoRA r=1", "wiki") == "better"
        ),
        "Every method there is best at the highest of its three rates,": {edge(row) for row in wiki} == {"≥"},
        "LoRA r=8 and LoRA r=1 on every linear layer, the best on the stories, were not run there": (
            not {"LoRA r=8", "LoRA r=1 all linear", "LoRA r=1 last 5"} & {row["method"] for row in wiki}
        ),
        "At a second rate COPA says the same, and on WSC IA3 alone is below LoRA r=8 by its interval": (
            [
                (line.cells["task"], line.cells["method"])
                for line in lines(PAGE, "two rates")
                if line.cells["task"] in ("wsc", "copa") and is_sure(line.cells["then to LoRA r=8"])
            ]
            == [("wsc", "IA3")]
        ),
        "and no form of LoRETTA comes near it.": all(
            number(line.cells["to LoRA r=8"]) > -0.03
            for line in lines(PAGE, "tables")
            if {"SmolLM2", "stories"} <= line.words and line.cells["method"] in forms
        ),
    }


def so_in_choosing() -> dict[str, bool]:
    def came(model: str, one: str, other: str) -> str:
        return verdict_of("held_out", model, one, other)

    def everywhere(word: str, one: str, other: str, on: Sequence[str] = ENCODERS) -> bool:
        return {came(model, one, other) for model in on} == {word}

    (uni,) = (
        row["held_out"]
        for row in rows_of("peers_smollm2.json")
        if (row["part"], row["task"], row["method"]) == ("front", "stories", "Uni-LoRA d=10000")
    )
    best = {
        shown.partition(" ")[0]: cell(CHOOSING, f"sizes {name}", "best LoRETTA form", "80,000").rpartition(" (")[0]
        for name, shown in MODELS.items()
    }
    peers = [shown.split(" ± ") for shown in cells(CHOOSING, "peers", "to LoRA r=1")]
    level = everywhere("level", COMPACT, "LoRA r=8", on=ALL)
    sizes = {(m, f"{size:,}"): pair(PAGE, "tables", "difference", m, f"{size:,}") for m in ALL for size in SIZES}
    ahead = {at: gap for at, (gap, half) in sizes.items() if abs(gap) > half}
    texts = cells(CHOOSING, "texts", "") == ["level", *4 * ["better"]]
    first = [
        row
        for row in rows_of("forms_mpnet.json")
        if row["method"] in ("norms", "BitFit", "LoRA r=8") and row["part"] == "front" and row["task"] in FIVE
    ]
    lowest = {"norms": 1.5e-3, "BitFit": 1.5e-3, "LoRA r=8": 7.5e-4}  # of the first three rates
    gained = {(row["method"], row["task"]) for row in first if float(best_rate(row)) < lowest[row["method"]]}
    return {
        "it loses to LoRA of rank 1 on all three models, and on both encoders to the norms alone.": (
            everywhere("worse", "rep", "LoRA r=1", on=ALL) and everywhere("worse", "rep", "norms")
        ),
        "is level with LoRA of rank 8 on three models": level,
        "and MiniLM's SST-2, after three tasks in turn": (
            verdict_of("official", "MiniLM", COMPACT, "LoRA r=8", "sst2") == "worse"
        ),
        "It is level with LoRA of rank 8 on query and value on all three models.": level,
        "All three wins are on MPNet. At 10,000 it is one train of rank 1, at 20,000 compact on the values": (
            at_sizes("better") == {("MPNet", size) for size in ("10,000", "20,000", "80,000")}
        ),
        "at 80,000 one train of rank 4 with scales.": best["MPNet"] == "shared r=4 + scales",
        "less numbers it is level with compact with norms on both encoders": everywhere("level", SCALED, COMPACT),
        "(56,064) is above IA3 (55,296) there,": verdict_of("official", "MPNet", SCALED, "IA3") == "better",
        "the official rows it is above the best in one of the 15, MPNet's 40,000, and level in all others": ahead.keys()
        == {("MPNet", "40,000")},
        "On MPNet's STS-B seeds of rank 4 fail at every rate of three.": all(
            min(scores) < 0.1
            for row in rows_of("forms_mpnet.json")
            if row["task"] == "stsb" and row["method"].startswith("shared r=4 cores x8")
            for scores in row["held_out"].values()
        ),
        "But at 1.5e-3 nine of ten seeds fail on STS-B all the same:": (
            sorted(
                score > 0.5
                for row in rows_of("forms_mpnet.json")
                if row["task"] == "stsb" and row["method"].startswith("shared r=4 cores x0.25")
                for score in row["held_out"]["0.0015"]
            )
            == [*9 * [False], True]
        ),
        "is level with compact with norms on QNLI, MNLI and QQP of both encoders, as was predicted.": {
            verdict_of("held_out", model, SCALED, COMPACT, task) for model in ENCODERS for task in SEEN
        }
        == {"level"},
        "By the loss on texts it wins four of five sizes of the decoder, and is level at 5,000.": texts,
        "From 10,000 to 40,000 its loss on texts is the lowest of all that were run, at 5,000 it is level": texts,
        "is the best of all that were run from 10,000 parameters on, and level with Uni-LoRA at 5,000": texts,
        "6e-3 is best on QQP alone": (
            [
                row["task"]
                for row in rows_of("forms_mpnet.json")
                if row["method"] in ("compact", "compact v, MLP", "compact v, MLP + k,v scales")
                and row["part"] == "front"
                and float(best_rate(row)) >= 6e-3
            ]
            == ["qqp"]
        ),
        "LoRA is ahead on MPNet's RTE": verdict_of("official", "MPNet", COMPACT, "LoRA r=8", "rte") == "worse",
        "IA3 of PEFT is level with compact with norms on both encoders": everywhere("level", "IA3", COMPACT),
        "(37,632) is level with LoRA r=1.": came("MPNet", "compact", "LoRA r=1") == "level",
        "as with norms, and is level with it on both encoders.": everywhere("level", "compact", COMPACT),
        "So BitFit gained on CoLA, MRPC and RTE, the norms on RTE, LoRA r=8 on CoLA.": gained
        == {
            *(("BitFit", task) for task in ("cola", "mrpc", "rte")),
            ("norms", "rte"),
            ("LoRA r=8", "cola"),
        },
        "None of their rates is at an edge there now.": not any(edge(row) for row in first),
        "Uni-LoRA of 20,000 numbers is best at its lowest rate on MPNet, where seeds still fail, and on MiniLM.": (
            {
                edge(row)
                for file in ("peers_mpnet.json", "peers_minilm.json")
                for row in rows_of(file)
                if row["method"] == "Uni-LoRA d=20000" and row["part"] == "front"
            }
            == {"≤"}
        ),
        "A fourth rate gave Uni-LoRA of 10,000 nothing.": uni.get("0.113") is not None
        and mean(uni["0.113"]) > min(map(mean, uni.values())),
        "No seed of it fails on CoLA, MRPC or STS-B at any of its rates.": (
            {fallen(rate, SCALED) for rate in ("0.003", "0.0015", "0.00075")} == {(0, 3)}
        ),
        "and has seeds that fail from 1.5e-3 on.": (
            [fallen(rate, "shared r=4 + scales")[0] for rate in ("0.00075", "0.0015")] == [0, 1]
        ),
        "is not above the best forms.": (
            "better" not in [came(model, "LoRA r=8", form) for model, form in best.items()]
        ),
        "None of them is above LoRA r=1 in these held-out means.": (
            not any(float(gap) > float(half) for gap, half in peers)
        ),
    }


def so_in_readme() -> dict[str, bool]:
    level = {verdict_of("official", model, COMPACT, "LoRA r=8") for model in ALL}
    texts, half = pair(PAGE, "tables", "to LoRA r=8", "SmolLM2", "stories", "shared r=8")
    lost = {verdict_of("official", model, "rep", other) for model in ENCODERS for other in ("LoRA r=1", "norms")}
    return {
        "Compact, the default, is level with LoRA of rank 8": level == {"level"},
        "(37,696 numbers) is level with LoRA of rank 8 (460,800)": abs(texts) <= half,
        "rep in the paper's shapes loses to a LoRA of rank 1, and to training the layer norms alone": lost == {"worse"},
    }
