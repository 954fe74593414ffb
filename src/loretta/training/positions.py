"""The longest text that a model has learned positions for: behind it transformers ends in an error of sizes."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn

from loretta.errors import InputError
from loretta.training.config import RunConfig
from loretta.training.methods import virtual_tokens

_NAMES = {"position_embeddings", "position_embedding", "wpe", "embed_positions"}


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model has learned positions for; None where positions are computed (rotary, relative)."""
    if getattr(getattr(model, "config", None), "position_embedding_type", "absolute") != "absolute":
        return None
    return min(
        (
            module.num_embeddings - _unused(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and not _NAMES.isdisjoint(name.split("."))
        ),
        default=None,
    )


def _unused(table: Any) -> int:
    """Rows before the one of the first token: of RoBERTa and MPNet up to the padding, of OPT and BART two."""
    if hasattr(table, "offset"):
        return int(table.offset)
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def check_positions(config: RunConfig, model: nn.Module, encoded: Mapping[str, Any]) -> None:
    """Raise InputError where a row of the data is longer than the model has positions for."""
    positions = positions_of(model)
    if positions is None:
        return
    room = positions - virtual_tokens(config.method, config.method_args)
    if config.max_length <= room:
        return
    rows = [
        data["input_ids"] for data in encoded.values() if isinstance(data, Dataset) and "input_ids" in data.features
    ]
    # those of TRL's trainers are cut later
    longest = max((len(ids) for column in rows for ids in column), default=config.max_length)
    if longest > room:
        raise InputError(
            f"max_length={config.max_length}: '{config.model}' has positions for {room:,} tokens, and the longest text "
            f"has {longest:,}: give --max-length {room} or less"
        )
