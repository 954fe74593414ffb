"""Checks of an adapter's file: it may hold finite numbers only, under the keys of the adapter only."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoConfig

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule, chain, is_finite
from loretta.tuners.layer import is_offloaded
from loretta.tuners.rescaled import TrainedScale
from loretta.tuners.task_types import base_class, named_base
from loretta.wording import quoted

PREFIX = "base_model.model."  # begins the keys of the files that PeftModel writes
OF_BASE = (".base_weight", ".base_bias")  # what a layer of the head with a train holds of the base


def check_takes_values(model: nn.Module, adapter_name: str) -> None:
    """Refuse to give other values to an adapter that is merged, or whose values accelerate has offloaded.

    Unmerging would subtract them from the base weights; what is not here would take none, without a word.
    """
    if name := next((n for n, m in model.named_modules() if adapter_name in n.split(".") and is_offloaded(m)), None):
        raise InputError(
            f"cannot load other values into the adapter {adapter_name!r}, for accelerate has offloaded '{name}': load "
            "them before the model is offloaded"
        )
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise InputError(
            f"cannot load other values into the adapter {adapter_name!r} while it is merged: call unmerge_adapter() "
            "first"
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], whose: str) -> None:
    """Raise InputError that names the first of an adapter's tensors with NaN or infinity; ``whose`` are they?"""
    for key, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not is_finite(tensor if tensor.element_size() > 1 else tensor.float()):
            raise InputError(
                f"{whose} holds NaN or infinity in {key[:200]!r}, so the training that wrote it failed or the file is "
                "damaged: take an earlier checkpoint"
            )


def check_own(config: PeftConfig, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError where an adapter's file has its ``own`` tensors in other sizes than here, or lacks some."""
    base = named_base(config)
    for key, tensor in own.items():
        if key in tensors and tensors[key].shape != tensor.shape:
            raise InputError(
                f"this adapter was trained for another base model: '{key}' needs {tuple(tensor.shape)} here and the "
                f"file holds {tuple(tensors[key].shape)}; load it with '{base}'"
            )
    kind = base_class(config.to_dict())  # of a model without its head all names are others
    if lacking := [key for key in own if key not in tensors]:
        raise InputError(
            f"the adapter's file lacks {_some(lacking)} of the adapter's {len(own)}: it and the config beside it "
            f"are not of one adapter, or this is not its base model, '{base}'{f' as {kind}' if kind else ''}"
        )


def _some(names: Sequence[str]) -> str:
    """How many names there are, and the first of them."""
    tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{tensors} ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})"


def check_tensors(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], own: Collection[str], *, resized: bool
) -> None:
    """Refuse tensors that are not finite, and those that would overwrite the base model.

    Beside the trains (``own`` keys) an adapter may bring its copies of modules trained whole, trained biases of the
    base, and embeddings, which PEFT saves where they were resized: rows beyond those of the checkpoint may differ.
    With ``resized`` copies may have another size here: PEFT leaves them as they are.

    Raises InputError that names the first key.
    """
    check_finite(tensors.items(), "the adapter's file")
    allowed = tuple(f"{name}." for name in _homes(model, adapter_name))
    base = model.state_dict() if len(tensors) > len(own) else {}
    resizable = _embeddings(model) if base else ()
    for given in sorted(tensors.keys() - own):
        of_a_head = ".cores." in given and not any(n.startswith(allowed) for n in (given, given.removeprefix(PREFIX)))
        if of_a_head or any(part.startswith("loretta_") for part in given.split(".")):
            raise InputError(
                f"the adapter's file also holds {quoted(given)}, for which the adapter {adapter_name!r} has no place: "
                "it was made with other options; load it under a name that is free, with the config beside it"
            )
        # PEFT passes over tensors of modules that this model lacks
        key = given if given in base else given.removeprefix(PREFIX)
        if key in base and key.startswith(allowed) and base[key].shape != tensors[given].shape and not resized:
            name = key.removeprefix(PREFIX).replace(f".modules_to_save.{adapter_name}.", ".")
            raise InputError(_of_another_size(name, tensors[given].shape, base[key].shape))
        if key not in base or key.endswith(".bias") or key.startswith(allowed):
            continue
        if not (key.startswith(resizable) and _keeps_rows(base[key], tensors[given], _rows_of_checkpoint(model))):
            raise InputError(
                f"the adapter's file also holds {quoted(key)}, which would overwrite the base model: load adapters "
                "from where you trust, or remove that tensor"
            )


def _of_another_size(name: str, given: torch.Size, here: torch.Size) -> str:
    """What is wrong with a copied module, in most cases the last layer of a head, which has a row for each class."""
    rows = given[1:] == here[1:]
    mend = f"with num_labels={given[0]}, if these are classes" if rows else "as it was when the adapter was trained"
    return (
        f"the adapter's file holds {quoted(name)} of the size {tuple(given)}, and this model has {tuple(here)} there: "
        f"load the model {mend}"
    )


def check_whole(model: nn.Module, adapter_name: str, loaded: Any, source: Any) -> None:
    """Refuse what transformers has loaded as an adapter of a model, where it ``loaded`` less or had more than that.

    ``loaded`` is None where tensors had other sizes, which its report names. Raises InputError that names the first.
    """
    if loaded is None:
        raise InputError(
            f"tensors of the adapter {str(source or adapter_name)!r} have other sizes on this model, as the report "
            "above says: load the model that it was trained on, with num_labels for as many classes as it has"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # tied ones lie in the file once; a layer of the head that came with the base lies in no file of an adapter
    held = {id(parameter) for key, parameter in parameters.items() if key not in loaded.missing_keys}
    lacking = [
        key
        for key in sorted(loaded.missing_keys)
        if f".{adapter_name}." in key and not key.endswith(OF_BASE) and id(parameters.get(key)) not in held
    ]
    beyond = [key for key in sorted(loaded.unexpected_keys) if "loretta_" in key]  # others reach no train
    if lacking or beyond:
        what = f"lacks {_some(lacking)}" if lacking else f"also holds {_some(beyond)}"
        raise InputError(
            f"the file of the adapter {str(source or adapter_name)!r} {what}: it and the config beside it are not of "
            "one adapter, or another method's layer lies there already, where PeftModel.from_pretrained loads it"
        )
    check_finite(
        ((key, tensor) for key, tensor in model.state_dict().items() if f".{adapter_name}." in key),
        "the adapter's file",
    )


def names_alone(model: nn.Module, prefix: str, adapter_name: str) -> dict[str, str]:
    """How the names of an adapter's parts begin here -> how they begin on a model without other methods' layers.

    An adapter of the method with this ``prefix`` is saved and loaded under the latter.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found = {}
    for name, module in layers.items():
        if name.endswith(".base_layer") and name.removesuffix(".base_layer") in layers:
            continue  # not the outermost
        own = 0
        for depth, part in enumerate(chain(module)):
            if isinstance(part, AdaptedModule) and adapter_name in part.held:
                alone = max(own, isinstance(part, TrainedScale))  # a scale lies within a layer of the adapter's method
                if alone != depth:
                    found[f"{name}{depth * '.base_layer'}.{prefix}"] = f"{name}{alone * '.base_layer'}.{prefix}"
                own += 1
    return found


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors. Keys that begin with one of ``names``, perhaps after PEFT's prefix, begin with its new name."""
    found = {}
    for key, tensor in tensors.items():
        start = PREFIX if key.startswith(PREFIX) and not any(name.startswith(PREFIX) for name in names) else ""
        rest = key.removeprefix(start)
        name = next((name for name in names if rest.startswith(name)), "")
        found[start + names.get(name, "") + rest.removeprefix(name)] = tensor
    return found


def _homes(model: nn.Module, adapter_name: str) -> list[str]:
    """Names of the modules whose tensors are the adapter's: its parts of wrapped modules."""
    homes = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            parts = (*module.adapter_layer_names, *module.other_param_names)
            homes += [f"{name}.{part}.{adapter_name}" for part in parts]
            homes += [f"{name}.{part}" for part in parts if "token_adapter" in part]
    return homes


def _embeddings(model: nn.Module) -> tuple[str, ...]:
    """What the names of tensors begin with that grow with the vocabulary."""
    found: list[nn.Module] = []
    for find in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, find)())
        except (AttributeError, NotImplementedError, TypeError):  # not every model has words for input or output
            continue
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is each for each in found if each))


def _keeps_rows(now: Tensor, given: Tensor, rows: int | None) -> bool:
    """Whether a tensor changes none of the first ``rows``, those of the checkpoint; None: none at all."""
    if now.is_meta or now.shape != given.shape:  # nothing to overwrite; PEFT refuses another shape
        return True
    return torch.equal(now[:rows], given[:rows].to(now))


def _rows_of_checkpoint(model: nn.Module) -> int | None:
    """The size of the vocabulary that the base model was loaded with; None where it was not loaded from a file."""
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not name:
        return None
    try:
        stored = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return int(stored.get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
