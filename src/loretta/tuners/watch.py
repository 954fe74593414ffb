"""The first calls of a model show which adapters it goes past; see :mod:`loretta.tuners.bypassed`."""

import threading
import warnings
from typing import Any

import torch
from torch import nn

from loretta.tuners.copies import AdapterCopy
from loretta.tuners.layer import LorettaLayer


class Watch:
    """Notes which adapted modules are called in the first training call of a model, and in the first evaluation call.

    It warns once of modules whose weight others read while nobody called them. A module that was neither read nor
    called is passed over: an expert may get no token, a layer may be dropped. In training it also warns of cores that
    somebody has cast to half precision, as TRL does beside a quantised base.
    """

    def __init__(self) -> None:
        self.seen: set[bool] = set()  # whether the model was in training, for each kind of call that was watched
        self.handles: list[Any] = []
        self.read: dict[LorettaLayer, None] = {}
        self.called: set[LorettaLayer] = set()
        self.thread = 0  # whose call is watched

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Watch the next calls of ``model``. Earlier ones, with fewer adapters, do not count."""
        cls.detach(model)
        watch, hooks = cls(), model._forward_pre_hooks
        others = list(hooks)
        model.register_forward_pre_hook(watch.begin)
        # Before the trains are contracted. Where ``prepend`` moves a hook to, torch 2.11 compiles guards that look at
        # another hook: it reads hooks in the order in which they were put there.
        for key in others:
            hooks[key] = hooks.pop(key)
        model.register_forward_hook(watch.end, always_call=True)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Undo :meth:`attach`."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def begin(self, model: nn.Module, args: Any) -> None:
        """Before the model runs."""
        is_replica = getattr(model, "_is_replica", False)  # DataParallel's replicas share the hooks of their layers
        if torch.compiler.is_compiling() or is_replica or model.training in self.seen or self.handles:
            return
        self.read, self.called, self.thread = {}, set(), threading.get_ident()
        for layer in model.modules():
            if isinstance(layer, AdapterCopy | LorettaLayer):
                layer.freeze()  # what transformers' load_adapter makes trainable with the rest
            if isinstance(layer, LorettaLayer):
                layer.on_read = self.note_read
                self.handles.append(layer.register_forward_pre_hook(self.note_call))

    def note_read(self, layer: LorettaLayer) -> None:
        if self.thread == threading.get_ident():
            self.read[layer] = None

    def note_call(self, layer: nn.Module, args: Any) -> None:
        self.called.add(layer)  # type: ignore[arg-type]

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it ran, or failed: then the next call is the first."""
        if torch.compiler.is_compiling() or not self.handles or self.thread != threading.get_ident():
            return
        for handle in self.handles:
            handle.remove()
        names, narrowed = [], []
        for name, layer in model.named_modules():
            if isinstance(layer, LorettaLayer):
                layer.on_read = None
                narrowed += [name] if layer.narrowed() else []
                if layer in self.read and layer not in self.called and _should_add(layer):
                    names.append(name)
                    layer.was_bypassed = True
        self.handles, self.read, self.called = [], {}, set()
        if output is None:
            return
        self.seen.add(model.training)
        if len(self.seen) == 2:
            self.detach(model)
        if model.training and narrowed:
            warnings.warn(
                f"the trained cores of {len(narrowed)} modules (such as '{narrowed[0]}') have been cast to half "
                "precision, which loses most small steps: keep what trains in float32, as it was made, and compute "
                "under autocast (bf16=True of the Trainer)",
                stacklevel=2,
            )
        if names:
            warnings.warn(
                f"the adapters on {len(names)} modules had no effect in this call, for the model read their weights "
                f"without calling them: {', '.join(names)}; leave them out with exclude_modules",
                stacklevel=2,
            )


def _should_add(layer: LorettaLayer) -> bool:
    """Whether an active adapter of the layer adds anything at its calls; a merged one is in the weight already."""
    return not (layer.disable_adapters or layer.merged) and any(name in layer.n_pairs for name in layer.active_adapters)
