"""Base weights that no update can be merged into without changing what the model computes."""

from collections import Counter
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule
from loretta.tuners.bypassed import places_by_module
from loretta.tuners.layer import LorettaLayer, is_offloaded
from loretta.tuners.names import name_in_base
from loretta.tuners.placement import is_linear_map
from loretta.tuners.rescaled import TrainedScale
from loretta.tuners.tokens import TokenRows


def check_mergeable_names(merged: Sequence[str], active: Sequence[str], loaded: Collection[str]) -> None:
    """Refuse names that are not loaded, and some of the active adapters without the others, which would fall silent."""
    if unknown := [name for name in merged if name not in loaded]:
        raise InputError(f"cannot merge {unknown}: loaded are {', '.join(loaded)}")
    if silent := [name for name in active if not set(active).isdisjoint(merged) and name not in merged]:
        raise InputError(
            f"cannot merge {list(merged)} alone while {list(active)} are active, for {silent} would stop having an "
            f"effect: merge them all, or first make {list(merged)} the active ones with set_adapter"
        )


def check_mergeable(model: nn.Module, merged: Collection[str]) -> None:
    """Refuse weights that other modules use too, that are computed from parameters, or that do more than multiply.

    An update of a tied output layer would change the input embedding too. An update of a weight that is computed from
    other parameters would be lost at the next call. In a layer that does more than multiply with its weight, an update
    of the weight has not the effect of one beside the layer, nor has it within an adapter that reads the weight.
    Weights on which no ``merged`` adapter acts may be any of these.

    Raises InputError that names the first such module, and ValueError for an adapter that no weight has the effect of.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    places = places_by_module(model)
    _check_rows(model, merged, owners)
    for name, module in model.named_modules():
        if not isinstance(module, AdaptedModule) or set(merged).isdisjoint(module.held):
            continue
        if module.cannot_merge:
            raise ValueError(module.cannot_merge)
        module.check_around()
        base = module.get_base_layer()
        weights: list[Tensor] = list(base.parameters(recurse=False))
        if isinstance(module, LorettaLayer):
            weights = [module._base_weight()]
            _check_layer(name, module, base)
        elif isinstance(module, TrainedScale):
            _check_scale(name_in_base(name), module)
        if any(owners[id(weight)] > 1 for weight in weights):
            raise InputError(
                f"cannot merge into '{name}', whose weight is tied to another module's: keep the adapter unmerged, "
                "or load the base model with tie_word_embeddings=False and a copy of the weight"
            )
        if places[base] > 1:
            raise InputError(
                f"cannot merge into '{name}', a module that the model also has under another name, where the adapter "
                "does not act: keep the adapter unmerged"
            )


def _check_rows(model: nn.Module, merged: Collection[str], owners: Counter[int]) -> None:
    """Refuse rows of tokens of a weight that other modules use too, but for those that PEFT has tied to them."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}
    for name, layer in layers.items():
        alike = [other for other in layers.values() if other.token_indices is layer.token_indices]
        tied = sum(other.base_layer.weight is layer.base_layer.weight for other in alike)
        if layer.held_of(merged) and owners[id(layer.base_layer.weight)] > tied:
            raise InputError(
                f"cannot merge rows of tokens into '{name.removesuffix('.token_adapter')}', whose weight is tied to "
                "another module's: keep the adapter unmerged, or train the same rows of both"
            )


def _check_layer(name: str, layer: LorettaLayer, base: nn.Module) -> None:
    if layer.quantization_backend is not None and not layer.quantization_backend.supports_merge:
        raise InputError(
            f"cannot merge into '{name}', a {type(base).__name__}, whose packed weights are fixed: keep the adapter "
            "loaded, or merge it into the base model before quantisation"
        )
    weight = layer._base_weight()
    if layer.quantization_backend is None and not can_add_up(weight):
        raise InputError(
            f"cannot merge into '{name}', whose weight of {weight.dtype} no update can be added to: keep the adapter "
            "unmerged, or merge it into the base model in floating point"
        )
    if layer.parameter_name not in dict(base.named_parameters(recurse=False)) and weight.is_floating_point():
        raise InputError(
            f"cannot merge into '{name}', whose weight is computed from other parameters: keep the adapter "
            "unmerged, or first make the weight one again (remove_parametrizations, prune.remove, ...)"
        )
    if not is_linear_map(base):
        raise InputError(
            f"cannot merge into '{name}', a {type(base).__name__}, which does more with its weight than multiply: "
            "keep the adapter unmerged"
        )
    if layer.was_bypassed:
        raise InputError(
            f"cannot merge into '{name}', whose weight the model reads without calling it: what the adapter had no "
            "effect on would change; keep it unmerged, or leave the module out with exclude_modules"
        )


def can_add_up(weight: Tensor) -> bool:
    """Whether a weight holds what is added to it: whole numbers would be rounded, and float8 has no sum."""
    return weight.is_complex() or (weight.is_floating_point() and weight.element_size() > 1)


def _check_scale(name: str, scale: TrainedScale) -> None:
    if is_offloaded(scale.base_layer):
        raise InputError(
            f"cannot merge into '{name}', which is scaled and which accelerate has offloaded: merge before the model "
            "is offloaded, or keep the adapter unmerged"
        )
    if not scale.is_plain:
        raise InputError(f"cannot merge scales into the quantised weight of '{name}': keep the adapter loaded")
