"""Options of rep: the weight update."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loretta.tuners.config import EVEN_RANK, LorettaUpdateConfig
from loretta.tuners.register import add_peft_type

# the scale of the update is 2, as that of LoRA with its usual alpha of twice its rank
COMPACT: dict[str, Any] = {
    "r": 1,
    "tensor_rank": EVEN_RANK,
    "modes_per_side": 2,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "even_rates": True,
}


@dataclass
class LorettaRepConfig(LorettaUpdateConfig):
    """LoRETTA_rep (section 3.3): ``W0 + scaling * TT(down) TT(up)`` on linear layers and on GPT-2's Conv1D.

    The options below come on top of those of :class:`LorettaConfig` and :class:`LorettaUpdateConfig`; with their
    defaults the update is scaled by the paper's 16 / 5.

    Args:
        r: the bottleneck between the two trains (the paper's 8, 16 or 32). The rank of the update is at most
            ``min(r, tensor_rank)``.
        even_rates: one learning rate for every rank. Adam moves each number by about the rate, so the more numbers a
            core sums, the further a step moves what it computes. Each core therefore starts larger by that count, and
            the scaling is smaller by the product of all counts: the start computes the same, and every core learns as
            at compact's ranks, whose counts are 1. Clipping and weight decay see the larger numbers: the norm of a
            gradient is smaller, and every core loses the same share to decay. :meth:`compact` and the method "compact"
            have it (docs/choosing.md, "One learning rate"); an adapter that was saved without it stays without it.
    """

    bias: Literal["none", "all", "loretta_rep_only"] = "none"
    r: int = 8
    even_rates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LORETTA_REP")

    @classmethod
    def compact(cls, **options: Any) -> "LorettaRepConfig":
        """Rep as it measured best for its size: a rank of 1 on every linear layer, of trains with two modes a side.

        With the layer norms it was level with LoRA of rank 8 on query and value on three models, at a quarter to a
        third of the parameters (docs/choosing.md). ``options`` come on top.
        """
        return cls(**{**COMPACT, **options})

    def _problems(self) -> list[str]:
        problems = [*super()._problems(), *self._below_one("r", self.r)]
        if self.lora_dropout and self.target_parameters:
            problems.append(
                f"lora_dropout={self.lora_dropout!r} cannot reach the inputs of the experts that target_parameters "
                "names: set it to 0"
            )
        return problems


def of_ranks(ranks: Mapping[str, int], rank: int | None = None) -> dict[str, Any]:
    """The options that give each module its rank, and all of them a scaling of 1. ``rank`` is that of all else."""
    rank = rank or Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    scales = {"lora_alpha": rank, "alpha_pattern": dict(others), "even_rates": False}
    return {"tensor_rank": rank, "rank_pattern": others, **scales}
