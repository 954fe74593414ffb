"""Which module of a wrapped model uses a tensor: a population replaces it by one for all members."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from loretta.tuners.changes import ChangedModule
from loretta.tuners.layer import LorettaLayer

ADAPTER = "default"
_PARTS = ("down", "up", "bias", "start_down", "start_up")
_TRAINS = (
    *(f"loretta_{method}_{part}" for method in ("rep", "adp") for part in _PARTS),
    "loretta_shared_train",
    "loretta_shared_start_train",
)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def is_train(name: str) -> bool:
    """Whether a tensor belongs to a train, or is a bias beside one."""
    return any(part.startswith(_TRAINS) for part in name.split("."))


def part_of(name: str) -> str:
    """What a parameter of a LoRETTA layer is: "down", "bias.up" and the like."""
    parts = name.split(".")
    k = next(k for k, part in enumerate(parts) if part.startswith(_TRAINS))
    part = parts[k].split("_", 2)[2]
    return f"bias.{parts[-1]}" if part == "bias" else part


def site_of(model: nn.Module, name: str) -> str:
    """The module that uses the tensor ``name`` when it is called with rows."""
    path = name.rpartition(".")[0]
    if path.startswith("prompt_encoder."):
        return ".".join(path.split(".")[:2])
    above = [".".join(path.split(".")[: k + 1]) for k in range(path.count(".") + 1)] if path else []
    modules = [(at, model.get_submodule(at)) for at in above]
    for at, module in modules:
        copied = isinstance(module, AuxiliaryTrainingWrapper) and type(module) is not ModulesToSaveWrapper
        if copied or isinstance(module, ChangedModule):
            return at
    if is_train(name):
        return next(at for at, module in modules if isinstance(module, LorettaLayer))
    owner = modules[-1][1]
    if type(owner) in (nn.Linear, nn.LayerNorm):
        return path
    layers = [at for at, module in modules if isinstance(module, BaseTunerLayer)]
    return layers[0] if layers else path


def sites_of(model: nn.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """Each module that uses the tensor with these ``names`` when it is called with rows, and its name in the module.

    Most tensors have one name. The vector bank of VB-LoRA has one in every adapted layer.
    """
    sites = {model.get_submodule(site_of(model, name)): name for name in reversed(names)}
    in_layers = [name for module, name in sites.items() if isinstance(module, BaseTunerLayer)]
    return [(site_of(model, name), name.removeprefix(site_of(model, name) + ".")) for name in in_layers or names[:1]]


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each tensor -> all of its names."""
    found: dict[int, list[str]] = defaultdict(list)
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found[id(tensor)].append(name)
    return {names[0]: names for names in found.values()}


def blocks_of(model: PeftModel, trained: Sequence[str]) -> list[tuple[str, ...]]:
    """The names of trained parameters that lie in one stack: the same parameter of all equal trains."""
    layers: dict[Hashable, list[str]] = defaultdict(list)
    others: list[tuple[str, ...]] = []
    tensors = tensors_of(model)
    by_layer: dict[str, list[str]] = defaultdict(list)
    for name in trained:
        if is_train(name):
            by_layer[site_of(model, name)].append(name)
        else:
            others.append((name,))
    for site, names in by_layer.items():
        layer: Any = model.get_submodule(site)
        placement = layer.placements[ADAPTER]
        key = (type(layer), placement.down, placement.up, layer.working_dtype(), layer.n_pairs[ADAPTER])
        layers[(*key, *(tensors[name].shape for name in names))].append(site)
    blocks = [
        tuple(names) for sites in layers.values() for names in zip(*(by_layer[site] for site in sites), strict=True)
    ]
    return [*blocks, *others]
