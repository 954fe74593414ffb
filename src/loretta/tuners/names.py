"""Which names an adapter may have."""

import os
import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from loretta.errors import InputError

# Names that PEFT and the layers of all methods put around the modules and parameters of a base model
_OURS = (
    "base_model.model",
    "base_layer.weight",
    "base_layer.bias",
    "original_module",
    "modules_to_save",
    "token_adapter.trainable_tokens_delta",
    "down.values",
    "up.values",
    "train.values",
    "start_train.values",
    "dense.cores.values",
    "dense.start.values",
    "_fsdp_wrapped_module",
    "_orig_mod",
)


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Refuse a name that torch does not accept for a module, or that PEFT would confuse with a part of another name.

    PEFT finds the tensors of an adapter by its name, which may stand anywhere in a key: an adapter called ``layers``
    would take all tensors of all other adapters with it when they are saved.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter cannot be called {name!r}: torch takes no such name for a module; choose another")
    if name == "__base__":
        raise InputError(
            "an adapter cannot be called '__base__', which in adapter_names means no adapter; choose another"
        )
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise InputError(
            f"an adapter cannot be called {name!r}: it is saved in a folder of its name, which would lie outside the "
            "folder that one saves to; choose another"
        )
    for key in (*_OURS, *keys_of(model)):
        if name in key.split(".") or name.startswith("loretta_"):
            raise InputError(
                f"an adapter cannot be called {name!r}, which is also a part of the name '{key}': PEFT would mistake "
                f"what belongs to the one for the other; choose another, such as 'my_{name}'"
            )


def check_endings(name: str, modules_to_save: Iterable[str]) -> None:
    """Refuse a name that ends like a module to train whole, which PEFT looks for by the ends of names."""
    for module in modules_to_save:
        if f".{name}".endswith(module):
            raise InputError(
                f"an adapter cannot be called {name!r}, which ends like the module '{module}' that it trains whole: "
                "PEFT would take its trains for that module; choose another name"
            )


def name_in_base(name: str) -> str:
    """The name that a module, or a tensor of it, has in the base model, without the layers that lie around it."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def parts_of_adapters(model: nn.Module) -> tuple[str, ...]:
    """What the names of modules and tensors begin with that belong to an adapter, of any method."""
    return tuple(
        f"{name}.{part}."
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for part in (*module.adapter_layer_names, *module.other_param_names)
    )


def keys_of(model: nn.Module) -> list[str]:
    """Names of all modules, parameters and buffers, but for those that lie below the name of an adapter."""
    adapters = parts_of_adapters(model)
    keys = [name for name, _ in model.named_modules()]
    keys += [name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named]
    return [key for key in keys if key and not key.startswith(adapters)]
