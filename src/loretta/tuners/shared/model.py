"""The shared tuner."""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from loretta import tt
from loretta.errors import InputError
from loretta.layers.shared import Seat, SharedCores, SharedShape
from loretta.tuners.config import LorettaConfig
from loretta.tuners.norms import TrainedNorm
from loretta.tuners.placement import Placement, require_linear
from loretta.tuners.rep.model import LorettaRepModel
from loretta.tuners.schema import check_size
from loretta.tuners.shared.config import LorettaSharedConfig
from loretta.tuners.shared.layer import SharedLinear
from loretta.wording import quoted


class LorettaSharedModel(LorettaRepModel):
    """Adds to every target a weight update that comes from one train for all of them."""

    prefix = "loretta_shared_"
    tuner_layer_cls = (SharedLinear, TrainedNorm)
    layer_cls = SharedLinear

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As that of all methods. The config alone says what is adapted: saved weights name one module of all."""
        self.new_trains: dict[str, SharedCores] = {}  # of the layers, and no modules of this one
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    @classmethod
    def place_all(cls, config: LorettaConfig, modules: Iterable[tuple[str, nn.Module]]) -> list[Placement]:
        """Plan one train for all modules. Raises InputError when one is not linear or the train is far too large."""
        return plan_shared(cast(LorettaSharedConfig, config), [(name, require_linear(name, m)) for name, m in modules])

    def _update_layer(self, layer: Any, adapter_name: str, config: Any, name: str, module: nn.Module) -> None:
        placement = self.planned[name]
        if not self.new_trains:
            assert placement.seat is not None
            train = SharedCores(placement.seat.train)
            train.start(zero=config.init_weights == "zero")
            self.new_trains = {"train": train}
            if config.init_weights == "denoised":
                self.new_trains["start_train"] = copy.deepcopy(train).requires_grad_(False)
        layer.update_layer(adapter_name, placement, config, self.new_trains)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for shared trains. Raises InputError that says what to do instead."""
        raise InputError(
            "shared trains are not added up: export each adapter with loretta.export_lora, and add the LoRAs up with "
            "their add_weighted_adapter"
        )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """As that of all methods, with the train once, under the name of the first layer that holds it."""
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        repeated = [key for keys in _keys_by_train(tensors, adapter_name) for key in keys[1:]]
        return {key: value for key, value in tensors.items() if key not in repeated}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """As that of all methods, from a file that has the train once."""
        tensors = dict(state_dict)
        for keys in _keys_by_train(model.state_dict(), adapter_name):
            saved = [cls._remove_adapter_name_from_key(key, adapter_name) for key in keys]
            for prefix in ("", "base_model.model."):  # which a file has, whatever the model is wrapped in
                if (value := state_dict.get(prefix + saved[0])) is not None:
                    tensors = {**{prefix + key: value for key in saved}, **tensors}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)


def _keys_by_train(keys: Iterable[str], adapter_name: str) -> list[list[str]]:
    """The names that one tensor has, for each of the adapter's trains: one in every layer."""
    ends = [f".{SharedLinear.prefix}{part}.{adapter_name}.values" for part in SharedLinear.trains]
    found = [[key for key in keys if key.endswith(end)] for end in ends]
    return [names for names in found if names]


def plan_shared(config: LorettaSharedConfig, modules: Sequence[tuple[str, tuple[int, int]]]) -> list[Placement]:
    """The places of modules, given by name and (in, out), in the one train that serves them all."""
    rank = config.tensor_rank
    parts = [split_name(name, config.layers_pattern) for name, _ in modules]
    layers = list(dict.fromkeys(layer for layer, _ in parts))
    projections = list(dict.fromkeys(projection for _, projection in parts))
    ins = list(dict.fromkeys(in_features for _, (in_features, _) in modules))
    outs = list(dict.fromkeys(out_features for _, (_, out_features) in modules))
    for name, (in_features, out_features) in modules:
        check_size(name, f"a rank of {quoted(rank)}", rank * max(in_features, out_features, rank),
                   in_features * out_features)  # fmt: skip
    train = SharedShape(
        rank=rank,
        layers=len(layers),
        projections=len(projections),
        left=tuple(_plan_side(config, width, rank) for width in ins),
        right=tuple(_plan_side(config, rank, width) for width in outs),
    )
    placements = []
    for (name, (in_features, out_features)), (layer, projection) in zip(modules, parts, strict=True):
        seat = Seat(
            train=train,
            left=ins.index(in_features),
            layer=layers.index(layer),
            projection=projections.index(projection),
            right=outs.index(out_features),
        )
        down, up = train.left[seat.left], train.right[seat.right]
        placements.append(Placement(name=name, where="update", down=down, up=up, seat=seat))
    return placements


def _plan_side(config: LorettaSharedConfig, in_features: int, out_features: int) -> tt.TTShape:
    modes = config.shapes.get(f"{in_features}x{out_features}", [in_features * out_features])
    try:
        return tt.plan_shape(in_features, out_features, rank=config.tensor_rank, modes=modes)
    except ValueError as error:
        raise InputError(str(error)) from None


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
