"""All trains of one shape are contracted together, once per call of the model that holds them.

A wrapped model has hundreds of small trains, and contracting each where it is used launches thousands of tiny
kernels. Here the cores of equal trains are stacked, multiplied as one batch when the model is called, and the layers
find the results in the call (:mod:`loretta.tuners.calls`). The parameters stay where PEFT put them.

What a call has contracted ends with the call, so it cannot be out of date. Factors are kept from call to call only
within one ``generate``, which is one call to its caller, and within :func:`serving`.
"""

import threading
from collections import UserDict, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.layers.trains import halves
from loretta.tuners import calls, mixed
from loretta.tuners.calls import Factors, Pair
from loretta.tuners.kept import Kept
from loretta.tuners.placement import Placement

Halves = tuple[Tensor, Tensor]
# Where a parameter lies: a dictionary of modules, its key, and the parameter's name in that module. It is looked up
# in every call, for functional_call, FSDP and others put another there.
Place = tuple[nn.ModuleDict, str, str]

# counts changes of the adapters, or of which are active, in any model: after one all groups are made anew
_changes = 0


def note_change() -> None:
    """Say that the adapters of a layer, or which of them are active, have changed."""
    global _changes
    _changes += 1


class Scales(UserDict[str, float]):
    """The factor on the effect of each adapter: a number, and the same as a tensor.

    Recordings (compiled or CUDA graphs) read the tensor, which is filled in place: another number needs no other
    recording.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.device = torch.device("cpu")
        super().__init__()

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        if name in self.tensors:
            self.tensors[name].fill_(value)
        else:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64  # mps has no float64
            with torch.inference_mode(False):  # a call with gradients may use it later
                self.tensors[name] = torch.tensor(value, dtype=dtype, device=self.device)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.tensors[name]

    def move(self, device: torch.device) -> None:
        """Have the tensors on a device (not on meta, which holds no number)."""
        if device.type != "meta" and device != self.device:
            self.device, self.tensors = device, {}
            self.update(self.data)

    def of(self, name: str, like: Tensor) -> float | Tensor:
        """The factor of one adapter, as what has to be multiplied with ``like`` now."""
        return self.tensors[name].to(like.device, like.dtype) if calls.is_recorded() else self[name]


class JointLayer(nn.Module):
    """A layer whose trains are contracted with those of equal layers.

    A subclass says which trains it has (:meth:`active_pairs`), where their parameters lie
    (:meth:`stacked_parameters`), with whose they may be stacked (:meth:`group_key`), and what it multiplies with
    (:meth:`to_factors`). In its forward it takes the factors from :func:`find_factors`, or
    contracts its own trains where that returns None.
    """

    placements: dict[str, Placement]
    scaling: Scales
    depth = 0  # of the frames between a call of the model and this layer, the last time

    def active_pairs(self, adapter_names: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
        """(adapter, number of the pair of trains) for each pair that the next forward pass will use.

        Args:
            adapter_names: those whose rows are in the batch; the active ones by default.
        """
        raise NotImplementedError

    def stacked_parameters(self, adapter_name: str, pair: int) -> tuple[Place, ...]:
        """Where the parameters of one pair lie, to be stacked with those of equal layers: down, up, any biases."""
        raise NotImplementedError

    def group_key(self, adapter_name: str, pair: int) -> Hashable:
        """Pairs of layers with equal keys can be contracted together."""
        raise NotImplementedError

    def to_factors(self, adapter_name: str, down: Halves, up: Halves, biases: Sequence[Tensor]) -> Factors:
        """The matrices that the layer multiplies with, from the halves of its trains; the last one gets the scale.

        Dimensions in front of the last two stay in front: those of all layers of a group come at once.
        """
        raise NotImplementedError

    @classmethod
    def contract_together(
        cls, pairs: Sequence[Pair], columns: Sequence[Sequence[Tensor]], scale: float | Tensor, dtype: torch.dtype
    ) -> list[Factors]:
        """The finished factors of equal pairs, in their order.

        Args:
            columns: the parameters that lie at :meth:`stacked_parameters`: all of the first, all of the second, ...
            scale: of each pair, (M, 1, 1), or of all.
        """
        layer, name, _ = next(_typed(pairs))
        placement = layer.placements[name]
        down, up, *biases = (torch.stack(list(column)) for column in columns)
        stacked = layer.to_factors(name, halves(down, placement.down), halves(up, placement.up), biases)
        return list(zip(*(factor.unbind() for factor in finish(stacked, scale, dtype)), strict=True))

    def working_dtype(self) -> torch.dtype:
        """The dtype of activations here, which the factors get."""
        raise NotImplementedError


class _Group:
    """Equal pairs of trains."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)
        places = [layer.stacked_parameters(name, pair) for layer, name, pair in _typed(self.pairs)]
        self.columns = tuple(zip(*places, strict=True))  # all of the first parameters, all of the second, ...
        self._scale: tuple[tuple[float, ...], Tensor] | None = None

    def parameters(self) -> list[list[Tensor]]:
        """The columns as they are now. Raises KeyError where an adapter is gone."""
        return [look_up(column) for column in self.columns]

    def contract(self, columns: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Factors]:
        """The factors of each pair, in its order."""
        layer = next(_typed(self.pairs))[0]
        return layer.contract_together(self.pairs, columns, self._scale_of(columns[0][0]), dtype)

    def dtype(self) -> torch.dtype:
        return next(_typed(self.pairs))[0].working_dtype()

    def scales(self) -> tuple[float, ...]:
        return tuple(layer.scaling[name] for layer, name, _ in _typed(self.pairs))

    def _scale_of(self, like: Tensor) -> float | Tensor:
        if calls.is_recorded():
            tensors = [layer.scaling.tensors[name] for layer, name, _ in _typed(self.pairs)]
            return torch.stack(tensors).to(like.device, like.dtype)[:, None, None]
        scales = self.scales()
        if len(set(scales)) == 1:
            return scales[0]
        known = self._scale
        if known is None or known[0] != scales or (known[1].dtype, known[1].device) != (like.dtype, like.device):
            with torch.inference_mode(False):  # a call with gradients may use it later
                known = scales, torch.tensor(scales, dtype=like.dtype, device=like.device)[:, None, None]
            self._scale = known
        return known[1]


class Contraction:
    """The joint contraction of one model, as a pair of hooks on it, and around its ``generate``.

    With a leading dimension in front of the flat cores (stacked parameters under ``vmap``) everything here stays as
    it is: :func:`loretta.layers.trains.halves` and ``to_factors`` leave dimensions in front where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._forget()

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Have the trains below ``model`` contracted when it is called. A second call changes nothing."""
        if cls.of(model) is not None:
            return
        contraction = cls(model)
        model.register_forward_pre_hook(contraction.begin)
        model.register_forward_hook(contraction.end, always_call=True)
        if hasattr(model, "generate") and "generate" not in vars(model):
            # a partial has a name and a signature, and is copied and pickled with the model
            named = ("__module__", "__name__", "__qualname__", "__doc__")
            own: Any = model.generate
            vars(model)["generate"] = update_wrapper(partial(contraction.generate), own, named, ())

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Undo :meth:`attach`."""
        contraction = cls.of(model)
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)
        wrapped = vars(model).get("generate")
        if contraction is not None and isinstance(wrapped, partial) and wrapped.func == contraction.generate:
            del vars(model)["generate"]

    @classmethod
    def of(cls, model: nn.Module) -> "Contraction | None":
        """The one that is attached to ``model``."""
        found = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
        return next((contraction for contraction in found if isinstance(contraction, cls)), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self.grouped: dict[tuple[str, ...] | None, tuple[int, list[_Group]]] = {}  # by the names of a mixed batch
        self.served: Kept | None = None
        self.recomputed: tuple[int, Mapping[Pair, Factors]] | None = None

    @calls.traced_as_a_part
    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: contract the active pairs."""
        if module is not self.model:
            return  # a replica of DataParallel, on another device
        has_graph = torch.is_grad_enabled()
        self.recomputed = None
        kept = None if has_graph or calls.is_recorded() else self.served or _generating.kept.get(self)
        calls.enter(self.contract(kept), has_graph=has_graph)

    @calls.traced_as_a_part
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it: a layer that is called on its own contracts its own trains."""
        if module is self.model:
            calls.leave()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``, whose many calls are one to its caller: they contract once."""
        before = _generating.kept
        _generating.kept = {**before, self: Kept(refuses_writes=False)}
        try:
            own: Any = type(self.model)
            return own.generate(self.model, *args, **kwargs)
        finally:
            _generating.kept = before

    def contract(self, kept: Kept | None = None) -> dict[Pair, Factors]:
        """The factors of all active pairs, from ``kept`` where it has them."""
        found: dict[Pair, Factors] = {}
        for group, columns in self._groups():
            dtype = group.dtype()
            if kept is None:
                factors: Sequence[Factors] = group.contract(columns, dtype)
            else:
                tensors = [tensor for column in columns for tensor in column]
                contract = partial(group.contract, columns, dtype)
                factors = kept.get(group.pairs, dtype, tensors, group.scales(), contract)
            found.update(zip(group.pairs, factors, strict=True))
        return found

    def _groups(self) -> list[tuple[_Group, list[list[Tensor]]]]:
        """The groups of the active pairs, with their parameters."""
        if not torch.compiler.is_dynamo_compiling():  # in a compiled graph the count would be compared in each call
            names = mixed.named(self.model)
            changes, groups = self.grouped.get(names, (-1, []))
            if changes == _changes:
                try:
                    found = [(group, group.parameters()) for group in groups]
                except (KeyError, AttributeError):
                    pass  # somebody has changed adapters and not noted it
                else:
                    if all(_are_plain(column) for _, columns in found for column in columns):
                        return found
        return self._regroup()

    def _regroup(self) -> list[tuple[_Group, list[list[Tensor]]]]:
        changes, names = _changes if not torch.compiler.is_dynamo_compiling() else -1, mixed.named(self.model)
        pairs: dict[Hashable, list[Pair]] = defaultdict(list)
        for layer in self.model.modules():
            if not isinstance(layer, JointLayer):
                continue
            for name, pair in layer.active_pairs(names):
                tensors = look_up(layer.stacked_parameters(name, pair))
                if _are_plain(tensors):
                    kinds = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
                    pairs[layer.group_key(name, pair), kinds].append((layer, name, pair))
        groups = [_Group(equal) for equal in pairs.values()]
        if not torch.compiler.is_dynamo_compiling():
            for layer, _, _ in (pair for group in groups for pair in group.pairs):
                _contraction_of[layer] = ref(self)
            self.grouped = {None: self.grouped.get(None, (-1, [])), names: (changes, groups)}  # one mixed batch
        return [(group, group.parameters()) for group in groups]

    def recompute(self) -> Mapping[Pair, Factors]:
        """The factors for the second pass of checkpointed blocks, contracted once in a backward pass.

        Autograd goes back through the graph of the first pass and takes only numbers from the second. So these factors
        have no graph; they want gradients where those of the first pass did, so that the same tensors are saved.
        """
        backward, found = calls.current_backward(), self.recomputed
        if found is None or found[0] != backward:
            with calls.hidden_from_checkpoints():
                factors = self.contract().items()
            leaves = {pair: tuple(f.detach().requires_grad_(f.requires_grad) for f in each) for pair, each in factors}
            self.recomputed = found = backward, leaves
        return found[1]


class _Generating(threading.local):
    def __init__(self) -> None:
        self.kept: dict[Contraction, Kept] = {}


_generating = _Generating()
_contraction_of: "WeakKeyDictionary[nn.Module, ref[Contraction]]" = WeakKeyDictionary()


def find_factors(layer: JointLayer, adapter_name: str, pair: int) -> Factors | None:
    """The factors of one pair of trains of ``layer``, or None where it has to contract them itself.

    They come from the call of the model that is running in this thread, or from the backward pass that computes a
    checkpointed block again.
    """
    found = calls.factors_in_call(layer, adapter_name, pair)
    if found is None and calls.is_recomputed():
        contraction = _contraction_of.get(layer)
        owner = contraction() if contraction is not None else None
        return owner.recompute().get((layer, adapter_name, pair)) if owner is not None else None
    return found


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """Contract the adapters of ``model`` once, for all calls without gradients in the block, in any thread.

    Outside it each call contracts them anew, except within one ``generate``: this is for loops that call the model
    themselves, for evaluation, and for a server. Adapters may be switched and added in the block, not written to.
    Graphs that are compiled or recorded in the block contain the contraction, as they do outside.

    Args:
        model: a model with LoRETTA adapters, wrapped by PEFT or holding them itself.

    Raises InputError when ``model`` has no LoRETTA adapter; at the first call after a write to an adapter that torch
    counts; and at the end of the block for any other write (through ``.data``, by a fused optimiser, by another
    process).
    """
    contractions = [found for module in model.modules() if (found := Contraction.of(module)) is not None]
    if not contractions:
        raise InputError(f"loretta.serving: this {type(model).__name__} has no LoRETTA adapter; wrap or load one first")
    before = [contraction.served for contraction in contractions]
    kept = Kept(refuses_writes=True)
    for contraction in contractions:
        contraction.served = kept
    try:
        yield
        kept.check()
    finally:
        for contraction, served in zip(contractions, before, strict=True):
            contraction.served = served


def look_up(places: Iterable[Place]) -> list[Tensor]:
    """The parameters that lie at these places now."""
    found = []
    for modules, name, parameter in places:
        module = modules._modules[name]
        # a module is slow to ask for its parameters, and FSDP, a parametrization and functional_call put others there
        tensor = module._parameters.get(parameter)
        found.append(getattr(module, parameter) if tensor is None else tensor)
    return found


def finish(factors: Sequence[Tensor], scale: float | Tensor, dtype: torch.dtype) -> Factors:
    """Scale the last factor, and cast all of them to the dtype in which the layer works."""
    *others, last = factors
    last = last if isinstance(scale, float) and scale == 1 else last * scale
    return tuple(factor.to(dtype) for factor in (*others, last))


def _typed(pairs: Sequence[Pair]) -> Iterator[tuple[JointLayer, str, int]]:
    return iter(pairs)  # type: ignore[arg-type]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are whole and here: not sharded by FSDP or ZeRO, not waiting on another device."""
    # a list: a generator costs as much again as what it asks
    return all([type(t) in (Tensor, nn.Parameter) and not t.is_meta and t.numel() > 0 for t in tensors])  # noqa: C419
