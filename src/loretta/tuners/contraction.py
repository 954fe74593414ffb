"""All trains of one shape are contracted together, once per call of the model that holds them.

A wrapped model has hundreds of small trains, and contracting each where it is used launches thousands of tiny
kernels. Here the cores of equal trains are stacked, multiplied as one batch when the model is called, and the results
handed to the layers. The parameters stay where PEFT put them.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from loretta.layers.trains import halves

if TYPE_CHECKING:
    from loretta.tuners.layer import LorettaLayer

Factors = tuple[Tensor, ...]
Ingredient = tuple[nn.Module, str]  # where a parameter lies: functional_call, FSDP and others put another there

# counts the changes of which adapters exist and which are active, in any model: what was grouped before is grouped anew
_changes = 0
# counts the times when parameters of any model may have been written past autograd's version counters
_writes = 0


def note_change() -> None:
    """To be called by whatever changes the adapters of a layer, or their activity."""
    global _changes
    _changes += 1


def note_write() -> None:
    """To be called where something may have written to the parameters of a layer unseen."""
    global _writes
    _writes += 1


class Call:
    """Whether the model is running, as all of its layers see it, and whether it was called with gradients."""

    def __init__(self) -> None:
        self.is_running = False
        self.has_graph = False


class Handed:
    """What one layer was handed: the factors of its trains by (adapter, number of the pair)."""

    def __init__(self, call: Call | None = None, *, reentrant: bool = False) -> None:
        self.call = call or Call()
        self.with_gradient: dict[tuple[str, int], Factors] = {}
        self.without: dict[tuple[str, int], Factors] = {}
        self.reentrant = reentrant

    def __getstate__(self) -> dict[str, Any]:
        """Without the factors: they belong to a graph, which can neither be copied nor saved."""
        return {**self.__dict__, "with_gradient": {}, "without": {}}

    def get(self, adapter_name: str, pair: int) -> "Factors | None":
        """The factors of one pair of trains, or None where the layer has to contract them itself."""
        key, call, grad_enabled = (adapter_name, pair), self.call, torch.is_grad_enabled()
        if call.has_graph and grad_enabled and not self.reentrant:
            return self.with_gradient.get(key)
        if _in_backward():  # a checkpointed block is computed again
            return self.with_gradient.get(key) if grad_enabled and not self.reentrant else None
        if not call.is_running:
            # what is recomputed of this pass must not be the factors of an earlier one
            self.with_gradient.clear()
            return None
        if not call.has_graph:
            return None if grad_enabled else self.without.get(key)
        # Without gradients within a call with them: the first pass of a reentrant checkpoint. Its second, in the
        # backward pass, walks through the whole graph behind what it uses, so there every block needs its own.
        self.reentrant = self.reentrant or not grad_enabled
        return self.with_gradient.get(key)


@dataclass(frozen=True, slots=True)
class _Group:
    """Equal pairs of trains: ``owners`` are (layer, adapter, number of the pair)."""

    owners: tuple[tuple["LorettaLayer", str, int], ...]
    columns: tuple[tuple[Ingredient, ...], ...]  # what is stacked: all of the first tensors, all of the second, ...
    scales: tuple[float, ...]
    scale: float | Tensor  # the one of all, or (modules, 1, 1)

    @classmethod
    def of(cls, owners: Sequence[tuple["LorettaLayer", str, int]]) -> "_Group":
        columns = tuple(zip(*(layer.ingredients(name, pair) for layer, name, pair in owners), strict=True))
        scales, like = _scales(owners), look_up(columns[0][:1])[0]
        scale = scales[0] if len(set(scales)) == 1 else like.new_tensor(scales)[:, None, None]
        return cls(tuple(owners), columns, scales, scale)

    def tensors(self) -> list[Tensor]:
        return [tensor for column in self.columns for tensor in look_up(column)]

    def is_stale(self) -> bool:
        return self.scales != _scales(self.owners) or not all(_is_plain(tensor) for tensor in self.tensors())

    def hand_over(self, *, with_gradient: bool) -> None:
        """Contract, and give every owner its factors."""
        layer, name, _ = self.owners[0]
        placement = layer.placements[name]
        down, up, *biases = (torch.stack(look_up(column)) for column in self.columns)
        stacked = layer.assemble(halves(down, placement.down), halves(up, placement.up), biases)
        each = zip(*(f.unbind() for f in finish(stacked, self.scale, layer.working_dtype())), strict=True)
        for (layer, name, pair), factors in zip(self.owners, each, strict=True):
            if with_gradient:
                layer.handed.with_gradient[name, pair] = factors
                layer.handed.without.clear()
            else:
                layer.handed.without[name, pair] = factors

    def take_back(self) -> None:
        """The opposite of :meth:`hand_over`."""
        for layer, _, _ in self.owners:
            layer.handed.with_gradient.clear()
            layer.handed.without.clear()


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
        self.held: list[tuple[Tensor, UntypedStorage]] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: contract what is active."""
        if module is not self.model:
            return  # a replica of DataParallel, on another device
        if self.seen != _changes or any(group.is_stale() for group in self.groups):
            self._regroup()
        self.call.is_running, self.call.has_graph = True, torch.is_grad_enabled()
        if self.call.has_graph:
            self.versions = None
        else:
            versions = self._versions()
            if versions is not None and versions == self.versions:
                return
            self.versions = versions
        for group in self.groups:
            group.hand_over(with_gradient=self.call.has_graph)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it: a layer that is called on its own contracts its own trains."""
        self.call.is_running = self.call.has_graph = False
        if torch.compiler.is_compiling():
            # what is left lying in a dictionary would become an output of the graph
            for group in self.groups:
                group.take_back()

    def _regroup(self) -> None:
        from loretta.tuners.layer import LorettaLayer

        self._forget()
        self.seen = _changes
        groups: dict[Hashable, list[tuple[LorettaLayer, str, int]]] = defaultdict(list)
        for layer in self.model.modules():
            if not isinstance(layer, LorettaLayer):
                continue
            layer.handed = Handed(self.call, reentrant=layer.handed.reentrant)
            for name, pair in layer.running():
                tensors = look_up(layer.ingredients(name, pair))
                if all(_is_plain(tensor) for tensor in tensors):
                    kinds = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
                    groups[layer.recipe(name), kinds].append((layer, name, pair))
        self.groups = [_Group.of(owners) for owners in groups.values()]

    def _versions(self) -> tuple[Any, ...] | None:
        """What changes when a core does; None where that cannot be known, and nothing may be kept."""
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None  # the contraction has to be a part of what is recorded
        tensors = [tensor for group in self.groups for tensor in group.tensors()]
        if any(tensor.is_inference() or is_functorch_wrapped_tensor(tensor) for tensor in tensors):
            return None
        dtypes = [group.owners[0][0].working_dtype() for group in self.groups]
        versions = (_writes, *dtypes, *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors))
        if versions != self.versions:
            # held on to, so that neither the identity nor the address can become that of another tensor
            self.held = [(tensor, tensor.untyped_storage()) for tensor in tensors]
        return versions


def look_up(ingredients: Iterable[Ingredient]) -> list[Tensor]:
    """The parameters that lie there now."""
    return [getattr(module, name) for module, name in ingredients]


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


def hidden_from_checkpoints() -> AbstractContextManager:
    """What autograd saves within stays saved, and a checkpoint around does not count it.

    A checkpointed block may thus contract its trains in one pass and be handed the factors in the other.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_with_version, _unless_written_to)


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unless_written_to(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:  # autograd itself does not look behind hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"cores at version {tensor._version}, expected version {version}"
        )
    return tensor
