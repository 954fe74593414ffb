"""Differences that the text of a page names and no other table of it has, so that each figure has its rows."""

from collections.abc import Sequence

from board import Board, Row, markdown, signed, with_cores
from protocol import SEEN
from verdicts import MODELS

MINILM, MPNET, SMOLLM2 = MODELS
# a model, one method, the other, and the tasks of a mean (None: those that it has everywhere)
Pair = tuple[str, str, str, tuple[str, ...] | None]
WITHOUT_RTE = ("cola", "mrpc", "stsb", "sst2")
OF_SEEN = (
    ("compact", "LoRA r=8"),
    ("rep", "LoRA r=1"),
    ("Uni-LoRA d=5000", "shared r=1"),
    ("full fine-tuning", "shared r=4 + norms"),
    ("IA3", "compact"),
)
OFFICIAL: tuple[Pair, ...] = (
    (MINILM, "IA3", "compact", None),
    (MPNET, "rep", "LoRA r=1 v", None),
    (MPNET, "adp + norms", "LoRA r=8", WITHOUT_RTE),
    (MPNET, "rep + norms", "LoRA r=8", WITHOUT_RTE),
    (MPNET, "shared r=3 attention", "LoRA r=1 v last 3", None),
    (MPNET, "shared r=1", "LoRA r=1 last 3", None),
    (MPNET, "full fine-tuning", "compact + norms", None),
    (MPNET, "full fine-tuning", "LoRA r=8", None),
    (MINILM, "full fine-tuning", "compact + norms", None),
    (MINILM, "full fine-tuning", "LoRA r=8", None),
    (MINILM, "rep + norms", "LoRA r=2", None),
    (MPNET, "rep + norms", "LoRA r=2", None),
    (MINILM, "LoRA r=1 all linear", "compact + norms", None),
    (MPNET, "LoRA r=1 all linear", "compact + norms", None),
    (MPNET, "LoRA r=1 all linear", "LoRA r=8", None),
    (SMOLLM2, "LoRA r=1 all linear", "compact + norms", None),
    (SMOLLM2, "full fine-tuning", "compact + norms", None),
    (MINILM, "adapters b=64", "adp + norms", None),
    (MPNET, "adapters b=64", "adp + norms", None),
    (MINILM, "adapters b=64", "compact + norms", None),
    (MPNET, "compact + k,v scales", "IA3", None),
    (MINILM, "rep of one mode + k,v scales", "IA3", None),
    (MINILM, "rep of one mode + k,v scales", "LoRA r=1 all linear", None),
    *((model, one, other, SEEN) for one, other in OF_SEEN for model in (MINILM, MPNET)),
)
HELD_OUT: tuple[Pair, ...] = (
    (MPNET, "LoRA r=1 all linear", "full fine-tuning", None),
    (MPNET, "compact + k,v scales", "IA3", None),
    (MPNET, "compact + k,v scales", "compact + norms", None),
    (MINILM, "compact + k,v scales", "compact + norms", None),
    (SMOLLM2, "compact + k,v scales", "compact + norms", None),
    (MINILM, "rep of one mode + k,v scales", "IA3", None),
    (MPNET, "compact v, MLP + k,v scales", "compact v, MLP", None),
    (MPNET, "rep", "LoRA r=1 v", None),
    (MPNET, "full fine-tuning", "LoRA r=8", ("cola",)),
    (MPNET, "full fine-tuning", "LoRA r=8", ("mrpc",)),
    (MPNET, "full fine-tuning", "LoRA r=8", ("stsb",)),
    (MPNET, "full fine-tuning", "LoRA r=8", ("rte",)),
    (MPNET, "adapters b=64", "LoRA r=8", None),
    (MPNET, "LoRA r=4", "LoRA r=8", None),
    (MPNET, "VeRA r=256", "LoRA r=1 v", None),
    (MPNET, "VeRA r=256", "LoRA r=1", ("cola", "mrpc", "stsb")),
    (MPNET, "FourierFT n=1000", "LoRA r=1", ("cola", "mrpc", "stsb")),
    (MPNET, "TinyLoRA r=16, u=256", "LoRA r=1", ("cola", "mrpc", "stsb")),
    (MPNET, "TinyLoRA r=16, u=256", "shared r=2", None),
    (MPNET, "VB-LoRA h=90, b=256", "compact + norms", None),
    (MPNET, "Uni-LoRA d=5000", "LoRA r=1 v last 3", None),
    (MPNET, "compact + norms", "LoRA r=8", ("qnli",)),
    (SMOLLM2, "LoRA r=1 all linear", "compact + norms", None),
    (MPNET, "LoRA r=1 all linear", "compact + norms", None),
    (MPNET, "LoRA r=1 all linear", "LoRA r=8", None),
    (SMOLLM2, "full fine-tuning", "compact + norms", None),
    (MINILM, "compact + norms", "LoRA r=8", ("qnli", "mnli", "qqp")),
    (MINILM, "adp + norms", "LoRA r=8", ("mnli",)),
    (MINILM, "rep + norms", "LoRA r=8", ("mnli",)),
    (MINILM, "shared r=1 cores x8", "shared r=1", ("cola",)),
    (MINILM, "shared r=2 cores x8 + v scales", "shared r=2 + v scales", ("cola",)),
    (MPNET, "shared r=4 cores x8 + scales", "shared r=4 + scales", ("cola", "mrpc", "rte", "sst2")),
    (MPNET, "shared r=4 cores x8 + v scales", "shared r=4 + v scales", ("stsb",)),
    (MPNET, "shared r=4 cores x8 + scales", "shared r=4 + scales", ("stsb",)),
)


def named_table(found: Sequence[Row], which: str) -> str:
    lines, found = [], with_cores(found)
    for model, one, other, tasks in OFFICIAL if which == "official" else HELD_OUT:
        board = Board(found, model, which, tasks)
        gap = board.gap(one, other)
        said = "" if gap is None else signed(gap)
        lines.append([f"{one} to {other}", MODELS[model].partition(" ")[0], ", ".join(board.common), said])
    return markdown(lines, ["one to the other", "model", "mean of", "difference"], left=3)
