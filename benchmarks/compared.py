"""Sentences of RESULTS.md and docs/choosing.md that compare two methods: paired differences with their intervals.

As in sentences.py each {} is a figure. Differences of means are made anew from the rows of both methods.
"""

from collections.abc import Iterator

from cited import CHOOSING, PAGE, gap, less, official, pair
from named import WITHOUT_RTE
from protocol import SEEN
from sentences import Said

COMPACT, ADP, REP, UNI = "compact + norms", "adp + norms", "rep + norms", "Uni-LoRA d=5000"


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
    yield "its loss rises by {} ± {}.", pair(PAGE, "overfitting", "risen by", "LoRA r=8", "MPNet")
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
    yield "The loss is at 80,000 on MPNet, to IA3 ({} ± {}).", to("MPNet", f"{v_mlp} + k,v scales", "IA3")
    yield "it loses at 5,000 on MiniLM, to Uni-LoRA ({} ± {}),", gap("official", "MiniLM", "shared r=1", UNI)
    yield "it is level on the official rows ({} ± {}, {} ± {}).", (
        *gap("official", "MPNet", "shared r=1", UNI), *gap("official", "SmolLM2", "shared r=1", "norms last 4"),
    )  # fmt: skip
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
