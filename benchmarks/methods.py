"""The methods that the evidence compares, each with the middle of its grid of learning rates."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES

from loretta.studies.configs import shapes
from loretta.tuners.rescaled import TIMES

TARGETS: dict[str, dict[str, Any]] = {
    "qv": {"bert": ["query", "value"], "mpnet": ["attn.q", "attn.v"], "llama": ["q_proj", "v_proj"]},
    "q": {"bert": ["query"], "mpnet": ["attn.q"], "llama": ["q_proj"]},
    "v": {"bert": ["value"], "mpnet": ["attn.v"], "llama": ["v_proj"]},
    "v, MLP": {
        "bert": r".*(self\.value|intermediate\.dense|\d\.output\.dense)",
        "mpnet": r".*(attn\.v|intermediate\.dense|\d\.output\.dense)",
        "llama": ["v_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "attention, MLP out": {
        "bert": ["query", "key", "value", "output.dense"],
        "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "output.dense"],
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    },
    "attention": {
        "bert": ["query", "key", "value", "attention.output.dense"],
        "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o"],
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "all": {
        "bert": ["query", "key", "value", "dense"],
        "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "dense"],
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}
NORMS = {
    "bert": ["LayerNorm"],
    "mpnet": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "model.norm"],
}
# of one layer, in an expression: the norm that belongs to attention, and every norm
LAYER_NORMS = {"attention": r"(attention\..*LayerNorm|input_layernorm)", None: r".*(LayerNorm|layernorm)"}
# which names its layers as another family does
NAMED_AS = {"gemma3_text": "llama"}
# what IA3 rescales on a family that PEFT has no targets for
IA3 = {"mpnet": {"target_modules": ["attn.k", "attn.v", "output.dense"], "feedforward_modules": ["output.dense"]}}
# what full fine-tuning trains, in a copy for each member: the words' embeddings and every layer
WHOLE = {
    "bert": ["encoder", "word_embeddings"],
    "mpnet": ["encoder", "word_embeddings"],
    "llama": ["embed_tokens", "self_attn", "mlp", *NORMS["llama"]],
}
# hidden layers of heads, which few methods train
HIDDEN = (
    "pooler.dense",
    "classifier.dense",
    "classifier.modules_to_save.default.dense",
    "classifier.original_module.dense",
)
# of MPNet, which has "bias" in its name and is none; no method trains it
NO_BIAS = "relative_attention_bias"
UNTRAINED = "untrained"  # scored before its first step
FULL = "full fine-tuning"
OURS = ("rep", "adp", "shared", "adapters")
INNER = 4  # the rank within each side of compact


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a run is given.

    ``targets`` is a name of ``TARGETS``, of which the ``last`` layers alone are adapted, or all (None). ``middle`` is
    the middle of its grid of rates; where the best of six was searched for, of this method or of the one that it is
    ``like``, that is. ``factors`` are on the rates of what has a word in its name. ``bonds`` is a power: the rate of
    each core of rep is divided by that power of how many numbers are summed when it meets the ones before it, beside
    those of compact's rank of 1. ``small_cores`` is a factor on the rates of those cores of a shared train that are a
    rank wide on both sides, and start as the identity. At most ``together`` members are trained at once, so that they
    leave room on a GPU.
    """

    name: str
    family: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: str | None = None
    last: int | None = None
    norms: bool = False
    middle: float = 1.5e-3
    like: str = ""
    factors: dict[str, float] = field(default_factory=dict)
    bonds: float = 0.0
    small_cores: float = 1.0
    together: int = 1000
    head: str = ""

    def placed(self, kind: str, layers: int) -> dict[str, Any]:
        """The options, with the modules of a model of that type and that many layers."""
        chosen = range(layers - self.last, layers) if self.last else ()
        if self.method == "norms" and (chosen or self.targets):
            numbers = "|".join(map(str, chosen)) or r"\d+"
            return {**self.options, "target_modules": rf".*\.({numbers})\.{LAYER_NORMS[self.targets]}"}
        if self.name == FULL:
            return {**self.options, "modules_to_save": WHOLE[kind]}
        if self.targets is None:
            return dict(self.options)
        some = {"layers_to_transform": list(chosen)} if chosen else {}
        return {**self.options, "target_modules": places_of(self.targets, kind), **some}


def places_of(targets: str, kind: str) -> Any:
    """The names of modules that ``targets`` stands for on a model of that type."""
    return TARGETS[targets][NAMED_AS.get(kind, kind)]


PLACES = {"qv": "", "all": " all linear", "attention": " attention", "q": " q", "v": " v"}


def placed_name(name: str, targets: str, last: int | None = None) -> str:
    return name + PLACES[targets] + (f" last {last}" if last else "")


def lora(rank: int, targets: str = "qv", *, last: int | None = None, norms: bool = False, **more: Any) -> Method:
    name = placed_name(f"LoRA r={rank}", targets, last) + (" + norms" if norms else "")
    options = {"r": rank, "lora_alpha": 2 * rank}
    return Method(
        name=name, family="LoRA", method="lora", options=options, targets=targets, last=last, norms=norms, **more
    )


def small_lora(targets: str, last: int | None = None) -> Method:
    """LoRA of rank 1 in fewer places; the rank on query and value likes the highest rate of its own grid."""
    return lora(1, targets, last=last, middle=3e-3)


def some_norms(last: int, targets: str | None = None) -> Method:
    name = "norms" + (f" of {targets}" if targets else "") + f" last {last}"
    return Method(name=name, family="base", method="norms", targets=targets, last=last, norms=True, middle=3e-3)


def ours(name: str, method: str, options: dict[str, Any] | None = None, **more: Any) -> Method:
    name += " + norms" if more.get("norms") else ""
    return Method(name=name, family="LoRETTA", method=method, options=options or {}, **more)


def compact(rank: int = 1, *, inner: int = INNER, targets: str = "all", last: int | None = None, **more: Any) -> Method:
    name = "compact" + (f" r={rank}" if rank > 1 else "") + (f" inner {inner}" if inner != INNER else "")
    name += ("" if targets == "all" else f" {targets}") + (f" last {last}" if last else "")
    inner = max(inner, rank)
    options = {"r": rank, "tensor_rank": inner, "modes_per_side": 2, "lora_alpha": 2 * inner}
    return ours(name, "rep", options, targets=targets, last=last, **more)


def shared(rank: int, targets: str = "all", *, last: int | None = None, **more: Any) -> Method:
    name = f"shared r={rank}" + {"all": "", "qv": " q,v"}.get(targets, f" {targets}")
    name += f" last {last}" if last else ""
    options = {"tensor_rank": rank, "lora_alpha": 2 * rank}
    return ours(name, "shared", options, targets=targets, last=last, **more)


SCALES_RATE = 1.2e-2  # in the middle of the grid, whatever the matrices beside them like
SCALED_PLACES = {"v": ["values"], "k,v": ["keys", "values"], "MLP": ["mlp"], "": ["keys", "values", "mlp"]}


def with_scales(method: Method, places: str = "", *, middle: float = 1.5e-3, times: float = 1.0) -> Method:
    """A form with trained scales beside it, at ``times`` the rate that these like."""
    name = " ".join(
        [method.name, "+", *([places] if places else []), "scales", *([f"x{times:g}"] if times > 1 else [])]
    )
    factor = times * SCALES_RATE / middle / TIMES
    options = {**method.options, "train_scales": SCALED_PLACES[places]}
    return replace(
        method, name=name, options=options, middle=middle, factors={"_scale_": factor} if factor != 1 else {}
    )


def with_fast_cores(method: Method, factor: float) -> Method:
    """A shared train whose small cores, which are factors on its sides, learn so many times as fast as these."""
    form, *beside = method.name.split(" + ")
    return replace(method, name=" + ".join([f"{form} cores x{factor:g}", *beside]), small_cores=factor)


def scaled(method: Method, rank: int, power: float) -> Method:
    """A method whose scale, the same at every rank, falls as that power of its rank."""
    form, _, rest = method.name.partition(" ")
    return replace(method, name=f"{form}^{power:g} {rest}", options=with_scale(method, 1 / rank**power))


def times(method: Method, factor: float) -> Method:
    """A method with ``factor`` times its scale."""
    form, *rest = re.split(r"(?=[ ^])", method.name, maxsplit=1)
    return replace(method, name="".join([form, f" x{factor:g}", *rest]), options=with_scale(method, factor))


def with_scale(method: Method, factor: float) -> dict[str, Any]:
    """The options with ``factor`` times the scale. Adp's is the factor on its output, whatever its rank."""
    option, own = ("scaling", 1.0) if method.method == "adp" else ("lora_alpha", method.options["lora_alpha"])
    return {**method.options, option: round(factor * own, 4)}


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name=UNTRAINED, family="base", method="lora", options={"r": 1}, targets="qv"),
        Method(name="head only", family="base", method="head", middle=1e-2),
        Method(name="norms", family="base", method="norms", norms=True, middle=3e-3),
        Method(
            name=FULL, family="base", method="peft:lora", middle=5e-5, together=5,
            options={"target_modules": DUMMY_TARGET_MODULES},
        ),
        Method(name="BitFit", family="base", method="bitfit", middle=3e-3),
        Method(name="IA3", family="PEFT", method="ia3", middle=1e-2),
        *(lora(rank) for rank in (1, 2, 4, 8, 16, 32)),
        lora(1, "all"), lora(2, "all"), lora(1, norms=True), lora(2, norms=True), lora(1, "all", norms=True),
        Method(name="adapters b=64", family="PEFT", method="adapters", options={"dense": True}),
        Method(name="adapters b=4", family="PEFT", method="adapters", options={"dense": True, "bottleneck_size": 4}),
        ours("rep", "rep", targets="qv"), ours("rep", "rep", targets="qv", norms=True),
        ours("adp", "adp"), ours("adp", "adp", norms=True),
        *(compact(norms=norms) for norms in (False, True)), *(compact(2, norms=norms) for norms in (False, True)),
        *(compact(rank, norms=False) for rank in (4, 16, 32)), compact(inner=2, norms=False),
        *(compact(inner=8, norms=norms) for norms in (False, True)), compact(targets="v, MLP", norms=False),
        *(shared(rank, norms=norms) for rank in (2, 4, 8) for norms in (False, True)),
        *(shared(rank, norms=False) for rank in (1, 16, 32)), shared(16, "qv", norms=False), shared(1, norms=True),
        *(shared(rank, "attention", norms=False) for rank in (3, 6, 2)),
        *(shared(rank, "attention, MLP out", norms=False, middle=3e-3) for rank in (1, 2)),
        compact(targets="v", norms=False, middle=3e-3),
        small_lora("v"), small_lora("q"), *(small_lora("qv", last) for last in (2, 3, 5, 6, 10, 20)),
        *(small_lora("v", last) for last in (3, 6)), *(some_norms(last) for last in (3, 4, 8, 16)),
        some_norms(3, "attention"),
        # in the layers and at the rates at which LoRA of rank 1 learns CB on the decoder
        *(shared(rank, last=5, norms=False, middle=2.4e-2) for rank in (2, 4)),
        shared(6, "qv", last=5, norms=False, middle=2.4e-2), compact(last=5, norms=False, middle=2.4e-2),
    )
}  # fmt: skip
SCALED = [
    scaled(METHODS[f"{form} r={rank}"], rank, power)
    for power in (0.5, 0.25, 0.75)
    for form in ("LoRA", "shared", *(["compact"] if power < 0.75 else []))
    for rank in (32, 4 if form == "compact" else 8)
]
# the same scale at every rank, and rates of single cores
BONDS = [
    replace(METHODS[f"compact r={rank}"], name=f"compact cores^{power:g} r={rank}", bonds=power)
    for rank in (32, 4, 16)
    for power in (0.5, 0.75, 1.0)
]
# what has one rate at every rank, at a scale as many times larger as the weights of SmolLM2 are than those of the
# encoders, and at the square of that
LARGER = [
    times(method, factor)
    for factor in (2.8, 8)
    for method in (
        *(METHODS[name] for name in ("LoRA r=1", "shared r=1", "compact")),
        *(method for method in SCALED if "^0.75" in method.name),
        *(method for method in BONDS if method.name in ("compact cores^1 r=32", "compact cores^1 r=4")),
    )
]
# the paper's Table 7 on width 384, where adp has 4 modes a train by itself
SHAPES = [
    replace(METHODS["adp + norms"], name=f"adp + norms, {n} modes", options={"shapes": shapes(384, 64, n)})
    for n in (3, 5, 7)
]
# the paper's Table 11: norms or none, and a classifier's hidden layer whole or as a train; other rows freeze it
HEADS = [
    replace(METHODS[form], name=f"{form}, {head} head", head=head)
    for form in ("rep", "rep + norms", "adp", "adp + norms")
    for head in ("dense", "tensorized")
]
# the paper's Table 6 at one scale: its forms by the rank of their trains, with frozen norms
RANKS = [
    replace(METHODS[form], name=f"{form} r={rank}", options={"tensor_rank": rank, **scale})
    for rank in (32, 1, 5, 16)
    for form, scale in (("rep", {"lora_alpha": 3.2 * rank}), ("adp", {}))
]
# the same at a scale that falls as LoRA's: adp's is 2 at rank 1, as LoRA's, and rep's 4; on the decoder 2.8 times that
STEADY, STEADY_DECODER = (
    [times(scaled(method, method.options["tensor_rank"], 0.75), of_form[method.method]) for method in RANKS]
    for of_form in ({"rep": 1.25, "adp": 2}, {"rep": 3.5, "adp": 5.6})
)
# at the fixed scale, with rates of single cores by what each sums, as compact's
PAPER_BONDS = [
    replace(method, name=f"{method.method} cores^1 r={method.options['tensor_rank']}", bonds=1.0) for method in RANKS
]
ONE_MODE = {"r": 1, "tensor_rank": 1, "modes_per_side": 1, "lora_alpha": 2}  # LoRA of rank 1
WITH_SCALES = [
    with_scales(METHODS["shared r=2"]),
    with_scales(METHODS["shared r=4 + norms"]),
    with_scales(ours("rep of one mode", "rep", ONE_MODE, targets="all")),
    with_scales(METHODS["shared r=1"], "k,v", middle=3e-3),
    with_scales(METHODS["shared r=4"]),
    with_scales(METHODS["shared r=1"], middle=3e-3),
    with_scales(METHODS["shared r=2"], times=2),
    with_scales(METHODS["compact v, MLP"], "k,v"),
    with_scales(METHODS["compact v, MLP"]),
    with_scales(METHODS["shared r=1"], "v", middle=3e-3),
    with_scales(METHODS["compact"], "k,v"),
    with_scales(METHODS["shared r=2"], "k,v"),
    with_scales(METHODS["shared r=3 attention"], "MLP"),
    with_scales(METHODS["shared r=3 attention"], "v"),
    with_scales(METHODS["shared r=2"], "v"),
    with_scales(METHODS["shared r=4"], "v"),
    with_scales(METHODS["compact v, MLP"], "v"),
    with_scales(METHODS["compact"]),
    with_scales(ours("rep of one mode", "rep", ONE_MODE, targets="all"), "k,v"),
    with_scales(METHODS["shared r=2 attention"], "MLP"),
    with_scales(replace(METHODS["compact v"], middle=1.5e-3), "v"),
]
of_ranks = RANKS + STEADY + STEADY_DECODER + PAPER_BONDS
METHODS |= {method.name: method for method in SCALED + BONDS + LARGER + SHAPES + HEADS + of_ranks + WITH_SCALES}
FAST_CORES = [
    with_fast_cores(METHODS[name], factor)
    for factor, names in (
        (TIMES, (
            "shared r=1", "shared r=2", "shared r=8", "shared r=3 attention", "shared r=2 + v scales",
            "shared r=2 + scales", "shared r=4 + v scales", "shared r=4 + scales", "shared r=3 attention + v scales",
        )),
        (0.25, ("shared r=4 + scales", "shared r=4 + v scales", "shared r=2")),
    )
    for name in names
]  # fmt: skip
METHODS |= {method.name: method for method in FAST_CORES}
# the ends of the ranks by their rules, and the same at a scale as many times smaller as the weights of Gemma are
ENDS = ["LoRA r=1", "compact", "shared r=1", "LoRA^0.75 r=32", "compact cores^1 r=32", "shared^0.75 r=32"]
SMALLER = [times(METHODS[name], 0.53) for name in ENDS]
METHODS |= {method.name: method for method in SMALLER}


def grid(method: str | Method, count: int = 3, apart: float = 2.0) -> tuple[float, ...]:
    """``count`` rates around the middle of a method, ``apart`` from each other."""
    middle = (METHODS[method] if isinstance(method, str) else method).middle
    return tuple(float(f"{middle * apart ** (k - (count - 1) / 2):.3g}") for k in range(count))
