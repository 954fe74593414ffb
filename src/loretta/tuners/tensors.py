"""What an adapter's file may hold: finite numbers, under the keys of the adapter."""

from collections.abc import Collection, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.wording import quoted


def check_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], own: Collection[str]) -> None:
    """Refuse tensors that are not finite, and those that would overwrite the base model.

    Beside the trains (``own`` keys) an adapter may bring its copies of modules trained whole, trained biases of the
    base, and embeddings, which PEFT saves where they were resized.

    Raises InputError that names the first key.
    """
    for key, tensor in tensors.items():
        if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the adapter's {quoted(key)} holds NaN or infinity, so the training that wrote it failed or the file "
                "is damaged: take an earlier checkpoint"
            )
    allowed = tuple(f"{name}." for name in _homes(model, adapter_name))
    base = model.state_dict(keep_vars=True).keys() if len(tensors) > len(own) else ()
    for key in tensors.keys() - own:
        # PEFT passes over tensors of modules that this model lacks
        key = key if key in base else key.removeprefix("base_model.model.")
        if key in base and not (key.endswith(".bias") or key.startswith(allowed)):
            raise InputError(
                f"the adapter's file also holds {quoted(key)}, which would overwrite the base model: load adapters "
                "from where you trust, or remove that tensor"
            )


def _homes(model: nn.Module, adapter_name: str) -> list[str]:
    """Names of the modules whose tensors are the adapter's: its parts of wrapped modules, and the embeddings."""
    homes = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            parts = (*module.adapter_layer_names, *module.other_param_names)
            homes += [f"{name}.{part}.{adapter_name}" for part in parts]
            homes += [f"{name}.{part}" for part in parts if "token_adapter" in part]
    embeddings: list[nn.Module] = []
    for find in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings.append(getattr(model, find)())
        except (AttributeError, NotImplementedError, TypeError):  # not every model has words for input or output
            continue
    return homes + [
        name for name, module in model.named_modules() if any(module is each for each in embeddings if each)
    ]
