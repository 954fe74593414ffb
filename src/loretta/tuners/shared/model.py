"""The shared tuner."""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from loretta import tt
from loretta.errors import InputError
from loretta.layers.shared import Seat, SharedCores, SharedShape
from loretta.tuners.config import LorettaConfig
from loretta.tuners.placement import Placement, require_linear
from loretta.tuners.rep.model import LorettaRepModel
from loretta.tuners.schema import check_size
from loretta.tuners.shared.config import LorettaSharedConfig
from loretta.tuners.shared.layer import SharedLinear
from loretta.wording import quoted


class LorettaSharedModel(LorettaRepModel):
    """Adds to every target a weight update that comes from one train for all of them."""

    prefix = "loretta_shared_"
    layer_cls = SharedLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As for all methods. The config alone names the adapted modules: saved weights name only one of them."""
        self.holder: list[SharedLinear] = []  # holds the new train; in a list, so that it is no module of this tuner
        super().inject_adapter(model, adapter_name, *args[:2], **{**kwargs, "state_dict": None})

    @staticmethod
    def place(config: Any, name: str, module: nn.Module) -> Placement:
        """Plan a train for one module alone."""
        return plan_shared(config, [(name, require_linear(name, module))])[0]

    @classmethod
    def place_all(cls, config: LorettaConfig, modules: Iterable[tuple[str, nn.Module]]) -> list[Placement]:
        """Plan one train for all modules. Raises InputError when one is not linear or the train is far too large."""
        return plan_shared(cast(LorettaSharedConfig, config), [(name, require_linear(name, m)) for name, m in modules])

    def _update_layer(self, layer: Any, adapter_name: str, config: Any, name: str, module: nn.Module) -> None:
        placement = self.planned[name]
        if not self.holder:
            assert placement.seat is not None
            train = SharedCores(placement.seat.train)
            train.start(zero=config.init_weights == "zero")
            trains = {"train": train}
            if config.init_weights == "denoised":
                trains["start_train"] = copy.deepcopy(train).requires_grad_(False)
            layer.hold(adapter_name, trains)
            self.holder = [layer]
        layer.update_layer(adapter_name, placement, config, self.holder[0])

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for shared trains. Raises InputError that says what to do instead."""
        raise InputError(
            "shared trains are not added up: export each adapter with loretta.export_lora, and add the LoRAs up with "
            "their add_weighted_adapter"
        )


def plan_shared(config: LorettaSharedConfig, modules: Sequence[tuple[str, tuple[int, int]]]) -> list[Placement]:
    """The places of modules, given by name and (in, out), in the one train that serves them all."""
    rank = config.tensor_rank
    parts = [split_name(name, config.layers_pattern) for name, _ in modules]
    layers = list(dict.fromkeys(layer for layer, _ in parts))
    projections = list(dict.fromkeys(projection for _, projection in parts))
    ins: dict[int, str] = {}  # width -> the first module that has it
    outs: dict[int, str] = {}
    for name, (in_features, out_features) in modules:
        check_size(name, f"a rank of {quoted(rank)}", rank * max(in_features, out_features, rank),
                   in_features * out_features)  # fmt: skip
        ins.setdefault(in_features, name)
        outs.setdefault(out_features, name)
    train = SharedShape(
        rank=rank,
        layers=len(layers),
        projections=len(projections),
        left=tuple(_plan_side(name, config, width, rank) for width, name in ins.items()),
        right=tuple(_plan_side(name, config, rank, width) for width, name in outs.items()),
    )
    placements = []
    for (name, (in_features, out_features)), (layer, projection) in zip(modules, parts, strict=True):
        seat = Seat(
            train=train,
            left=list(ins).index(in_features),
            layer=layers.index(layer),
            projection=projections.index(projection),
            right=list(outs).index(out_features),
        )
        down, up = train.left[seat.left], train.right[seat.right]
        placements.append(Placement(name=name, where="update", down=down, up=up, seat=seat))
    return placements


def _plan_side(name: str, config: LorettaSharedConfig, in_features: int, out_features: int) -> tt.TTShape:
    modes = config.shapes.get(f"{in_features}x{out_features}", [in_features * out_features])
    try:
        return tt.plan_shape(in_features, out_features, rank=config.tensor_rank, modes=modes)
    except ValueError as error:
        raise InputError(f"'{name}': {error}") from None


def split_name(name: str, layers_pattern: str | Sequence[str] | None = None) -> tuple[str, str]:
    """(layer, projection) of a module: its name up to the number that PEFT takes for the layer's, and the rest.

    Without ``layers_pattern`` that is the first number. A name without a number is a projection of the layer "". The
    same number in two stacks, such as encoder and decoder, stands for two layers.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    stacks = [rf"{pattern}\." for pattern in patterns] or [""]
    for stack in stacks:
        if match := re.match(rf"(?P<layer>(?:^|.*?\.){stack}\d+)\.(?P<projection>.+)", name):
            return match["layer"], match["projection"]
    return "", name
