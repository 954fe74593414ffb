"""Methods under one name, each group in the order of its value; which tasks and in which order is for the command."""

from methods import (
    BONDS,
    ENDS,
    FULL,
    HEADS,
    LARGER,
    PAPER_BONDS,
    RANKS,
    SCALED,
    SHAPES,
    SMALLER,
    STEADY,
    STEADY_DECODER,
)

GROUPS: dict[str, list[str]] = {
    "core": [
        "LoRA r=1", "compact + norms", "shared r=2", "shared r=4 + norms", "norms", "LoRA r=8", "rep", "compact",
        "rep + norms",
        "shared r=2 + norms", "LoRA r=1 + norms", "adp + norms", "LoRA r=2", "LoRA r=1 all linear", "head only",
    ],
    "more": [
        "shared r=8 + norms", "LoRA r=4", "BitFit", "shared r=4", "IA3", "adp", "compact r=2 + norms",
        "LoRA r=2 + norms", "shared r=8", "LoRA r=1 all linear + norms", "compact r=2", "LoRA r=2 all linear",
        "adapters b=4", "compact inner 2", "shared r=16", "shared r=16 q,v", "adapters b=64",
    ],
    "decoder": [
        "untrained", "LoRA r=1", "compact + norms", "compact", "shared r=4 + norms", "norms", "LoRA r=8", "rep",
        "shared r=4", "LoRA r=2", "rep + norms", "shared r=8 + norms", "LoRA r=1 + norms", "IA3",
        "LoRA r=1 all linear", "adp + norms",
    ],
    # what the first picture and the claims need
    "lead": [
        "LoRA r=1", "compact + norms", "norms", "LoRA r=8", "shared r=4 + norms", "adp + norms", "rep + norms", "rep",
    ],
    "decoder_lead": [
        "untrained", "LoRA r=1", "compact + norms", "LoRA r=8", "norms", "shared r=4 + norms", "compact", "adp + norms",
        "rep + norms", "rep",
    ],
    # a second decoder
    "second_decoder": [
        "LoRA r=8", "compact + norms", "compact", "LoRA r=1", "shared r=4", "norms", "rep + norms", "adp + norms",
        "rep", "shared r=1", "IA3", "untrained", "LoRA r=1 all linear",
    ],
    # the smallest forms, and what a user with as few numbers would do without them: fewer places, fewer norms
    "small_encoder": [
        "shared r=1", "LoRA r=1 v", "shared r=6 attention", "LoRA r=1 last 3", "norms last 3",
    ],
    "small_decoder": [
        "shared r=1", "LoRA r=1 last 2", "norms last 4", "shared r=2", "LoRA r=1 last 5", "norms last 8", "shared r=4",
        "LoRA r=1 last 10", "norms last 16", "shared r=1 + norms", "shared r=8", "LoRA r=1 q", "LoRA r=1 last 20",
        "LoRA r=1 v last 6",
    ],
    "rates": [
        "LoRA r=1", "compact", "shared r=1", "LoRA r=8", "compact r=4", "shared r=4", "compact r=32", "shared r=32",
        "LoRA r=32", "compact r=16", "shared r=16",
    ],
    "scales": [method.name for method in SCALED],
    # LoRA and shared with `use_rslora`, at one learning rate for every rank
    "steady": [method.name for method in SCALED if method.name.startswith(("LoRA^0.5", "shared^0.5"))],
    "steeper": [method.name for method in SCALED if "^0.75" in method.name],
    "bonds": [method.name for method in BONDS],
    "wide_bonds": [method.name for method in BONDS if method.name.endswith("r=32")],
    # compact as it is with `even_rates`, whose rank 1 no power changes
    "even_rates": ["compact cores^1 r=32", "compact", "compact cores^1 r=4"],
    # the ends of the ranks, for a model whose cells take longer
    "few_rates": ["LoRA r=1", "compact", "shared r=1", "LoRA r=32", "compact r=32", "shared r=32"],
    "larger_rates": [method.name for method in LARGER],
    "smaller_rates": [method.name for method in SMALLER],
    "ruled_ends": [*ENDS, "adp cores^1 r=5", "adp cores^1 r=32"],
    "paper_rates": [method.name for method in RANKS],
    "paper_steady": [method.name for method in STEADY],
    "paper_steady_decoder": [method.name for method in STEADY_DECODER],
    "paper_bonds": [method.name for method in PAPER_BONDS],
    # every form with its rule
    "ruled": [
        "LoRA r=1", "LoRA^0.75 r=8", "LoRA^0.75 r=32", "shared r=1", "shared^0.75 r=8", "shared^0.75 r=32", "compact",
        "compact cores^1 r=4", "compact cores^1 r=32", *(method.name for method in STEADY),
    ],
    "shapes": [method.name for method in SHAPES],
    "heads": [method.name for method in HEADS if method.method == "rep"],
    "adp_heads": [method.name for method in HEADS if method.method == "adp"],
    # what may win a size with IA3's factors in the place of norms, or beside them
    "scales_encoder": [
        "shared r=2 + scales", "shared r=4 + norms + scales", "rep of one mode + scales", "shared r=1 + k,v scales",
        "shared r=4 + scales", "shared r=1 + scales", "shared r=2 + scales x2",
    ],
    # the rows of the paper's Table 1, and the forms that became the default
    "table_1": [
        "head only", "norms", FULL, "adapters b=64", "LoRA r=1", "LoRA r=4", "LoRA r=8", "BitFit", "IA3", "prefix 20",
        "prompt 20", "p-tuning 20", "rep", "rep + norms", "adp + norms", "compact", "compact + norms", "shared r=1",
        "shared r=4 + norms",
    ],
    "claimed_long": ["LoRA r=8", "adp + norms", "rep + norms", "compact + norms"],
    "long": [
        "LoRA r=8", "compact + norms", "adapters b=64", "rep + norms", "adp + norms", "shared r=4 + norms", "LoRA r=1",
        "norms", FULL,
    ],
}  # fmt: skip
