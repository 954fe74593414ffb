"""Choose ranks, bottleneck and targets that fit a budget of parameters or bytes, and say why."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from loretta.errors import InputError
from loretta.plan import Plan, plan_model
from loretta.tuners.adp import LorettaAdpConfig
from loretta.tuners.config import LorettaConfig
from loretta.tuners.rep import LorettaRepConfig

RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """An upper bound in trained parameters or in bytes of the saved adapter (float32)."""

    amount: int
    unit: str  # "parameters" or "bytes"

    @classmethod
    def parse(cls, words: str) -> "Budget":
        """Read "100k", "1.5M" (parameters), "400kB" or "1MiB" (bytes). Raises InputError for anything else."""
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kKmMgG]?i?)([bB]?)", words.strip())
        if match is None or match[2].lower() not in _UNITS or (match[2].lower().endswith("i") and not match[3]):
            raise InputError(
                f"the budget {words!r} is not a size: write 100k or 1.5M (parameters), 400kB or 1MiB (bytes)"
            )
        amount = int(float(match[1]) * _UNITS[match[2].lower()])
        return cls(amount=amount, unit="bytes" if match[3] else "parameters")

    def used(self, plan: Plan) -> int:
        return plan.trainable if self.unit == "parameters" else 4 * plan.saved

    def fits(self, plan: Plan) -> bool:
        return self.used(plan) <= self.amount

    def __str__(self) -> str:
        return f"{self.amount:,} {self.unit}"


def choose(model: nn.Module, config: LorettaConfig, budget: Budget) -> tuple[LorettaConfig, Plan, list[str]]:
    """The largest configuration of ``config``'s method that fits, its plan, and the reasons, a sentence each.

    Capacity is spent in this order: the targets that were asked for (the default ones), then the highest tensor
    rank, then for rep a bottleneck that does not bound that rank. Layer norms are given up first when they alone
    do not leave room for a train of rank 1, then the biases of adp, then half of the bottleneck again and again.

    Raises InputError when even the smallest does not fit, with what it would take.
    """
    reasons: list[str] = []
    for start, reason in _reductions(config):
        reasons += [reason] if reason else []
        smallest = plan_model(model, _with_rank(start, RANKS[0]))
        if not budget.fits(smallest):
            continue
        best, best_plan = start, smallest
        beyond = None
        for rank in RANKS:
            candidate = _with_rank(start, rank)
            plan = plan_model(model, candidate)
            if not budget.fits(plan):
                beyond = (rank, budget.used(plan))
                break
            best, best_plan = candidate, plan
        fixed = best_plan.extras.norms + best_plan.extras.head + best_plan.biases
        reasons.append(
            f"tensor rank {best.tensor_rank} is the highest that fits: {budget.used(best_plan):,} of {budget}"
            + (f"; rank {beyond[0]} would take {beyond[1]:,}" if beyond else "")
        )
        reasons.append(
            f"{fixed:,} of the {best_plan.trainable:,} parameters are norms, head and biases, whatever the rank"
        )
        return best, best_plan, reasons
    raise InputError(
        f"no {_method(config)} adapter fits {budget}: the smallest takes {budget.used(smallest):,} {budget.unit}; "
        "raise the budget or name fewer target_modules"
    )


def _method(config: LorettaConfig) -> str:
    return "rep" if isinstance(config, LorettaRepConfig) else "adp"


def _reductions(config: LorettaConfig) -> Iterator[tuple[LorettaConfig, str]]:
    """The configuration as asked, then smaller and smaller ones, each with what was given up."""
    yield config, ""
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


def _with_rank(config: LorettaConfig, rank: int) -> LorettaConfig:
    if isinstance(config, LorettaRepConfig):
        # a bottleneck below the tensor rank would waste it
        return replace(config, tensor_rank=rank, r=max(config.r, rank))
    return replace(config, tensor_rank=rank)
