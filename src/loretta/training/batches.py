"""Batches for recorded steps: of few shapes, and quick on their way from worker processes."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from loretta.tasks.prompted.encoding import IGNORED

Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]

# name of a tensor -> the number that pads it; input_ids take the padding token
FILLS = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "special_tokens_mask": 1, "labels": IGNORED}


def bucket(length: int, *, least: int = 8, per_octave: int = 4) -> int:
    """The length to which a batch of ``length`` tokens is padded: 8, 16, ..., 64, then four lengths an octave.

    ``length`` or at most 25 % more above 32 tokens, and 28 different lengths up to 2048. ``least`` is the shortest
    length, ``per_octave`` a power of 2.
    """
    step = max(least, 1 << max(0, (length - 1).bit_length() - per_octave.bit_length()))
    return -(-length // step) * step


@dataclass(frozen=True, slots=True)
class PadToBucket:
    """A collator whose batches have the length of a :func:`bucket`, padded on the right.

    That is exact where an attention mask hides the padding, so a batch without one stays as it is, as does one with a
    tensor of that length whose padding is not known.
    """

    collator: Callable[[list[Any]], Any]
    padding_token: int
    longest: int | None = None  # of which the model is capable

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return batch
        length, target = mask.shape[1], bucket(mask.shape[1])
        if self.longest is not None and target > self.longest:
            return batch
        fills = {**FILLS, "input_ids": self.padding_token}
        along = {
            name: value
            for name, value in batch.items()
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length
        }
        if not all(
            name in fills and value.dim() == 2 and not value.is_floating_point() for name, value in along.items()
        ):
            return batch
        for name, value in along.items():
            batch[name] = nn.functional.pad(value, (0, target - length), value=fills[name])
        return batch


@dataclass(frozen=True, slots=True)
class AsArrays:
    """A collator for worker processes, whose integers leave them as arrays.

    A tensor is handed from process to process as an open file, over a socket of its own. For batches of token ids that
    takes longer than a replay, and most of it in the process that trains; an array is a few bytes in a pipe.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collator(examples)
        if isinstance(batch, MutableMapping):
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32, torch.bool):
                    batch[name] = value.numpy()
        return batch


def as_tensors(batch: Any, *, pin: bool) -> Any:
    """A batch of :class:`AsArrays` with tensors again; with ``pin`` in memory that a GPU reads by itself."""
    if isinstance(batch, MutableMapping):
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                tensor = torch.from_numpy(value)
                batch[name] = tensor.pin_memory() if pin else tensor
    return batch


def shapes_of(inputs: Mapping[str, Any]) -> Shapes | None:
    """What batches must agree in to share a graph; None where not all of a batch is tensors."""
    if not all(isinstance(value, Tensor) for value in inputs.values()):
        return None
    return tuple((name, value.shape, value.dtype) for name, value in inputs.items())


def stop_workers(trainer: Trainer) -> None:
    """End the persistent worker processes of a trainer's loaders: the garbage collector waits 5 s for each of them."""
    evaluated = getattr(trainer, "_eval_dataloaders", {}).values()
    for loader in (getattr(trainer.callback_handler, "train_dataloader", None), *evaluated):
        stop = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
        if stop is not None:
            stop()
