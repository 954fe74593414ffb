"""The label names of adapters: a classifier answers with those of the adapter that is active."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from loretta.errors import InputError
from loretta.tuners.config import LorettaConfig
from loretta.tuners.copies import AdapterCopy
from loretta.tuners.heads import is_fresh_layer
from loretta.tuners.task_types import is_final, is_final_layer
from loretta.wording import quoted


def both_ways(names: Sequence[str]) -> dict[str, Any]:
    """The names of the classes as the config of a model holds them."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}


class Labels:
    """The names of each adapter's classes. The config of the model, which pipelines read, holds one set at a time."""

    def __init__(self, config: Any) -> None:
        self.config, self.own = config, dict(config.id2label)
        self.by_adapter: dict[str, Sequence[str]] = {}
        self._shown: dict[int, str] | None = None

    def show(self, adapter_name: str | None) -> None:
        """Put one adapter's names into the config, or the model's own where it has none."""
        if self._shown is None:
            self.own = dict(self.config.id2label)  # the user may have changed them
        names = self.by_adapter.get(adapter_name or "")
        self._shown = dict(enumerate(names)) if names else None
        self.config.id2label = self._shown or self.own
        self.config.label2id = {name: k for k, name in self.config.id2label.items()}


def _names_and_labels(model: nn.Module, config: LorettaConfig) -> tuple[list[str], dict[int, str]] | None:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if config.label_names and labels and config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        return config.label_names, labels
    return None


def fit_final_layer(model: nn.Module, config: LorettaConfig) -> None:
    """Give a final layer that transformers has just made as many rows as an adapter has label names.

    Raises InputError where the layer holds something already, and has another number of rows.
    """
    found = _names_and_labels(model, config)
    if found is None or len(found[0]) == len(found[1]):
        return
    names, labels = found
    for path, module in list(model.named_modules()):
        if not (is_final_layer(f"{path}.weight") and isinstance(module, nn.Linear)):
            continue
        if module.out_features != len(labels):
            continue
        if "original_module" in path or "modules_to_save" in path or not is_fresh_layer(module):
            raise InputError(
                f"label_names={quoted(names)} are {len(names)} classes, and '{path}' of this model answers with "
                f"{len(labels)}: load the model with num_labels={len(names)} and ignore_mismatched_sizes=True, or give "
                f"{len(labels)} names"
            )
        wider = nn.Linear(module.in_features, len(names), module.bias is not None)
        model.set_submodule(path, wider.to(module.weight.device, module.weight.dtype))
    setattr(model, "num_labels", len(names))  # noqa: B010
    model.config.update(both_ways(names))  # type: ignore[union-attr, operator]


def note_labels(model: nn.Module, config: LorettaConfig, adapter_name: str) -> None:
    """Have the copies of the final layer show an adapter's label names while it is active."""
    found = _names_and_labels(model, config)
    copies = [
        module
        for name, module in model.named_modules()
        if isinstance(module, AdapterCopy) and is_final(name, config.task_type)
    ]
    if not copies:
        return
    if found is not None:
        labels = copies[0].labels = copies[0].labels or Labels(model.config)
        labels.by_adapter[adapter_name] = found[0]
    copies[0].show_labels()
