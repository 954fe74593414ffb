"""A plan in words and tables for a person to read."""

from collections.abc import Sequence
from html import escape

from loretta.plan.picture import train_svg
from loretta.plan.plan import Plan
from loretta.tt import TTShape
from loretta.tuners.placement import Placement
from loretta.wording import as_text, table_of

_WHERE = {"update": "added to the weight", "after": "after it", "before": "before it"}


def explain_plan(plan: Plan, notes: Sequence[str] = ()) -> str:
    """One page: where adapters sit, what is trained, and why the counts are what they are; ``notes`` come last."""
    what = {
        "rep": "LoRETTA_rep adds an update of two tensor trains to the weight of each module below.",
        "adp": "LoRETTA_adp puts a bottleneck adapter of two tensor trains at each module below.",
        "shared": "LoRETTA_shared adds to the weight of each module below an update from one tensor train for all.",
    }[plan.method]
    lines = [f"{what} The model is of type {plan.model_type}, {plan.model_parameters:,} parameters, all frozen.", ""]
    for placement, count in plan.groups():
        ending = placement.name.rpartition(".")[2]
        where = _WHERE[placement.where] + (f", of {placement.experts} experts" if placement.experts else "")
        lines.append(f"{count} x {ending} ({where}), for example {placement.name}:")
        for part, shape in (("down", placement.down), ("up", placement.up)):
            if placement.seat:
                drawn = f"{shape.in_features} x {shape.out_features}" if _is_matrix(placement, shape) else draw(shape)
                lines.append(f"  {part:4} {drawn}, a side of the shared train")
                continue
            lines.append(f"  {part:4} {draw(shape)}")
            lines.append(f"       {count_in_words(shape)}")
        if placement.bias_params:
            lines.append(f"       biases: {placement.bias_params:,} (the bottleneck and the width)")
    lines += _shared_in_words(plan)
    lines += ["", "Trained:"]
    lines += [
        f"  {name:7} {number:>13,}  {number / max(1, plan.trainable):.0%}"
        for name, number in plan.parts.items()
        if number
    ]
    lines.append(
        f"  {'total':7} {plan.trainable:>13,}  {plan.trainable / max(1, plan.model_parameters):.3%} of the model"
    )
    lines += [f"Head: {part}." for part in plan.copies.parts]
    if plan.copies.frozen:
        lines.append(
            f"Saved with the adapter though frozen: {plan.copies.frozen:,} (starting values, an untrained head)"
        )
    lines += [f"Cannot be a target module: {name}, which {reason}." for name, reason in plan.not_adaptable.items()]
    lines += [f"Without effect: {sentence}." for sentence in plan.unused]
    lines += ["", *notes] if notes else []
    return "\n".join(lines)


def _is_matrix(placement: Placement, shape: TTShape) -> bool:
    """Whether a side of a shared train is one core, which is the matrix itself."""
    return placement.seat is not None and len(shape.modes) == 1


def _shared_in_words(plan: Plan) -> list[str]:
    if (shared := plan.shared) is None:
        return []
    parts = [
        f"  {count} x {kind}: {each:,}" + (f" each, {count * each:,}" if count > 1 else "")
        for kind, count, each in shared.counts
    ]
    what = "The shared train: the update of a module is left side x core of its layer x core of its projection x right"
    return ["", f"{what} side, of rank {shared.rank}.", *parts]


class Explanation(str):
    """The page in words, which a notebook shows with a picture of each train."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan) -> "Explanation":
        page = cls(explain_plan(plan))
        page.plan = plan
        return page

    def _repr_html_(self) -> str:
        trains = [
            (count, f"{placement.name.rpartition('.')[2]} {part}", shape)
            for placement, count in self.plan.groups()
            for part, shape in (("down", placement.down), ("up", placement.up))
        ]
        pictures = [
            f"<figure style='margin: .5em 0'><figcaption>{escape(f'{count} x {name}')}</figcaption>"
            f"{train_svg(shape, name)}</figure>"
            for count, name, shape in trains
        ]
        return f"<style>{_LOOK}</style><pre>{escape(self)}</pre>{''.join(pictures)}"


# the pictures follow the notebook's own colours
_LOOK = (
    "svg.train rect { fill: none; stroke: currentColor } svg.train text { fill: currentColor; font-size: 13px } "
    "svg.train line { stroke: currentColor } svg.train line.boundary { stroke-dasharray: 4 3 }"
)


def draw(shape: TTShape) -> str:
    """A train on one line: modes in brackets, ranks between them, ``|`` where the input ends and the output begins.

    A straddling mode is written ``[in x out]``.
    """
    parts: list[str] = []
    for k, mode in enumerate(shape.modes):
        if k:
            parts.append("|" if shape.aligned and k == shape.n_in else f"-{shape.ranks[k]}-")
        straddles = not shape.aligned and k == shape.n_in
        parts.append(f"[{shape.split}|{mode // shape.split}]" if straddles else f"[{mode}]")
    text = " ".join(parts)
    if shape.aligned and 0 < shape.n_in < len(shape.modes):
        text = text.replace(" | ", f" -{shape.ranks[shape.n_in]}-|- ")
    return f"{shape.in_features} x {shape.out_features}: {text}"


def count_in_words(shape: TTShape) -> str:
    """The parameter count as the sum it is, for example ``1·8·5 + 5·8·1 = 80``."""
    terms = " + ".join(f"{left}·{mode}·{right}" for left, mode, right in shape.cores)
    dense = shape.in_features * shape.out_features
    return f"{terms} = {shape.n_params:,} instead of {dense:,}; rank at the cut {shape.cut_rank}"


def tables(plan: Plan) -> str:
    """The plan as two tables: modules by kind, and totals beside LoRA and dense adapters."""
    names = ("module", "count", "where", "in x out", "modes", "rank", "cut", "parameters each", "parameters")
    modules = table_of(names, ("module", "where", "modes"))
    for placement, count in plan.groups():
        ending = placement.name.rpartition(".")[2]
        for part, shape in (("down", placement.down), ("up", placement.up)):
            modules.add_row(
                f"{ending} {part}",
                f"{count}",
                placement.where,
                f"{shape.in_features} x {shape.out_features}",
                "a matrix" if _is_matrix(placement, shape) else f"{list(shape.modes)}",
                "" if _is_matrix(placement, shape) else f"{max(shape.ranks)}",
                f"{shape.cut_rank}" + ("" if shape.aligned or placement.seat else " *"),
                "shared" if placement.seat else f"{shape.n_params:,}",
                "" if placement.seat else f"{count * shape.n_params:,}",
            )
        if placement.bias_params:
            modules.add_row(f"{ending} biases", f"{count}", "", "", "", "", "", f"{placement.bias_params:,}",
                            f"{count * placement.bias_params:,}")  # fmt: skip
    for kind, count, each in plan.shared.counts if plan.shared else ():
        modules.add_row(kind, f"{count}", "", "", "", "", "", f"{each:,}", f"{count * each:,}")
    totals = table_of(("", "LoRETTA", "LoRA r=8", "dense adapters, 64"), ("",))
    costs = [plan.cost, plan.lora, plan.dense]
    for kind, number in plan.parts.items():
        totals.add_row(kind, f"{number:,}")
    totals.add_row("trained parameters", *(f"{cost.parameters:,}" if cost else "-" for cost in costs))
    totals.add_row("adapter bytes, float32", *_bytes(plan, costs, 4))
    totals.add_row("adapter bytes, bfloat16", *_bytes(plan, costs, 2))
    totals.add_row("extra FLOPs per token", *(f"{cost.flops_per_token:,}" if cost else "-" for cost in costs))
    totals.add_row(
        "extra bytes kept per token, bfloat16", *(f"{2 * cost.kept_per_token:,}" if cost else "-" for cost in costs)
    )
    totals.add_row("FLOPs to contract the cores, a step", f"{plan.fold_flops:,}")
    straddles = any(not shape.aligned for p in plan.placements if not p.seat for shape in (p.down, p.up))
    note = ["  * the boundary between input and output cuts a mode"] if straddles else []
    return as_text(modules, *note, totals)


def _bytes(plan: Plan, costs: Sequence, itemsize: int) -> list[str]:
    others = [f"{itemsize * cost.parameters:,}" if cost else "-" for cost in costs[1:]]
    return [f"{itemsize * plan.saved:,}", *others]
