"""Options of shared: the weight updates from one train."""

from dataclasses import dataclass
from typing import Literal

from loretta.tuners.config import LorettaUpdateConfig
from loretta.tuners.register import add_peft_type


@dataclass
class LorettaSharedConfig(LorettaUpdateConfig):
    """One train for all adapted modules: ``W0 + scaling * L G_layer[l] G_projection[m] R`` in layer l, projection m.

    L (in x rank) is shared by all modules of one input width, R (rank x out) by all of one output width; a further
    layer or projection costs ``tensor_rank ** 2`` parameters. A layer is what the first number in a module's name, or
    ``layers_pattern``, says it is; modules without a number are one layer together. Of the options of
    :class:`LorettaConfig`, ``tensor_rank`` is the rank of all updates, ``shapes`` makes sides of several cores
    (``{"768x16": [24, 512], "16x768": [512, 24]}`` at rank 16), and ``rank_pattern`` is not taken. The updates are
    scaled by ``lora_alpha / tensor_rank`` (:class:`LorettaUpdateConfig`), which is 2 unless one of them is given.
    """

    bias: Literal["none", "all", "loretta_shared_only"] = "none"
    tensor_rank: int = 16
    lora_alpha: float = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LORETTA_SHARED")

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.modes_per_side is not None:
            problems.append(
                f"modes_per_side={self.modes_per_side!r}: the sides of a shared train are one core, or what shapes says"
            )
        problems += self._no_experts("the one train has a place for each module, and none for each expert")
        if self.rank_pattern:
            problems.append(f"rank_pattern={self.rank_pattern!r}: one train has one rank, so give tensor_rank alone")
        return problems
