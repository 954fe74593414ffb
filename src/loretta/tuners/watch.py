"""The first calls of a model show which adapters it bypasses; see :mod:`loretta.tuners.bypassed`."""

import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from loretta.layers.fused import HALF
from loretta.tuners.calls import remove_hooks
from loretta.tuners.copies import AdapterCopy, shares_weights
from loretta.tuners.joint import look_up
from loretta.tuners.layer import LorettaLayer, is_offloaded


class Watch:
    """Notes which adapted modules are called in the first training call of a model, and in the first evaluation call.

    It warns once of modules whose weight others read while nobody called them. A module that was neither read nor
    called is passed over: an expert may get no token, a layer may be dropped. In training it also warns of modules that
    were called and on whose output nothing depends, as one that picks tokens by their rank; of parameters that
    accelerate has offloaded; of cores that somebody has cast to half precision, as TRL does beside a quantised base; of
    a base that writes to its own buffers; and of copied modules that were not called, where others hold the weight.
    """

    def __init__(self) -> None:
        self.seen: set[bool] = set()  # whether the model was in training, for each kind of call that was watched
        self.handles: list[Any] = []
        self.read: dict[LorettaLayer, None] = {}
        self.called: dict[LorettaLayer, list[set[Any]]] = {}  # autograd's nodes of the output of each call
        self.buffers: dict[str, tuple[Tensor, int]] = {}
        self.used: set[nn.Module] = set()  # copied modules that were called
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
        remove_hooks(model, cls)

    def begin(self, model: nn.Module, args: Any) -> None:
        """Before the model runs."""
        is_replica = getattr(model, "_is_replica", False)  # DataParallel's replicas share the hooks of their layers
        if torch.compiler.is_compiling() or is_replica or model.training in self.seen or self.handles:
            return
        self.read, self.called, self.used, self.thread = {}, {}, set(), threading.get_ident()
        self.buffers = _buffers_of_base(model) if model.training else {}
        for layer in model.modules():
            if isinstance(layer, AdapterCopy | LorettaLayer):
                layer.freeze()  # what transformers' load_adapter makes trainable with the rest
            if isinstance(layer, AdapterCopy):
                self.handles.append(layer.register_forward_hook(self.note_use))
            if isinstance(layer, LorettaLayer):
                layer.on_read = self.note_read
                self.handles.append(layer.register_forward_hook(self.note_call))

    def _watches(self) -> bool:
        # of a compiled block nothing is noted, and Dynamo could not trace the question for the thread
        return not torch.compiler.is_compiling() and self.thread == threading.get_ident()

    def note_read(self, layer: LorettaLayer) -> None:
        if self._watches():
            self.read[layer] = None

    def note_call(self, layer: Any, args: Any, output: Any) -> None:
        if self._watches():
            # what is written to a view in place goes to its base, past the node of the view
            tensors = [output, output._base] if isinstance(output, Tensor) else []
            nodes = {each.grad_fn for each in tensors if each is not None and each.grad_fn is not None}
            self.called.setdefault(layer, []).append(nodes)

    def note_use(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._watches():
            self.used.add(layer)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it ran, or failed: then the next call is the first."""
        if torch.compiler.is_compiling() or not self.handles or self.thread != threading.get_ident():
            return
        for handle in self.handles:
            handle.remove()
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LorettaLayer)}
        for layer in layers.values():
            layer.on_read = None
        sentences = [] if output is None else list(self._sentences(model, layers, output))
        self.handles, self.read, self.called, self.buffers = [], {}, {}, {}
        if output is None:
            return
        self.seen.add(model.training)
        if len(self.seen) == 2:
            self.detach(model)
        for sentence in sentences:
            warnings.warn(sentence, stacklevel=2)

    def _sentences(self, model: nn.Module, layers: Mapping[str, LorettaLayer], output: Any) -> Iterator[str]:
        working = {name: layer for name, layer in layers.items() if _should_add(layer)}
        if names := [name for name, layer in working.items() if layer in self.read and layer not in self.called]:
            for name in names:
                layers[name].was_bypassed = True
            yield (
                f"the adapters on {len(names)} modules had no effect in this call, for the model read their weights "
                f"without calling them: {', '.join(names)}; leave them out with exclude_modules"
            )
        if not model.training:
            return
        offloaded = {name: module for name, module in model.named_modules() if is_offloaded(module)}
        away = [name for name, module in offloaded.items() if any(p.requires_grad for p in module.parameters(False))]
        if away:
            yield (
                f"what trains of {len(away)} modules (such as '{away[0]}') gets no gradient, for accelerate has "
                "offloaded it: put the adapter on the model after it is offloaded"
            )
        reached = _reached(output)
        lost = _without_effect(reached, self.called)
        if names := [name for name, layer in working.items() if layer in lost]:
            mend = "leave them out with exclude_modules"
            if any(not any(self.called[layers[name]]) for name in names):  # they had no graph
                mend = (
                    "call enable_input_require_grads() if the model computes its layers again in the backward pass, as "
                    f"Reformer does, or else {mend}"
                )
            yield (
                f"the adapters on {len(names)} modules get no gradient, for nothing that this call returned depends on "
                f"what these modules returned: {', '.join(names)}; {mend}"
            )
        if names := [name for name, layer in layers.items() if layer.narrowed()]:
            yield (
                f"the trained cores of {len(names)} modules (such as '{names[0]}') have been cast to half precision, "
                "which loses most small steps: keep what trains in float32, as it was made, and compute under autocast "
                "(bf16=True of the Trainer)"
            )
        leaves = {id(node.variable) for node in reached if hasattr(node, "variable")}
        for name, copied in model.named_modules():
            if not isinstance(copied, AdapterCopy) or copied in self.used or not shares_weights(model, name):
                continue
            trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
            if trained and not any(id(parameter) in leaves for parameter in trained):
                yield (
                    f"nothing of '{name}' trains: this call did not use it, but other modules that have the same "
                    "weight; name those in modules_to_save"
                )
        half = [name for name, parameter in model.named_parameters() if _trains_in_half(name, parameter)]
        if half and not any(layer.narrow for layer in layers.values()):
            yield (
                f"{len(half)} parameters outside of the trains (such as '{half[0]}') train in half precision, which "
                "loses most small steps: load the base model in float32, and compute under autocast (bf16=True of the "
                "Trainer)"
            )
        now = _buffers_of_base(model)
        kept = {name: before for name, before in self.buffers.items() if name in now}
        names = [n for n, (before, count) in kept.items() if now[n][0] is not before or now[n][1] != count]
        if modules := sorted({name.rpartition(".")[0] for name in names}):
            yield (
                f"{len(modules)} modules of the base model (such as '{modules[0]}') write to their own buffers in "
                "training, as BatchNorm does, and no adapter is saved with these, so a loaded one would compute "
                "something else: name the modules in modules_to_save, or keep them in evaluation mode"
            )


def _trains_in_half(name: str, parameter: Tensor) -> bool:
    """Whether a parameter that trains has half precision. Cores that somebody has cast are told by themselves."""
    is_half = parameter.requires_grad and parameter.dtype in HALF
    return is_half and not any(part.startswith("loretta_") for part in name.split("."))


def _should_add(layer: LorettaLayer) -> bool:
    """Whether an active adapter of the layer adds anything at its calls; a merged one is in the weight already."""
    return not (layer.disable_adapters or layer.merged) and any(name in layer.n_pairs for name in layer.active_adapters)


def _reached(output: Any) -> set[Any]:
    """Autograd's nodes that the model's ``output`` depends on, but for those that the backward pass will make.

    Those are within a reentrant checkpoint, or within the layers of Reformer.
    """
    pending = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen: set[Any] = set(pending)
    while pending:
        below = {found for found, _ in pending.pop().next_functions if found is not None} - seen
        seen |= below
        pending += below
    return seen


def _without_effect(seen: set[Any], called: Mapping[LorettaLayer, Sequence[set[Any]]]) -> set[LorettaLayer]:
    """The layers none of whose outputs the model's output depends on, as the nodes that it does depend on tell."""
    if not seen:
        return set()
    lost = {layer for layer, calls in called.items() if not any(nodes & seen for nodes in calls)}
    if any(re.search("Checkpoint|Reversible", node.name()) for node in seen):
        return {layer for layer in lost if all(called[layer])}
    return {layer for layer in lost if _has_gradients(layer)}


def _has_gradients(layer: LorettaLayer) -> bool:
    pairs = [look_up(layer.stacked_parameters(name, pair)) for name, pair in layer.active_pairs()]
    return any(tensor is not None and tensor.requires_grad for tensors in pairs for tensor in tensors)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif is_dataclass(output):
        yield from _tensors(list(vars(output).values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)


def _buffers_of_base(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """What is saved with the base beside its parameters, and how often it has been written to."""
    found, copies = {}, tuple[str, ...]()
    for at, module in model.named_modules():
        if at.startswith(copies):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            copies += (f"{at}.modules_to_save.",)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not buffer.is_inference():
                found[f"{at}.{name}"] = buffer, buffer._version
    return found
