"""What trained norms, trained scales and layers with trains share, and the order in which layers merge."""

import inspect
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations import PeftAdapterMixin

from loretta.errors import InputError

# PEFT's layers whose effect depends on the base's weight (as DoRA's), and not on what the layer within computes
_READ_THE_WEIGHT = {"GloraLayer", "HiraLayer", "HRALayer", "PeanutLayer", "SupertuningLayer"}


def chain(module: Any) -> Iterator[Any]:
    """The layers of any method that lie around a module of the base, from the outermost on: ``module`` itself first."""
    while isinstance(module, BaseTunerLayer):
        yield module
        module = getattr(module, "base_layer", None)


def base_of(module: nn.Module) -> nn.Module:
    """The base's own module below all layers around it; the module itself where there are none."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def merge_below(layer: Any, safe_merge: bool, adapter_names: Collection[str] | None) -> None:
    """Merge all that a layer of any method wraps, the innermost first: PEFT's own merging passes it over."""
    below = layer.base_layer
    if isinstance(below, BaseTunerLayer):
        merge_below(below, safe_merge, adapter_names)
        asked = below.active_adapters if adapter_names is None else adapter_names
        here = below.held if isinstance(below, AdaptedModule) else below._get_available_adapters()
        if new := [name for name in asked if name in here and name not in below.merged_adapters]:
            below.merge(safe_merge, new)


def _reads_the_weight(layer: Any, adapter_name: str) -> bool:
    if isinstance(layer, LoraLayer):
        return layer.use_dora.get(adapter_name, False)
    reads = any(cls.__name__ in _READ_THE_WEIGHT for cls in type(layer).__mro__)
    return reads and adapter_name in layer._get_available_adapters()


def put_back(before: Sequence[tuple[Any, list[str]]]) -> None:
    """Bring layers, the outermost first, back to the adapters that each of them had merged ``before``."""
    changed = [(layer, names) for layer, names in before if layer.merged_adapters != names]
    for layer, _ in changed:
        if layer.merged:
            layer.unmerge()
    for layer, names in reversed(changed):
        if names:
            layer.merge(adapter_names=names)
            layer.merged_adapters = names  # also those that it does not have, which fall silent with the others


def settle(model: nn.Module, adapters: Iterable[str], followers: list[Any], biases: Any) -> None:
    """Tell every layer of ours its place in the model, all adapters, the copied modules and the trained biases."""
    for holder in model.modules():
        for name, child in [] if isinstance(holder, BaseTunerLayer) else holder.named_children():
            for layer in chain(child):
                if hasattr(layer, "known"):  # also rows of tokens, whose layer is PEFT's
                    layer.home, layer.followers, layer.biases = (holder, name), followers, biases
                    layer.known.clear()
                    layer.known.update(dict.fromkeys(adapters))


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. ``isfinite`` makes several tensors of their size, in ten times as long."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.detach().aminmax())


def transformers_loads() -> bool:
    """Whether transformers' ``load_adapter`` is loading, which finds tensors by the names that they have alone."""
    code = inspect.unwrap(PeftAdapterMixin.load_adapter).__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_stack(None))


def rename_in(layer: Any, old: str, new: str) -> None:
    """Give one adapter of a layer, of any method, another name."""
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        if old in (by_adapter := getattr(layer, part)):
            by_adapter[new] = by_adapter.pop(old)
    layer.merged_adapters = [new if name == old else name for name in layer.merged_adapters]
    layer._active_adapter = [new if name == old else name for name in layer.active_adapters]


class AdaptedModule(BaseTunerLayer, nn.Module):
    """What trained norms and layers with trains share: new names of adapters, switching, and mixed batches."""

    # the module that holds the outermost layer around this one, and its name there; torch registers no tuple as a part
    home: tuple[nn.Module, str] | None = None
    # all adapters of the model: where the active one is deleted, PEFT takes the first of these, the same in each layer
    known: dict[str, None]
    # copied modules: transformers disables them with the tuner layers, but never enables them
    followers: Sequence[Any] = ()
    biases: Any = None  # the BaseBiases of the model, which act and train with the layers
    cast_input_dtype_enabled = True  # PEFT's disable_input_dtype_casting sets it: nothing here casts its input
    cannot_merge = ""  # why no weight has the effect of what an adapter has here

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.known = {}
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.is_mixed = False  # whether some thread passes this layer the adapters of the rows of a batch
        self.merged_adapters: list[str] = []

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's. A bias that another method's file has for what it wraps lies below this module."""
        here, below = f"{prefix}bias", f"{prefix}base_layer.bias"
        if here in state_dict and below not in state_dict:
            state_dict[below] = state_dict.pop(here)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def held(self) -> list[str]:
        """The adapters that have a part here."""
        raise NotImplementedError

    def layers_around(self) -> list[Any]:
        """The layers of any method that wrap this one, the outermost first; PEFT tells a layer of none that comes."""
        found = [*chain(getattr(*self.home, None))] if self.home is not None else []
        return found[: found.index(self)] if self in found else []

    def check_around(self) -> None:
        """Refuse to merge below an adapter that acts and reads the base's weight: it would have another effect then.

        Raises InputError that names it.
        """
        for layer in self.layers_around():
            acting = dict.fromkeys([*([] if layer.disable_adapters else layer.active_adapters), *layer.merged_adapters])
            if found := next((name for name in acting if _reads_the_weight(layer, name)), None):
                raise InputError(
                    f"cannot merge what lies within the adapter {found!r}, which acts and computes with the base's "
                    f"own weight, as DoRA does: keep both unmerged or have {found!r} not act (set_adapter of its model)"
                )

    @contextmanager
    def merged_before_others(self) -> Iterator[None]:
        """In it no layer around this one is merged: PEFT merges the outermost first, and a factor is no sum."""
        around = [(layer, [*layer.merged_adapters]) for layer in self.layers_around()]
        put_back([(layer, []) for layer, _ in around])
        try:
            yield
        except InputError:  # they are not to be merged either: PEFT has just done so
            around.clear()
            raise
        finally:  # also where a safe merge is refused
            put_back(around)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give one adapter another name; nothing happens when this module does not have it."""
        rename_in(self, old, new)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.biases is not None:
            self.biases.follow(self.active_adapters, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        for copied in self.followers:
            copied.enable_adapters(enabled)
        if self.biases is not None:
            self.biases.leave(self.active_adapters if enabled else ())

    def _take_names(self, kwargs: dict[str, Any]) -> list[str] | None:
        """The adapters of the rows, where they are passed; what is compiled for other batches is not for such a one.

        It asks for ``is_mixed`` because Dynamo does not look for hooks that were not there when it compiled.
        """
        return kwargs.pop("adapter_names", None) if kwargs or self.is_mixed else None

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
