"""Biases of the base model that an adapter trains (``bias``): which they are, and their names in its file."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from loretta.tuners.adapted import AdaptedModule
from loretta.tuners.adapter_file import PREFIX
from loretta.tuners.changes import ChangedModule
from loretta.tuners.config import LorettaConfig
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.names import name_in_base, parts_of_adapters


def trained_biases(model: nn.Module, adapter_name: str, bias: str) -> dict[str, nn.Parameter]:
    """The biases of the base that an adapter with this option ``bias`` trains, by name.

    Those of norms that the adapter trains and of modules that it copies are not among them: it has its own.
    """
    if bias == "none":
        return {}
    apart = [*parts_of_adapters(model)]  # and what this one has biases of its own for
    adapted: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if adapter_name in getattr(module, "modules_to_save", getattr(module, "held", ())):
            if isinstance(module, LorettaLayer):
                adapted.add(name_in_base(name) + ".bias")
            else:
                apart.append(f"{name}.")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name.endswith(".bias") if bias == "all" else name_in_base(name) in adapted)
        if not name.startswith(tuple(apart))
    }


class BaseBiases:
    """The biases of the base that adapters of one model train in place: with the adapter that has them, and no other.

    All layers of the model share it, for transformers and PEFT's functions switch adapters layer by layer.
    """

    def __init__(self) -> None:
        self.options: dict[str, str] = {}  # by adapter
        self.modules: dict[str, list[nn.Module]] = {}
        self.acting: Collection[str] = ()

    def settle(self, model: nn.Module, options: Mapping[str, str]) -> None:
        """Find the biases of all adapters; each trains one of its ``options``."""
        self.options = {name: bias for name, bias in options.items() if bias != "none"}
        self.modules = {
            name: [model.get_submodule(key.removesuffix(".bias")) for key in trained_biases(model, name, bias)]
            for name, bias in self.options.items()
        }

    def follow(self, acting: Collection[str], *, inference_mode: bool = False) -> None:
        """Train those of the adapters that act from now on; PEFT leaves them as they were."""
        for name, modules in self.modules.items():
            for module in modules:
                module.bias.requires_grad_(name in acting and not inference_mode)
        self.leave(acting)

    def leave(self, acting: Collection[str]) -> None:
        """Warn of what no longer acts and stays in the base, where other adapters act from now on, or none."""
        left, self.acting = [name for name in self.acting if name not in acting], [*acting]
        self.say([name for name in left if name in self.options])

    def say(self, left: Collection[str]) -> None:
        """Warn of adapters that act no more and have trained biases of the base."""
        for name in left:
            warnings.warn(
                f"the biases of the base model stay as the adapter {name!r} has trained them "
                f"(bias={self.options[name]!r}), whatever acts now: load the base model anew for its own",
                stacklevel=4,
            )


def without_merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model, with the base's own values where norms and scales are merged into them."""
    found = dict(tensors)
    for path, module in model.named_modules():
        for name, value in module.unmerged.items() if isinstance(module, ChangedModule) else ():
            if (key := f"{path}.base_layer.{name}") in found:
                found[key] = value
    return found


def biases_alone(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Biases of the base within adapted modules: name here -> name where this adapter is the only one."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found = {}
    for name in layers:
        within, own = name, 0
        while within in layers:
            here: Any = layers[within]
            own += adapter_name in (here.held if isinstance(here, AdaptedModule) else here._get_available_adapters())
            within += ".base_layer"
        if not name.endswith(".base_layer"):
            found[f"{within}.bias"] = name + own * ".base_layer" + ".bias"
    return found


def of_other_methods(model: nn.Module, configs: Mapping[str, Any]) -> list[str]:
    """A sentence for each adapter of another method whose trained biases lie below layers of ours.

    PEFT saves them by their names here, and finds none of them in a model without ours.
    """
    others = {
        adapter: getattr(of, "bias", "none") for adapter, of in configs.items() if not isinstance(of, LorettaConfig)
    }
    trained = {adapter: bias for adapter, bias in others.items() if bias != "none"}
    said, names = [], {name for name, _ in model.named_parameters()} if trained else set()
    for adapter, bias in trained.items():
        alone = {here: name for here, name in biases_alone(model, adapter).items() if here in names}
        adapted = [(here, name) for here, name in alone.items() if bias == "all" or ".base_layer." in name]
        if lost := [name for here, name in adapted if here != name]:
            said.append(
                f"the adapter {adapter!r} trains biases of the base (bias={bias!r}): from now on its file would lose "
                f"{len(lost)} of them, the first is '{lost[0]}', and those that require a gradient train with every "
                "adapter: save it before, and load it into a model of its own"
            )
    return said


def biases_here(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors; biases of the base by their names here, whichever adapters are in the model and were where saved."""

    def plain(key: str) -> str:
        return name_in_base(key).replace(".original_module.", ".").removeprefix(PREFIX)

    here = {plain(key): key for key in model.state_dict() if key.endswith(".bias")}
    return {here.get(plain(key), key) if key.endswith(".bias") else key: value for key, value in tensors.items()}
