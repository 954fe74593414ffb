"""Base weights that no update can be merged into without changing what the model computes."""

from collections import Counter

from torch import nn

from loretta.errors import InputError
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.placement import is_linear_map


def check_mergeable(model: nn.Module, layer_cls: type[LorettaLayer]) -> None:
    """Refuse weights that are tied, or computed from others, or that a module does more with than multiply.

    An update of a tied output layer would change the input too, one of a weight that is computed from other parameters
    would be lost at the next call, and one inside a layer that goes on computing is not one beside it.

    Raises InputError that names the first such module.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, module in model.named_modules():
        if not isinstance(module, layer_cls):
            continue
        weight, base = module._base_weight(), module.get_base_layer()
        own = dict(base.named_parameters(recurse=False))
        if module.parameter_name not in own and weight.is_floating_point():
            raise InputError(
                f"cannot merge into '{name}', whose weight is computed from other parameters: keep the adapter "
                "unmerged, or first make the weight one again (remove_parametrizations, prune.remove, ...)"
            )
        if owners[id(weight)] > 1:
            raise InputError(
                f"cannot merge into '{name}', whose weight is tied to another module's: keep the adapter unmerged, "
                "or load the base model with tie_word_embeddings=False and a copy of the weight"
            )
        if not is_linear_map(base):
            raise InputError(
                f"cannot merge into '{name}', a {type(base).__name__}, which does more with its weight than multiply: "
                "keep the adapter unmerged"
            )
