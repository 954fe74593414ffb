"""What trained norms, trained scales and layers with trains share, and the order in which layers merge."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from loretta.tuners.contraction import layers_around


def merge_below(layer: Any, safe_merge: bool, adapter_names: Collection[str] | None) -> None:
    """Merge all that a layer of any method wraps, the innermost first: PEFT's own merging passes it over."""
    below = layer.base_layer
    if isinstance(below, BaseTunerLayer):
        merge_below(below, safe_merge, adapter_names)
        asked = below.active_adapters if adapter_names is None else adapter_names
        here = below.held if isinstance(below, AdaptedModule) else below._get_available_adapters()
        if new := [name for name in asked if name in here and name not in below.merged_adapters]:
            below.merge(safe_merge, new)


class AdaptedModule(BaseTunerLayer):
    """What trained norms and layers with trains share: new names of adapters, switching, and mixed batches."""

    path: str  # the name, in the model, of what it wraps
    # copied modules: transformers disables them with the tuner layers, but never enables them
    followers: list[Any]

    @property
    def held(self) -> list[str]:
        """The adapters that have a part here."""
        raise NotImplementedError

    @contextmanager
    def merged_before_others(self) -> Iterator[None]:
        """In it no layer around this one is merged: PEFT merges the outermost first, and a factor is no sum."""
        around = [(layer, [*layer.merged_adapters]) for layer in layers_around(self, self.path)]
        merged = [(layer, names) for layer, names in around if names]
        for layer, _ in merged:
            layer.unmerge()
        try:
            yield
        finally:  # also where a safe merge is refused
            for layer, names in reversed(merged):
                layer.merge(adapter_names=names)
                layer.merged_adapters = names  # also those that it does not have, which fall silent with the others

    def rename_adapter(self, old: str, new: str) -> None:
        """Give one adapter another name; nothing happens when this module does not have it."""
        for part in (*self.adapter_layer_names, *self.other_param_names):
            by_adapter = getattr(self, part)
            if old in by_adapter:
                by_adapter[new] = by_adapter.pop(old)
        self.merged_adapters = [new if name == old else name for name in self.merged_adapters]
        self._active_adapter = [new if name == old else name for name in self.active_adapters]

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        for copied in self.followers:
            copied.enable_adapters(enabled)

    def _check_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
