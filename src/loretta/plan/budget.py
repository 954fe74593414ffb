"""Choose ranks, bottleneck and targets that fit a budget of parameters or bytes, and say why."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import nn

from loretta.errors import InputError
from loretta.plan.plan import Plan, method_name, plan_model
from loretta.tuners.adp import LorettaAdpConfig
from loretta.tuners.config import LorettaConfig
from loretta.tuners.rep import LorettaRepConfig
from loretta.tuners.shared import LorettaSharedConfig

MAX_RANK = 64
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """An upper bound in trained parameters or in bytes of the saved adapter (float32)."""

    amount: int
    unit: str  # "parameters" or "bytes"

    @classmethod
    def parse(cls, words: str | int) -> "Budget":
        """Read "100k", "1.5M" (parameters), "400kB" or "1MiB" (bytes). Raises InputError for anything else."""
        words = str(words)
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kKmMgG]?i?)([bB]?)", words.strip())
        if match is None or match[2].lower() not in _UNITS or (match[2].lower().endswith("i") and not match[3]):
            raise InputError(
                f"the budget {words!r} is not a size: write 100k or 1.5M (parameters), 400kB or 1MiB (bytes)"
            )
        amount = int(Fraction(match[1]) * _UNITS[match[2].lower()])  # as a float 0.57k is 569
        return cls(amount=amount, unit="bytes" if match[3] else "parameters")

    def used(self, plan: Plan) -> int:
        """What a plan takes, in the budget's unit; bytes are those of a file in float32."""
        return plan.trainable if self.unit == "parameters" else 4 * plan.saved

    def fits(self, plan: Plan) -> bool:
        """Whether a plan keeps within the budget."""
        return self.used(plan) <= self.amount

    def __str__(self) -> str:
        return f"{self.amount:,} {self.unit}"


def choose(model: nn.Module, config: LorettaConfig, budget: Budget) -> tuple[LorettaConfig, Plan, list[str]]:
    """The largest configuration of ``config``'s method that fits, its plan, and the reasons, a sentence each.

    Capacity is spent on the targets that were asked for (the default ones), then on the highest tensor rank, for rep
    with a bottleneck that does not bound that rank; when the highest rank there is fits and no targets were given,
    every linear layer is targeted. When not even rank 1 fits, these are given up one after the other: the layer norms,
    the biases of adp, half of its bottleneck again and again, and half of the layers (the lower ones) again and again.

    Raises InputError when even the smallest does not fit, with what it would take.
    """
    reasons: list[str] = []
    if config.target_modules is None:
        everywhere = replace(config, target_modules="all-linear")
        if budget.fits(plan_model(model, with_rank(config, MAX_RANK))) and budget.fits(
            plan_model(model, with_rank(everywhere, 1))
        ):
            config = everywhere
            reasons.append(f"every linear layer is targeted: the default targets fit even at rank {MAX_RANK}")
    for start, reason in _reductions(config, model):
        reasons += [reason] if reason else []
        smallest = plan_model(model, with_rank(start, 1))
        if not budget.fits(smallest):
            continue
        best, best_plan, words = highest_rank(with_rank(start, 1), smallest, model, budget)
        return best, best_plan, [*reasons, *words]
    raise InputError(
        f"no {method_name(config)} adapter fits {budget}: the smallest takes {budget.used(smallest):,} {budget.unit}; "
        "raise the budget"
    )


def highest_rank(
    config: LorettaConfig, plan: Plan, model: nn.Module, budget: Budget
) -> tuple[LorettaConfig, Plan, list[str]]:
    """``config`` at the highest tensor rank that fits, its plan, and what it costs in words.

    ``plan`` is that of ``config`` itself, which fits. Where the bottleneck follows the rank, a rank may take up to a
    quarter less than the one below it, as rep with a bottleneck of 26, 2 x 13, does after one of 25: there ranks are
    tried on until one takes half as much again.
    """
    fits, fails = config.tensor_rank, max(MAX_RANK, config.tensor_rank) + 1
    beyond: Plan | None = None
    while fails - fits > 1:
        middle = (fits + fails) // 2
        found = plan_model(model, with_rank(config, middle))
        if budget.fits(found):
            fits, plan = middle, found
        else:
            fails, beyond = middle, found
    bottlenecks = {getattr(with_rank(config, rank), "r", None) for rank in (fits, MAX_RANK)}
    for rank in range(fails + 1, MAX_RANK + 1) if len(bottlenecks) > 1 else ():
        found = plan_model(model, with_rank(config, rank))
        if budget.fits(found):
            fits, plan, beyond = rank, found, None
        elif rank == fits + 1:
            beyond = found
        if budget.used(found) > 1.5 * budget.amount:
            break
    parts = ", ".join(f"{kind} {number:,}" for kind, number in plan.parts.items() if number)
    return (
        with_rank(config, fits),
        plan,
        [
            f"tensor rank {fits} is the highest that fits: {budget.used(plan):,} of {budget}"
            + (f"; rank {fits + 1} would take {budget.used(beyond):,}" if beyond else ""),
            f"{plan.trainable:,} parameters: {parts}",
        ],
    )


def _reductions(config: LorettaConfig, model: nn.Module) -> Iterator[tuple[LorettaConfig, str]]:
    """The configuration as asked, then smaller and smaller ones, each with what was given up."""
    yield config, ""
    if config.train_scales:
        config = replace(config, train_scales=[])
        yield config, "nothing is scaled: scales leave no room for a train"
    if config.train_norms:
        config = replace(config, train_norms=False)
        yield config, "the layer norms are frozen: they alone leave no room for a train"
    if isinstance(config, LorettaAdpConfig):
        if config.train_bias:
            config = replace(config, train_bias=False)
            yield config, "the adapters have no biases: they leave no room for a train"
        while config.bottleneck_size > 4:
            config = replace(config, bottleneck_size=config.bottleneck_size // 2)
            yield config, f"the bottleneck is {config.bottleneck_size}"
    if isinstance(config.target_modules, str) or config.layers_to_transform is not None:
        return
    if isinstance(config, LorettaSharedConfig):  # of which a layer costs next to nothing
        return
    names = [placement.name for placement in plan_model(model, config).placements]
    layers = sorted({int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))})
    while len(layers) > 1:
        layers = layers[(len(layers) + 1) // 2 :]
        config = replace(config, layers_to_transform=layers)
        yield config, f"only the layers from {layers[0]} on are adapted"


def with_rank(config: LorettaConfig, rank: int) -> LorettaConfig:
    """The config with another tensor rank, and what has to go with it: the bottleneck, and ``lora_alpha``."""
    if isinstance(config, LorettaRepConfig) and config.modes_per_side is not None:
        # these trains carry an update of rank r whatever their own rank, unless a side is one mode; their scale stays
        bottleneck = rank if config.modes_per_side == 1 else config.r
        return replace(config, r=bottleneck, tensor_rank=rank, lora_alpha=config.lora_alpha * rank / config.tensor_rank)
    if isinstance(config, LorettaSharedConfig):
        return replace(config, tensor_rank=rank, lora_alpha=config.lora_alpha * rank / config.tensor_rank)
    if isinstance(config, LorettaRepConfig):
        # a bottleneck below the tensor rank would waste it
        return replace(config, tensor_rank=rank, r=max(config.r, rank))
    return replace(config, tensor_rank=rank)
