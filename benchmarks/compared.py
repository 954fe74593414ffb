"""Sentences of RESULTS.md and docs/choosing.md that compare two methods: paired differences with their intervals.

As in sentences.py each {} is a figure. Differences of means are made anew from the rows of both methods. What is said
without a figure stands at the end, with whether it is so.
"""

from collections.abc import Iterator, Sequence

from cited import CHOOSING, PAGE, cell, cells, fallen, gap, less, lines, number, official, ours, pair, verdict_of
from named import WITHOUT_RTE
from protocol import SEEN
from sentences import Said
from verdicts import MODELS, SIZES

ENCODERS, ALL = ("MiniLM", "MPNet"), ("MiniLM", "MPNet", "SmolLM2")
COMPACT, ADP, REP, SHARED = "compact + norms", "adp + norms", "rep + norms", "shared r=4 + norms"
UNI = "Uni-LoRA d=5000"


def in_results() -> Iterator[Said]:
    def to(model: str, one: str, other: str, *tasks: str) -> tuple[float, float]:
        return gap("official", model, one, other, *tasks)

    yield "It is below LoRA r=1 on both encoders ({} ± {}, {} ± {})", (
        *to("MiniLM", "rep", "LoRA r=1"), *to("MPNet", "rep", "LoRA r=1"),
    )  # fmt: skip
    yield "below LoRA of the values alone ({} ± {})", to("MPNet", "rep", "LoRA r=1 v")
    yield "in the mean ({} ± {}, {} ± {}): without it they are level ({} ± {}, {} ± {}).", (
        *to("MPNet", ADP, "LoRA r=8"), *to("MPNet", REP, "LoRA r=8"),
        *to("MPNet", ADP, "LoRA r=8", *WITHOUT_RTE), *to("MPNet", REP, "LoRA r=8", *WITHOUT_RTE),
    )  # fmt: skip
    yield "Adp is {} ± {} and rep {} ± {} below LoRA r=8 in the mean of QNLI, MNLI and QQP.", (
        *less(to("MiniLM", ADP, "LoRA r=8", *SEEN)), *less(to("MiniLM", REP, "LoRA r=8", *SEEN)),
    )  # fmt: skip
    yield "On MNLI shared r=4 with norms is {} ± {} below it. Compact is not sure to be level there ({} ± {}).", (
        *less(to("MiniLM", "shared r=4 + norms", "LoRA r=8", "mnli")),
        *to("MiniLM", COMPACT, "LoRA r=8", "mnli"),
    )  # fmt: skip
    full = "full fine-tuning"
    yield "On MPNet's STS-B it is {} ± {} above LoRA r=8 and level with compact with norms ({} ± {}).", (
        *to("MPNet", full, "LoRA r=8", "stsb"), *to("MPNet", full, COMPACT, "stsb"),
    )  # fmt: skip
    yield "On MPNet's CoLA it has {} ± {}, and compact with norms {}.", (
        *pair(PAGE, "tables", "Matthews", "MPNet", "cola", full),
        official("tables", "Matthews", "MPNet", "cola", COMPACT),
    )  # fmt: skip
    yield "IA3 is above compact with frozen norms on MiniLM ({} ± {})", to("MiniLM", "IA3", "compact")
    yield "Uni-LoRA is {} ± {} above the best form.", to("MiniLM", UNI, "shared r=1")
    squad = [pair(PAGE, "answers", "to LoRA r=8", form, "squad") for form in (ADP, COMPACT)]
    yield "SQuAD. Adp is {} ± {} below LoRA r=8.", less(squad[0])
    yield (
        "On SQuAD adp with norms is {} ± {} below LoRA r=8. Compact is level with it ({} ± {}).",
        (*less(squad[0]), *squad[1]),
    )
    yield "is above LoRA r=1 (36,864; {} ± {}) and the norms alone (38,400; {} ± {}).", (
        *to("MPNet", "compact", "LoRA r=1"), *to("MPNet", "compact", "norms"),
    )  # fmt: skip
    yield "(21,552) is {} ± {} above compact with norms and {} ± {} above LoRA r=1.", (
        *to("MiniLM", "shared r=2 + scales", COMPACT), *to("MiniLM", "shared r=2 + scales", "LoRA r=1"),
    )  # fmt: skip
    yield "One train for all layers is {} ± {} and {} ± {} above the best of LoRA and norms in fewer places.", (
        *to("MPNet", "shared r=3 attention", "LoRA r=1 v last 3"), *to("MPNet", "shared r=1", "LoRA r=1 last 3"),
    )  # fmt: skip
    yield "It is level with Uni-LoRA of 5,000 ({} ± {}, {} ± {}).", (
        *to("MPNet", "shared r=3 attention", UNI), *to("MPNet", "shared r=1", UNI),
    )  # fmt: skip
    yield "Adp is {} ± {} above LoRA r=8. Shared r=1 with norms is {} ± {} above it", (
        *to("SmolLM2", ADP, "LoRA r=8"), *to("SmolLM2", "shared r=1 + norms", "LoRA r=8"),
    )  # fmt: skip
    yield "rep keeps less: {} ± {} less in the mean of all orders. The norms alone keep {} ± {} less.", (
        *less(pair(PAGE, "forgetting", "to LoRA r=8", REP, "MiniLM")),
        *less(pair(PAGE, "forgetting", "to LoRA r=8", "norms", "MiniLM")),
    )  # fmt: skip
    yield "On MPNet it is open: rep's rises by {} ± {}, adp's by {} ± {}, LoRA r=8's by {} ± {}.", (
        *pair(PAGE, "overfitting", "risen by", REP, "MPNet"), *pair(PAGE, "overfitting", "risen by", ADP, "MPNet"),
        *pair(PAGE, "overfitting", "risen by", "LoRA r=8", "MPNet"),
    )  # fmt: skip
    yield "On MPNet rep is not sure to keep less ({} ± {})", pair(PAGE, "forgetting", "to LoRA r=8", REP, "MPNet")
    yield "on STS-B, {} ± {} with frozen norms and {} ± {} with trained ones.", (
        *pair(PAGE, "heads", "whole to frozen", "rep", "stsb"), *pair(PAGE, "heads", "whole to frozen", REP, "stsb"),
    )  # fmt: skip
    yield "To adp with norms it adds nothing there ({} ± {}).", pair(PAGE, "heads", "whole to frozen", ADP, "stsb")
    yield "Full fine-tuning is {} above LoRA r=8 in one seed.", (
        number(cell(PAGE, "answers", "to LoRA r=8", "full fine-tuning", "squad")),
    )  # fmt: skip
    scaled = "compact v, MLP + scales"
    yield "(76,800), it is {} ± {} above LoRA r=1 and {} ± {} above the norms alone. It is level with IA3 ({} ± {})", (
        *to("MPNet", scaled, "LoRA r=1"), *to("MPNet", scaled, "norms"), *to("MPNet", scaled, "IA3"),
    )  # fmt: skip
    yield "its loss is {} ± {} higher.", pair(PAGE, "instruct", "to LoRA r=16", COMPACT)
    yield "compact with norms is {} ± {} below LoRA r=2.", less(pair(PAGE, "instruct", "to LoRA r=2", COMPACT))
    yield "parameters and is {} ± {} below it.", less(pair(PAGE, "instruct", "to LoRA r=2", "shared r=4 + norms"))


def in_choosing() -> Iterator[Said]:
    def to(model: str, one: str, other: str, *tasks: str) -> tuple[float, float]:
        return gap("held_out", model, one, other, *tasks)

    scaled, v_mlp = "shared r=4 + scales", "compact v, MLP"
    yield "it is below LoRA r=8 on the official rows ({} ± {}).", gap("official", "MPNet", COMPACT, "LoRA r=8", "rte")
    yield "On SmolLM2 compact with norms is {} ± {} above it.", to("SmolLM2", COMPACT, "IA3")
    yield "by leaving places out, and is {} ± {} below on MPNet. Its price: on MPNet it is {} ± {} below LoRA r=1", (
        *less(to("MPNet", "LoRA r=1 last 3", "shared r=1")), *less(to("MPNet", "shared r=1", "LoRA r=1")),
    )  # fmt: skip
    yield "(4,752 on MPNet) and Uni-LoRA of 5,000 are level ({} ± {}).", to("MPNet", "shared r=3 attention", UNI)
    yield "(21,504), which is level with it ({} ± {}; official {} ± {}).", (
        *to("MPNet", v_mlp, "LoRA r=1 v"), *gap("official", "MPNet", v_mlp, "LoRA r=1 v"),
    )  # fmt: skip
    yield "Rank 2 of the shared train (15,432) is {} ± {} below compact there.", less(to("MPNet", "shared r=2", v_mlp))
    yield "It is level with IA3 ({} ± {}) and {} ± {} above compact with norms.", (
        *to("MiniLM", "shared r=2 + scales", "IA3"), *to("MiniLM", "shared r=2 + scales", COMPACT),
    )  # fmt: skip
    yield "(41,472), which are level ({} ± {}). The first is above LoRA r=8 ({} ± {}) and IA3 ({} ± {}),", (
        *to("MiniLM", scaled, "LoRA r=1 all linear"), *to("MiniLM", scaled, "LoRA r=8"), *to("MiniLM", scaled, "IA3"),
    )  # fmt: skip
    yield "On MPNet it is above LoRA r=1 of the values ({} ± {}) and the norms alone ({} ± {}).", (
        *to("MPNet", "compact", "LoRA r=1 v"), *to("MPNet", "compact", "norms"),
    )  # fmt: skip
    yield "with scales (76,800), which is level with IA3 ({} ± {}) and {} ± {} above LoRA r=1.", (
        *to("MPNet", f"{v_mlp} + scales", "IA3"), *to("MPNet", f"{v_mlp} + scales", "LoRA r=1"),
    )  # fmt: skip
    yield "Shared r=4 with scales (86,304) is {} ± {} above IA3", to("MPNet", scaled, "IA3")
    yield "until Uni-LoRA was run on CB, with three seeds. It is level ({} ± {}).", to("SmolLM2", "shared r=1", UNI)
    yield "it loses at 5,000 on MiniLM, to Uni-LoRA ({} ± {}),", gap("official", "MiniLM", "shared r=1", UNI)
    yield "On the official rows the first is level ({} ± {}).", gap("official", "MPNet", "shared r=1", UNI)
    yield "until Uni-LoRA was run, which is level ({} ± {}) and {} ± {} above LoRA in the last layers.", (
        *to("MPNet", "shared r=3 attention", UNI), *to("MPNet", UNI, "LoRA r=1 v last 3"),
    )  # fmt: skip
    yield "It is level ({} ± {}), by CB, whose", to("SmolLM2", "shared r=2", "LoRA r=1 last 5")
    yield "tried to win 40,000 and lost ({} ± {} to LoRA of rank 1 on every linear layer)", (
        to("MiniLM", "compact inner 8 + norms", "LoRA r=1 all linear")
    )  # fmt: skip
    yield "it is by {} ± {}. On MPNet it is {} ± {} below LoRA r=1, which has a third more, and {} ± {} below", (
        *less(pair(CHOOSING, "equal all-MiniLM-L6-v2", "difference", "rep")),
        *less(to("MPNet", "rep", "LoRA r=1")), *less(to("MPNet", "rep", "LoRA r=1 v")),
    )  # fmt: skip
    equal = [pair(CHOOSING, f"equal {name}", "difference", "compact")
             for name in ("all-MiniLM-L6-v2", "all-mpnet-base-v2", "SmolLM2-135M-Instruct")]  # fmt: skip
    yield "at equal count: {} ± {} on MiniLM, {} ± {} on MPNet, {} ± {} on SmolLM2.", sum(equal, ())
    yield "is level with shared r=1 on held-out rows ({} ± {}), and above it on the official ones ({} ± {}).", (
        *to("MiniLM", UNI, "shared r=1"), *gap("official", "MiniLM", UNI, "shared r=1"),
    )  # fmt: skip
    yield "On MPNet it is {} ± {} below shared r=1, which", less(to("MPNet", UNI, "shared r=1"))
    yield (
        "in place of rank 1 on every linear layer: {} ± {} on MiniLM",
        to("MiniLM", "shared r=6 attention", "shared r=1"),
    )
    yield "({} ± {} to compact on the values and MLPs for the first, {} ± {} for the second)", (
        *to("MPNet", "shared r=1 + v scales", v_mlp), *to("MPNet", f"{v_mlp} + k,v scales", v_mlp),
    )  # fmt: skip


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
    kept = {form: pair(PAGE, "forgetting", "to LoRA r=8", form, "MiniLM") for form in (COMPACT, SHARED, ADP, REP)}
    tuned = [pair(PAGE, "instruct", "to LoRA r=2", form) for form in (COMPACT, SHARED)]
    rises = cell(
        PAGE, "claims", "MPNet",
        "the held-out loss of adp and rep rises less than LoRA r=8's in 30 epochs (Figure 4)",
    )  # fmt: skip
    above = [shown for shown in cells(PAGE, "standing", "to LoRA r=8") if shown.startswith("above")]
    return {
        "The paper's rep with frozen norms loses to LoRA r=1 on both encoders.": everywhere("worse", "rep", "LoRA r=1"),
        "With trained norms the paper's rep and adp are below LoRA r=8 there.": (
            everywhere("worse", REP, "LoRA r=8") and everywhere("worse", ADP, "LoRA r=8")
        ),
        "is level with LoRA r=8 in the mean over tasks on all three models.": (
            everywhere("level", COMPACT, "LoRA r=8", on=ALL)
        ),
        "and not above it on the decoder.": came("SmolLM2", "rep", "LoRA r=1") != "better",
        "Its trains add nothing sure to what the norms do alone, on any model.": (
            "better" not in [came(model, REP, "norms") for model in ALL]
        ),
        "compact with norms among them.": came("MiniLM", COMPACT, "LoRA r=8", "sst2") == "worse",
        "Compact and shared are above the norms alone, adp and rep are level with them.": (
            seen == ["better", "better", "level", "level"]
        ),
        "On MiniLM it is above every form on SST-2 and above all but two on CoLA,": (
            set(full["sst2"]) == {"better"} and len(full["cola"]) - full["cola"].count("better") == 2
        ),
        "and above adp and rep with norms. It trains": (
            came("MiniLM", "IA3", ADP) == "better" == came("MiniLM", "IA3", REP)
        ),
        "Compact with norms is level with it on all three models.": everywhere("level", COMPACT, "IA3", on=ALL),
        "and with compact with norms.": came("MPNet", "compact v, MLP + scales", COMPACT) == "level",
        "On MPNet that is open.": rises.count(" open ") == 2,
        "Rep keeps less than LoRA r=8, and no form keeps more.": (
            sum(kept[REP]) < 0 and not any(middle > half for middle, half in kept.values())
        ),
        "above LoRA r=1. It is level with LoRA r=8.": came("MiniLM", "shared r=2 + scales", "LoRA r=8") == "level",
        "Compact and adp with norms are above LoRA r=8 on both encoders": (
            everywhere("better", COMPACT, "LoRA r=8", "stsb") and everywhere("better", ADP, "LoRA r=8", "stsb")
        ),
        "Compact and shared end with a lower loss than LoRA of as many parameters.": (
            all(middle + half < 0 for middle, half in tuned)
        ),
        # those two stand above it
        "No other form with fewer parameters is above LoRA r=8 in a mean.": len(above) == 2,
    }  # fmt: skip


def not_run_in_results() -> dict[str, bool]:
    def seeds(model: str, method: str) -> list[str]:
        """The tasks of Table 1's first five that a method was run on."""
        rows = [line.cells for line in lines(PAGE, "not run") if line.cells.get(f"seeds on {model}") == method]
        return [task for row in rows for task in ("cola", "mrpc", "stsb", "rte", "sst2") if row[task]]

    of_large = [seeds("MPNet", name) for name in ("full fine-tuning", "adapters b=64", "p-tuning 20")]
    return {
        "adp was not run there.": ADP not in cells(PAGE, "forgetting", "method", "MPNet"),
        "Table 4 on MPNet, but for LoRA r=8 and rep in three orders.": (
            cells(PAGE, "forgetting", "method", "MPNet") == [REP, "LoRA r=8"]
        ),
        "F1, with one or two seeds.": set(cells(PAGE, "answers", "seeds", "drop")) == {"1", "2"},
        "Table 1, MPNet: LoRA r=4.": not seeds("MPNet", "LoRA r=4"),
        "Full fine-tuning, dense adapters and p-tuning on MRPC, RTE and SST-2, prompts on MRPC and RTE.": (
            of_large == 3 * [["cola", "stsb"]]
            and seeds("MPNet", "prompt 20") == ["cola", "stsb", "sst2"]
        ),
        "PEFT's small methods on RTE and SST-2.": seeds("MiniLM", "VeRA r=256") == ["cola", "mrpc", "stsb"],
    }  # fmt: skip


def so_in_choosing() -> dict[str, bool]:
    def came(model: str, one: str, other: str) -> str:
        return verdict_of("held_out", model, one, other)

    def everywhere(word: str, one: str, other: str, on: Sequence[str] = ENCODERS) -> bool:
        return {came(model, one, other) for model in on} == {word}

    best = {
        shown.partition(" ")[0]: cell(CHOOSING, f"sizes {name}", "best LoRETTA form", "80,000").rpartition(" (")[0]
        for name, shown in MODELS.items()
    }
    peers = [shown.split(" ± ") for shown in cells(CHOOSING, "peers", "to LoRA r=1")]
    level = everywhere("level", COMPACT, "LoRA r=8", on=ALL)
    sizes = {(m, f"{size:,}"): pair(PAGE, "tables", "difference", m, f"{size:,}") for m in ALL for size in SIZES}
    ahead = {at: gap for at, (gap, half) in sizes.items() if abs(gap) > half}
    return {
        "on both encoders it loses to LoRA of rank 1 and to the norms alone.": (
            everywhere("worse", "rep", "LoRA r=1") and everywhere("worse", "rep", "norms")
        ),
        "is level with LoRA of rank 8 on three models": level,
        "It is level with LoRA of rank 8 on query and value on all three models.": level,
        "Both wins are on MPNet. At 10,000 it is one train of rank 1": (
            at_sizes("better") == {("MPNet", "10,000"), ("MPNet", "80,000")}
        ),
        "at 80,000 one of rank 4 with scales.": best["MPNet"] == "shared r=4 + scales",
        "and is level with the best everywhere else": ahead.keys() == {("MiniLM", "5,000")},
        "LoRA is ahead on MPNet's RTE": verdict_of("official", "MPNet", COMPACT, "LoRA r=8", "rte") == "worse",
        "IA3 of PEFT is level with compact with norms on both encoders": everywhere("level", "IA3", COMPACT),
        "(37,632) is level with LoRA r=1.": came("MPNet", "compact", "LoRA r=1") == "level",
        "as with norms, and is level with it on both encoders.": everywhere("level", "compact", COMPACT),
        "No rule was run on SmolLM2": not cells(CHOOSING, "rates", "peak", "SmolLM2", "compact cores^1 r=32"),
        "FourierFT and TinyLoRA were not run on SmolLM2 and MPNet": not any(
            cells(CHOOSING, f"front {model}", "trained", name)
            for model in ("SmolLM2-135M-Instruct", "all-mpnet-base-v2")
            for name in ("FourierFT n=1000", "TinyLoRA r=16, u=256")
        ),
        "No seed of it fails on CoLA, MRPC or STS-B at any of its rates.": (
            {fallen(rate, "compact v, MLP + scales") for rate in ("0.003", "0.0015", "0.00075")} == {(0, 3)}
        ),
        "and has seeds that fail from 1.5e-3 on.": (
            [fallen(rate, "shared r=4 + scales")[0] for rate in ("0.00075", "0.0015")] == [0, 1]
        ),
        "is not above the best forms.": (
            "better" not in [came(model, "LoRA r=8", form) for model, form in best.items()]
        ),
        "None of them is above LoRA r=1 in these means.": not any(float(gap) > float(half) for gap, half in peers),
    }


def so_in_readme() -> dict[str, bool]:
    level = {verdict_of("official", model, COMPACT, "LoRA r=8") for model in ALL}
    lost = {verdict_of("official", model, "rep", other) for model in ENCODERS for other in ("LoRA r=1", "norms")}
    return {
        "Compact, the default, is level with LoRA of rank 8": level == {"level"},
        "rep in the paper's shapes loses to a LoRA of rank 1, and to training the layer norms alone": lost == {"worse"},
    }
