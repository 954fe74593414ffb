"""What was predicted of differences before they were measured, and whether they came so."""

import math
from collections.abc import Collection, Sequence

from board import Board, Row, markdown, signed, verdict, with_cores
from protocol import interval
from verdicts import MARGIN, MODELS

# one, the other, and what was predicted of their difference before it was measured, by model
PREDICTED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("compact + norms", "LoRA r=8", {"all-MiniLM-L6-v2": "level", "all-mpnet-base-v2": "within .01"}),
    ("shared r=4 + norms", "LoRA r=8", {"all-mpnet-base-v2": "level"}),
    ("adp + norms", "LoRA r=8", {"all-mpnet-base-v2": "level"}),
    ("rep + norms", "compact + norms", {"all-mpnet-base-v2": "worse"}),
    ("rep + norms", "shared r=4 + norms", {"all-mpnet-base-v2": "worse"}),
    ("rep + norms", "norms", {"all-mpnet-base-v2": "not above .01"}),
    ("compact + norms", "LoRA r=1 + norms", {"all-mpnet-base-v2": "better"}),
    ("compact", "LoRA r=1", {"SmolLM2-135M-Instruct": "within .02"}),
    ("compact + norms", "LoRA r=8", {"SmolLM2-135M-Instruct": "within .02"}),
    # the fifth round
    ("shared r=1", "LoRA r=1 v", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=6 attention", "shared r=1", {"all-MiniLM-L6-v2": "worse"}),
    ("shared r=4", "LoRA r=1", {"all-MiniLM-L6-v2": "better"}),
    ("shared r=4", "LoRA r=2", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=4 + norms", "LoRA r=4", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=4 + norms", "LoRA r=1 all linear", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=3 attention", "LoRA r=1 v last 3", {"all-mpnet-base-v2": "better"}),
    ("shared r=1", "LoRA r=1 last 3", {"all-mpnet-base-v2": "better"}),
    ("shared r=1", "norms last 3", {"all-mpnet-base-v2": "better"}),
    ("shared r=2", "LoRA r=1 v", {"all-mpnet-base-v2": "better"}),
    ("shared r=2", "LoRA r=1", {"all-mpnet-base-v2": "level"}),
    ("shared r=1", "LoRA r=1 last 2", {"SmolLM2-135M-Instruct": "within .02"}),
    ("shared r=2", "LoRA r=1 last 5", {"SmolLM2-135M-Instruct": "within .02"}),
    ("shared r=4", "LoRA r=1 last 10", {"SmolLM2-135M-Instruct": "within .02"}),
    ("shared r=1 + norms", "norms", {"SmolLM2-135M-Instruct": "level"}),
    # the sixth round
    ("compact v, MLP", "LoRA r=1 v", {"all-mpnet-base-v2": "level", "all-MiniLM-L6-v2": "better"}),
    ("compact v, MLP", "shared r=2", {"all-mpnet-base-v2": "better"}),
    ("compact v, MLP", "LoRA r=1", {"all-MiniLM-L6-v2": "level"}),
    ("compact inner 8 + norms", "LoRA r=1 all linear", {"all-MiniLM-L6-v2": "level"}),
    ("compact inner 8 + norms", "shared r=4 + norms", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=1", "Uni-LoRA d=5000", {"all-mpnet-base-v2": "better", "SmolLM2-135M-Instruct": "level"}),
    ("shared r=2", "Uni-LoRA d=20000", {"all-mpnet-base-v2": "level"}),
    ("shared r=1", "norms last 4", {"SmolLM2-135M-Instruct": "better"}),
    ("shared r=1", "norms last 8", {"SmolLM2-135M-Instruct": "better"}),
    ("LoRA r=8", "full fine-tuning", {"all-mpnet-base-v2": "worse", "all-MiniLM-L6-v2": "worse"}),
    ("compact + norms", "full fine-tuning", {"all-mpnet-base-v2": "worse", "all-MiniLM-L6-v2": "worse"}),
    ("compact + norms", "adapters b=64", {"all-mpnet-base-v2": "level", "all-MiniLM-L6-v2": "level"}),
    ("compact + norms", "BitFit", {"all-mpnet-base-v2": "better", "all-MiniLM-L6-v2": "better"}),
    ("compact + norms", "IA3", {"all-mpnet-base-v2": "better", "all-MiniLM-L6-v2": "better"}),
    ("compact + norms", "prompt 20", {"all-mpnet-base-v2": "better", "all-MiniLM-L6-v2": "better"}),
    ("compact + norms", "prefix 20", {"all-MiniLM-L6-v2": "better"}),
    ("compact + norms", "p-tuning 20", {"all-mpnet-base-v2": "better", "all-MiniLM-L6-v2": "better"}),
    # the seventh round
    ("shared r=2 + scales", "IA3", {"all-MiniLM-L6-v2": "better"}),
    ("shared r=4 + scales", "shared r=4 + norms", {"all-MiniLM-L6-v2": "better"}),
    ("shared r=4 + norms + scales", "LoRA r=1 all linear", {"all-MiniLM-L6-v2": "level"}),
    ("rep of one mode + scales", "LoRA r=1 all linear", {"all-MiniLM-L6-v2": "better"}),
    ("shared r=1 + k,v scales", "LoRA r=1", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=2 + scales x2", "shared r=2 + scales", {"all-MiniLM-L6-v2": "level"}),
    ("compact v, MLP + k,v scales", "LoRA r=1", {"all-mpnet-base-v2": "better"}),
    ("compact v, MLP + scales", "LoRA r=2", {"all-mpnet-base-v2": "level"}),
    ("compact v, MLP + scales", "IA3", {"all-mpnet-base-v2": "better"}),
    ("shared r=4 + scales", "LoRA r=2", {"all-mpnet-base-v2": "level"}),
    ("shared r=1 + v scales", "LoRA r=1 v", {"all-mpnet-base-v2": "level"}),
    ("compact + k,v scales", "compact + norms", {"all-mpnet-base-v2": "level"}),
    ("shared r=1 + v scales", "LoRA r=1 last 5", {"SmolLM2-135M-Instruct": "within .02"}),
    ("shared r=2 + k,v scales", "LoRA r=1 last 5", {"SmolLM2-135M-Instruct": "within .02"}),
    ("shared r=4 + scales", "LoRA r=1", {"SmolLM2-135M-Instruct": "within .02"}),
    ("LoRA r=4", "LoRA r=8", {"all-mpnet-base-v2": "level"}),
    ("adapters b=64", "LoRA r=8", {"all-mpnet-base-v2": "level", "SmolLM2-135M-Instruct": "level"}),
    ("IA3", "LoRA r=1", {"SmolLM2-135M-Instruct": "level"}),
    ("prefix 20", "LoRA r=8", {"SmolLM2-135M-Instruct": "worse"}),
    ("VB-LoRA h=90, b=192", "shared r=1", {"SmolLM2-135M-Instruct": "not above .01"}),
    ("VeRA r=256", "shared r=1", {"SmolLM2-135M-Instruct": "not above .01"}),
    ("FourierFT n=1000", "shared r=1", {"SmolLM2-135M-Instruct": "not above .01"}),
    # the seventh, too: the decoder's last layers at high rates
    ("shared r=2 last 5", "LoRA r=1 last 5", {"SmolLM2-135M-Instruct": "level"}),
    ("shared r=6 q,v last 5", "LoRA r=1 last 5", {"SmolLM2-135M-Instruct": "level"}),
    ("compact last 5", "LoRA r=1 last 5", {"SmolLM2-135M-Instruct": "better"}),
    ("shared r=4 last 5", "shared r=4", {"SmolLM2-135M-Instruct": "not above .01"}),
    # the eighth round of choosing.md
    ("LoRA r=1 all linear", "full fine-tuning", {"all-mpnet-base-v2": "worse"}),
    ("compact + k,v scales", "IA3", {"all-mpnet-base-v2": "level"}),
    ("compact + k,v scales", "LoRA r=8", {"all-mpnet-base-v2": "better"}),
    ("compact + k,v scales", "compact + norms", {"all-MiniLM-L6-v2": "better", "SmolLM2-135M-Instruct": "level"}),
    ("compact + k,v scales", "shared r=4 + scales", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=4 + v scales", "LoRA r=1", {"all-mpnet-base-v2": "better"}),
    ("compact + scales", "LoRA r=1 all linear", {"all-MiniLM-L6-v2": "level"}),
    ("compact + scales", "IA3", {"all-MiniLM-L6-v2": "better"}),
    ("rep of one mode + k,v scales", "rep of one mode + scales", {"all-MiniLM-L6-v2": "level"}),
    ("compact v, MLP + v scales", "LoRA r=1", {"all-MiniLM-L6-v2": "level"}),
    # the ninth round
    ("shared r=1 cores x8", "shared r=1", {"all-MiniLM-L6-v2": "better", "all-mpnet-base-v2": "better"}),
    ("shared r=3 attention cores x8", "Uni-LoRA d=5000", {"all-mpnet-base-v2": "level"}),
    ("shared r=4 cores x8 + v scales", "shared r=4 + v scales", {"all-mpnet-base-v2": "better"}),
    ("shared r=2 cores x8 + v scales", "LoRA r=1", {"all-MiniLM-L6-v2": "better"}),
    ("shared r=2 cores x8", "shared r=2", {"SmolLM2-135M-Instruct": "not above .01"}),
    ("shared r=8 cores x8", "shared r=8", {"SmolLM2-135M-Instruct": "not above .01"}),
    ("shared r=2 cores x0.25", "shared r=2", {"all-MiniLM-L6-v2": "level"}),
    (
        "shared r=4 cores x0.25 + scales", "shared r=4 + scales",
        {"all-MiniLM-L6-v2": "level", "all-mpnet-base-v2": "level"},
    ),
    ("shared r=4 cores x0.25 + v scales", "shared r=4 + v scales", {"all-mpnet-base-v2": "level"}),
    ("compact v", "Uni-LoRA d=5000", {"all-mpnet-base-v2": "level"}),
    ("shared r=1 attention, MLP out", "Uni-LoRA d=5000", {"all-mpnet-base-v2": "level"}),
    ("shared r=2 attention + MLP scales", "LoRA r=1", {"all-MiniLM-L6-v2": "better"}),
    ("shared r=2 attention, MLP out", "Uni-LoRA d=5000", {"all-MiniLM-L6-v2": "level"}),
    ("compact v + v scales", "Uni-LoRA d=5000", {"all-MiniLM-L6-v2": "level"}),
    ("shared r=2 + k,v scales", "LoRA r=1", {"all-mpnet-base-v2": "better"}),
)  # fmt: skip


def judged(gaps: Collection[float], expected: str) -> str:
    """Whether a difference came as predicted: "held", "refuted", or "open" where the interval allows both."""
    middle, half = interval(gaps)
    word, _, margin = expected.rpartition(" ")
    if not word:
        found = verdict(gaps)
        if found == "level" and not half <= MARGIN:  # one seed has no interval
            return "open"
        contrary = {"level": ("better", "worse"), "worse": ("better",), "better": ("worse",)}[expected]
        return "held" if found == expected else "refuted" if found in contrary else "open"
    bound = float(margin)
    low = -bound if word == "within" else -math.inf
    if low <= middle - half and middle + half <= bound:
        return "held"
    return "refuted" if middle + half < low or middle - half > bound else "open"


def predicted(found: Sequence[Row]) -> str:
    """The paired differences on held-out rows by which the predictions are judged."""
    lines, found = [], with_cores(found)
    for one, other, of_models in PREDICTED:
        for model, expected in of_models.items():
            gaps = Board(found, model, "held_out").gap(one, other)
            came = ["not run", ""] if gaps is None else [signed(gaps), judged(gaps, expected)]
            lines.append([f"{one} to {other}", MODELS[model].partition(" ")[0], expected, *came])
    return markdown(lines, ["held-out means", "model", "predicted", "came", ""], left=3)
