"""Options of adp: the bottleneck adapter."""

from dataclasses import dataclass, field
from typing import Literal

from transformers.activations import ACT2FN

from loretta.tuners.config import LorettaConfig
from loretta.tuners.register import add_peft_type


@dataclass
class LorettaAdpConfig(LorettaConfig):
    """LoRETTA_adp (section 3.2): ``y + scaling * up(act(down(y)))`` on the output y of attention and feed-forward.

    The options below come on top of those of :class:`LorettaConfig`.

    Args:
        bottleneck_size: width of the adapter (64 in the paper).
        dense: the two matrices are plain ones instead of trains, to compare with: the bottleneck adapter of Houlsby et
            al. (2019) in the same places, with the same start. ``tensor_rank`` and ``shapes`` then hold for a
            tensorised head alone.
        non_linearity: the activation, by its name in transformers (``"relu"``, ``"gelu"``, ``"silu"``, ...).
        adapter_dropout: dropout on the activated bottleneck.
        scaling: factor on the adapter's output.
        train_bias: whether the two trains of an adapter have biases, of ``bottleneck_size`` and the width.
        even_rates: one learning rate for every rank, as :class:`LorettaRepConfig` has it: each core starts larger by
            how many numbers it sums, and the train computes without that, so that Adam gives each core a rate of its
            own. It has no effect on biases. Above rank 5 seeds fail at the rates that rank 5 likes without it
            (docs/choosing.md, "One learning rate").
        placement: where adapters go by default, for models with gate, up and down projections: "blocks", after
            attention and after the feed-forward block (the paper's text), or "mlp", before the gate and up projections
            and after the down projection (the paper's LLaMA tables).
        insert_before: endings of target names whose adapter works on the module's *input*; elsewhere it works on
            the output. The default serves the paper's LLaMA tables (gate and up before, down after).
    """

    bias: Literal["none", "all", "loretta_adp_only"] = "none"
    bottleneck_size: int = 64
    dense: bool = False
    non_linearity: str = "relu"
    adapter_dropout: float = 0.0
    scaling: float = 1.0
    train_bias: bool = True
    even_rates: bool = False
    placement: Literal["blocks", "mlp"] = "blocks"
    insert_before: list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "gate_up_proj"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LORETTA_ADP")

    def _problems(self) -> list[str]:
        problems = [*super()._problems(), *self._below_one("bottleneck_size", self.bottleneck_size)]
        problems += [*self._not_among("placement"), *self._no_effect("scaling", self.scaling)]
        problems += self._no_experts("an adapter has its place after a module, and not inside the experts")
        if self.even_rates and self.dense:
            problems.append("even_rates gives each core of a train its rate, and dense has no trains: leave it out")
        if self.non_linearity not in ACT2FN:
            problems.append(f"non_linearity={self.non_linearity!r} is none of {', '.join(sorted(ACT2FN))}")
        if not 0 <= self.adapter_dropout < 1:
            problems.append(f"adapter_dropout={self.adapter_dropout!r} must be at least 0 and below 1")
        return problems
