"""Weights and optimizer states that FSDP2 has shared out: whole for a checkpoint, and shared out again from one.

A checkpoint then has one form, whatever the number of processes and whether they share the weights. All functions are
collectives.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from loretta import processes
from loretta.errors import InputError


def share_blocks(trainer: Trainer) -> None:
    """Have Accelerate shard the blocks of the model each for itself. Raises InputError where it shards nothing."""
    plugin, model = getattr(trainer.accelerator.state, "fsdp_plugin", None), trainer.model
    if plugin is None:
        raise InputError(f"fsdp is for accelerators, and the processes run on {trainer.args.device.type}: leave it out")
    assert model is not None
    if plugin.transformer_cls_names_to_wrap is None:
        embedding = model.get_input_embeddings()
        # transformers names BERT's embeddings among the blocks, but Accelerate shards those of words apart
        plugin.transformer_cls_names_to_wrap = sorted(
            {
                type(module).__name__
                for module in model.modules()
                if type(module).__name__ in (model._no_split_modules or ())
                and all(inner is not embedding for inner in module.modules())
            }
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with the parts of all processes."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def whole_weights(model: PeftModel) -> dict[str, Tensor]:
    """``model.state_dict()`` without the weights that are shared out and not saved with the adapter."""
    weights = model.state_dict()
    saved = {_place(tensor) for tensor in get_peft_model_state_dict(model).values()}
    # a part may be empty and lie nowhere, but not in the first process
    names = processes.by_first(
        lambda: [name for name, t in weights.items() if not isinstance(t, DTensor) or _place(t) in saved]
    )
    return {name: whole(weights[name]) for name in names}


def load_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Take the weights of a checkpoint's adapter over, each process its parts."""
    here = get_peft_model_state_dict(model)
    found = load_file(checkpoint / SAFETENSORS_WEIGHTS_NAME)
    set_peft_model_state_dict(model, {name: _shared_as(tensor, here[name]) for name, tensor in found.items()})


def whole_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict()`` as one process alone has it."""
    return {
        **state,
        "state": {
            k: {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
            for k, values in state["state"].items()
        },
    }


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load the whole state of an optimizer: tensors of a parameter's shape are sharded as the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared = {
        k: {
            name: _shared_as(value, parameters[k])
            if isinstance(value, Tensor) and value.shape == parameters[k].shape
            else value
            for name, value in values.items()
        }
        for k, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shared})


def _shared_as(tensor: Tensor, model: Tensor) -> Tensor:
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def part_here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless FSDP shards it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where the part of a tensor in this process lies."""
    return part_here(tensor).data_ptr(), tensor.shape
