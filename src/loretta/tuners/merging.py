"""Merging adapters into the base of a model, and what follows: norms, scales, heads and other methods' layers."""

import copy
import warnings
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule, merge_below, put_back
from loretta.tuners.biases import BaseBiases
from loretta.tuners.contraction import Contraction, note_change
from loretta.tuners.copies import AdapterCopy
from loretta.tuners.mergeable import check_mergeable, check_mergeable_names
from loretta.tuners.tokens import TokenRows
from loretta.tuners.watch import Watch

Layer = TypeVar("Layer", bound=nn.Module)


def _merge_layer(layer: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
    merge_below(layer, safe_merge, adapter_names)
    layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)


def _twin(layer: Any) -> Any:
    """A layer of any method with what it wraps, in states of their own: what is merged there changes nothing else."""
    twin = part = _apart(layer)
    while part is not twin.get_base_layer():
        part.home = (SimpleNamespace(outermost=twin), "outermost")  # where ours look for the layers around them
        part = part.base_layer
    return twin


def _apart(module: Any) -> Any:
    twin = copy.copy(module)
    # of bitsandbytes' int8 layers the state is an object
    own = {key: copy.copy(v) for key, v in vars(module).items() if type(v) in (dict, list) or key == "state"}
    vars(twin).update(own)
    if hasattr(module, "base_layer"):  # a layer's trains stay its own: merging only reads them
        twin.base_layer = _apart(module.base_layer)
    else:
        twin._parameters = copy.deepcopy(module._parameters)
        twin._modules = {name: child and _apart(child) for name, child in module._modules.items()}
    return twin


class MergingTuner(BaseTuner):
    """Base of the tuners, as far as they merge."""

    def _layers(self, kind: type[Layer]) -> list[Layer]:
        return [module for module in self.model.modules() if isinstance(module, kind)]

    def _check_merge_allowed(self, merged: Collection[str] = ()) -> None:
        """As PEFT's, which gives no names. Of the adapters ``merged`` it refuses where PEFT warns or does not look."""
        super()._check_merge_allowed()
        check_mergeable(self.model, merged)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's. The heads of the merged adapters compute until these are unmerged.

        Raises InputError for a name that is not loaded, while the adapters are disabled, and when only some of the
        active adapters are named: the others would lose their effect.
        """
        merged = self._merged(adapter_names or self._active())
        check_mergeable_names(merged, self._active(), self.peft_config)
        if self._is_disabled():
            raise InputError("cannot merge while the adapters are disabled: call enable_adapter_layers() first")
        self._check_merge_allowed(merged)
        self._merge(adapter_names, safe_merge)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Merge in all layers of any method, or in none where a safe merge is refused in one of them."""
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [(layer, [*layer.merged_adapters]) for layer in layers]
        within = {layer.base_layer for layer in layers}
        # PEFT begins with the outermost: a factor within would act on its update too
        outermost = [layer for layer in layers if layer not in within]
        with warnings.catch_warnings():
            if safe_merge:  # first a twin of each layer: what is subtracted again has been rounded
                for layer in outermost:
                    with onload_layer(layer):
                        _merge_layer(_twin(layer), True, adapter_names)
                warnings.simplefilter("ignore")  # all has been said
            try:
                for layer in outermost:
                    with onload_layer(layer):
                        _merge_layer(layer, False, adapter_names)
            except ValueError:
                put_back(before)
                raise
        self._follow_merge()

    def unmerge_adapter(self) -> None:
        """As PEFT's."""
        super().unmerge_adapter()
        self._follow_merge()

    def _active(self) -> list[str]:
        """The active adapters of the layers, which another tuner on the model may have switched after this one."""
        return next((layer.active_adapters for layer in self._layers(AdaptedModule)), self.active_adapters)

    def _merged(self, more: Iterable[str] = ()) -> list[str]:
        """The merged adapters, and ``more``."""
        merged = (name for layer in self._layers(AdaptedModule) for name in layer.merged_adapters)
        return list(dict.fromkeys([*merged, *more]))

    def _follow_merge(self) -> None:
        """Let no active adapter compute beside merged ones, and have copied modules be those of the merged ones."""
        merged = self._merged()
        for layer in [*self._layers(AdaptedModule), *self._layers(TokenRows)]:
            layer.merged_adapters += [name for name in merged if name not in layer.merged_adapters]
        note_change(activity_alone=True)
        for copied in self._layers(AdapterCopy):
            copied.follow_merge(merged)

    def _biases(self) -> BaseBiases:
        return next((layer.biases for layer in self._layers(AdaptedModule) if layer.biases is not None), BaseBiases())

    def _is_disabled(self) -> bool:
        return any(layer.disable_adapters for layer in self._layers(AdaptedModule))

    def disable_adapter_layers(self) -> None:
        """As PEFT's."""
        if self._merged():
            self.unmerge_adapter()  # at their next call the layers would unmerge, but not the heads
        self._biases().acting = ()  # of these PEFT warns
        super().disable_adapter_layers()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """As PEFT's. What is merged already stays in the weights, together with its norms and head."""
        merged = self._merged(adapter_names or self._active())
        self._check_merge_allowed(merged)
        if safe_merge:  # before anything is unloaded
            self._merge(merged, safe_merge)
            return self.unload()
        self._say_that_biases_stay(merged)
        names = merged if self._merged() else adapter_names
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, AdaptedModule):  # perhaps around ours
                merge_below(module, False, names)
        return self._bare(super().merge_and_unload(progressbar, adapter_names=names))

    def unload(self) -> Any:
        """As PEFT's, with what is merged already in the weights."""
        merged = self._merged()
        self._say_that_biases_stay(merged)
        if not merged:
            return self._bare(super().unload())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")  # that is what is asked here
            return self._bare(super().merge_and_unload(adapter_names=merged))

    def _say_that_biases_stay(self, acting: Collection[str]) -> None:
        biases = self._biases()
        biases.say([name for name in biases.options if name not in acting])

    def _bare(self, unloaded: Any) -> Any:
        Contraction.detach(self.model)
        Watch.detach(self.model)
        return unloaded
