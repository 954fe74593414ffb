"""All trains of one shape are contracted together, once per call of the model that holds them.

A wrapped model has hundreds of small trains, and contracting each where it is used launches thousands of tiny
kernels. Here the cores of equal trains are stacked, multiplied as one batch when the model is called, and the results
handed to the layers. The parameters stay where PEFT put them.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loretta.layers import halves

if TYPE_CHECKING:
    from loretta.tuners.layer import LorettaLayer

Factors = tuple[Tensor, ...]

# counts the changes of which adapters exist and which are active, in any model: what was grouped before is grouped anew
_changes = 0


def note_change() -> None:
    """To be called by whatever changes the adapters of a layer, or their activity."""
    global _changes
    _changes += 1


class Call:
    """Whether the model is running, as all of its layers see it."""

    def __init__(self) -> None:
        self.is_running = False


class Handed:
    """What one layer was handed: the factors of its trains by (adapter, number of the pair)."""

    def __init__(self) -> None:
        self.call = Call()
        self.with_gradient: dict[tuple[str, int], Factors] = {}
        self.without: dict[tuple[str, int], Factors] = {}
        self.recomputed = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the factors: they belong to a graph, which can neither be copied nor saved."""
        return {"call": self.call, "with_gradient": {}, "without": {}, "recomputed": False}

    def get(self, adapter_name: str, pair: int) -> "Factors | None":
        """The factors of one pair of trains, or None where the layer has to contract them itself."""
        key = (adapter_name, pair)
        if self.call.is_running and not self.recomputed and torch.is_grad_enabled():
            return self.with_gradient.get(key)
        in_backward = _in_backward()
        if not (self.call.is_running or in_backward):
            return None
        if torch.is_grad_enabled():
            return None if in_backward and self.recomputed else self.with_gradient.get(key)
        if key not in self.without and key in self.with_gradient:
            # The first pass of a reentrant checkpoint. Its second, in the backward pass, walks through the whole graph
            # behind what it uses, so every block needs factors of its own there.
            self.recomputed = True
            return self.with_gradient[key]
        return self.without.get(key)


@dataclass(frozen=True, slots=True)
class _Group:
    """Equal pairs of trains: ``owners`` are (layer, adapter, number of the pair)."""

    owners: tuple[tuple["LorettaLayer", str, int], ...]
    scales: tuple[float, ...]
    scale: float | Tensor  # the one of all, or (modules, 1, 1)

    def tensors(self) -> list[list[Tensor]]:
        """What is stacked: all of the first tensors, all of the second, ..."""
        each = [layer.ingredients(name, pair) for layer, name, pair in self.owners]
        return [list(column) for column in zip(*each, strict=True)]

    def factors(self) -> Iterable[Factors]:
        layer, name, _ = self.owners[0]
        placement = layer.placements[name]
        down, up, *biases = (torch.stack(column) for column in self.tensors())
        stacked = layer.assemble(halves(down, placement.down), halves(up, placement.up), biases)
        return zip(*(f.unbind() for f in finish(stacked, self.scale, layer.working_dtype())), strict=True)


class Contraction:
    """The joint contraction of one model, as a pair of hooks on it.

    With gradients the factors are computed at every call and stay for the recomputation of checkpointed blocks in the
    backward pass. Without, they are kept until a core changes, so that generation pays for them once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.call = Call()
        self._forget()

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Have the trains below ``model`` contracted when it is called. A second call changes nothing."""
        if not any(isinstance(getattr(hook, "__self__", None), cls) for hook in model._forward_hooks.values()):
            contraction = cls(model)
            model.register_forward_pre_hook(contraction.begin)
            model.register_forward_hook(contraction.end, always_call=True)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Undo :meth:`attach`."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "call": self.call}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self.seen = -1
        self.groups: list[_Group] = []
        self.versions: tuple[Any, ...] | None = None

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: contract what is active."""
        if self.seen != _changes or any(group.scales != _scales(group.owners) for group in self.groups):
            self._regroup()
        self.call.is_running = True
        if torch.is_grad_enabled():
            self.versions = None
            for group in self.groups:
                for (layer, name, pair), factors in zip(group.owners, group.factors(), strict=True):
                    layer.handed.with_gradient[name, pair] = factors
                    layer.handed.without.clear()
                    layer.handed.recomputed = False
            return
        versions = self._versions()
        if versions is None or versions != self.versions:
            self.versions = versions
            for group in self.groups:
                for (layer, name, pair), factors in zip(group.owners, group.factors(), strict=True):
                    layer.handed.without[name, pair] = factors

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it: a layer that is called on its own contracts its own trains."""
        self.call.is_running = False

    def _regroup(self) -> None:
        from loretta.tuners.layer import LorettaLayer

        self._forget()
        self.seen = _changes
        groups: dict[Hashable, list[tuple[LorettaLayer, str, int]]] = defaultdict(list)
        for layer in self.model.modules():
            if not isinstance(layer, LorettaLayer):
                continue
            layer.handed = Handed()
            layer.handed.call = self.call
            for name, pair in layer.running():
                tensors = layer.ingredients(name, pair)
                if all(_is_plain(tensor) for tensor in tensors):
                    kinds = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
                    groups[layer.recipe(name), kinds].append((layer, name, pair))
        for owners in groups.values():
            scales, device = _scales(owners), owners[0][0].ingredients(*owners[0][1:])[0].device
            alike = len(set(scales)) == 1
            scale = scales[0] if alike else torch.tensor(scales, device=device)[:, None, None]
            self.groups.append(_Group(tuple(owners), scales, scale))

    def _versions(self) -> tuple[Any, ...] | None:
        """What changes when a core does; None where that cannot be known, and nothing may be kept."""
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None  # the contraction has to be a part of what is recorded
        tensors = [tensor for group in self.groups for column in group.tensors() for tensor in column]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        dtypes = [group.owners[0][0].working_dtype() for group in self.groups]
        return (*dtypes, *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors))


def _scales(owners: Iterable[tuple["LorettaLayer", str, int]]) -> tuple[float, ...]:
    return tuple(layer.scaling[name] for layer, name, _ in owners)


def finish(factors: Sequence[Tensor], scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Scale the last factor, and cast all of them to the dtype in which the layer works."""
    *others, last = factors
    return tuple(factor.to(dtype) for factor in (*others, last * scale))


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is whole and here: not sharded by FSDP or ZeRO, not waiting on another device."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
