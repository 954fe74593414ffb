"""Biases of the base model that an adapter trains (``bias``): which they are, and their names in its file."""

from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from loretta.tuners.adapter_file import PREFIX
from loretta.tuners.changes import ChangedModule
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.names import parts_of_adapters


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
                adapted.add(name.replace(".base_layer", "") + ".bias")
            else:
                apart.append(f"{name}.")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name.endswith(".bias") if bias == "all" else name.replace(".base_layer", "") in adapted)
        if not name.startswith(tuple(apart))
    }


def without_merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model; those that norms and scales of other adapters are merged into, as they are without."""
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
            own += adapter_name in getattr(layers[within], "held", ())
            within += ".base_layer"
        if not name.endswith(".base_layer"):
            found[f"{within}.bias"] = name + own * ".base_layer" + ".bias"
    return found


def biases_here(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors; biases of the base by their names here, whichever adapters are in the model and were where saved."""

    def plain(key: str) -> str:
        return key.replace(".base_layer.", ".").replace(".original_module.", ".").removeprefix(PREFIX)

    here = {plain(key): key for key in model.state_dict() if key.endswith(".bias")}
    return {here.get(plain(key), key) if key.endswith(".bias") else key: value for key, value in tensors.items()}
