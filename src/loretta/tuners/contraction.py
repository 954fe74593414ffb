"""All trains of one shape are contracted together, once per call of the model that holds them.

A wrapped model has hundreds of small trains, and contracting each where it is used would launch thousands of tiny
kernels. Instead the cores of equal trains are stacked and multiplied as one batch when the model is called, and the
layers look up the results in that call (:mod:`loretta.tuners.calls`). The parameters stay where PEFT put them.

Factors are dropped at the end of the call, so they are never out of date. They are kept from call to call only within
one ``generate``, which is one call to its caller, and within :func:`serving`.
"""

import threading
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.tuners import calls, mixed
from loretta.tuners.calls import Factors, Pair
from loretta.tuners.gathered import is_sharded
from loretta.tuners.joint import Group, Joint, JointLayer, look_up
from loretta.tuners.kept import Kept
from loretta.tuners.recorded import Recordings
from loretta.tuners.scales import Scales

# Counts of changes in any model: of adapters or of which are active (all groups are then made anew), and of adapters
# alone
_changes = 0
_changes_of_adapters = 0


def note_change(*, activity_alone: bool = False) -> None:
    """Say that the adapters of a layer have changed, or which of them are active (``activity_alone``)."""
    global _changes, _changes_of_adapters
    _changes += 1
    _changes_of_adapters += not activity_alone


_numbers = count(1)
_numbering = threading.Lock()


@dataclass(slots=True)
class _Kinds:
    """The kinds of one adapter's pairs of trains on one layer: pairs of the same number are equal; 0 is none."""

    numbers: tuple[int, ...]
    scale: Tensor | None = None  # one tensor for all layers of these kinds


class Contraction:
    """The joint contraction of one model, as a pair of hooks on it, and around its ``generate``.

    With a leading dimension in front of the flat cores (stacked parameters under ``vmap``) everything here stays as
    it is: :func:`loretta.layers.trains.halves` and ``to_factors`` leave dimensions in front where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._forget()
        _contractions.add(self)

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
        calls.remove_hooks(model, cls)
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
        _contractions.add(self)

    def _forget(self) -> None:
        self.kinds: tuple[tuple[JointLayer, dict[str, _Kinds]], ...] = ()
        self.numbered = -1  # at which of the changes of adapters
        self.numbers: dict[Hashable, int] = {}
        # by the names of a mixed batch, and whether in a backward pass
        self.grouped: dict[tuple[tuple[str, ...] | None, bool], tuple[int, list[Group]]] = {}
        self.served: Kept | None = None
        self.recomputed: tuple[int, Mapping[Pair, Factors]] | None = None
        self.recordings = Recordings()

    @calls.traced_as_a_part
    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: contract the active pairs."""
        if module is not self.model:
            return  # the hook of a replica of DataParallel, on another device
        has_graph = torch.is_grad_enabled()
        self.recomputed = None
        kept = None if has_graph or calls.is_recorded() else self.served or _generating.kept.get(self)
        calls.enter(self.contract(kept), has_graph=has_graph)

    @calls.traced_as_a_part
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the model ran: a layer that is called on its own contracts its own trains again."""
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
        groups = self._groups()
        if kept is None and not calls.is_recorded():
            return Joint(groups).contract(self.recordings)
        found: dict[Pair, Factors] = {}
        for group, columns in groups:
            if not group.is_sharded:
                factors = group.contract(columns) if kept is None else kept.get(group, columns)
                found.update(zip(group.pairs, factors, strict=True))
        return found

    def _groups(self) -> list[tuple[Group, list[list[Tensor]]]]:
        """The groups of the active pairs, with their parameters."""
        if not torch.compiler.is_dynamo_compiling():  # in a compiled graph the count would be compared in each call
            names = self._grouped_for()
            changes, groups = self.grouped.get(names, (-1, []))
            if changes == _changes:
                try:
                    found = [(group, group.parameters()) for group in groups]
                except (KeyError, AttributeError):
                    self.numbered = -1  # somebody has changed adapters without note_change()
                else:
                    if all(_is_as_grouped(group, column) for group, columns in found for column in columns):
                        return found
        return self._regroup()

    def _grouped_for(self) -> tuple[tuple[str, ...] | None, bool]:
        return mixed.named(self.model), calls.current_backward() != calls.NO_BACKWARD

    def _regroup(self) -> list[tuple[Group, list[list[Tensor]]]]:
        changes, names = _changes if not torch.compiler.is_dynamo_compiling() else -1, mixed.named(self.model)
        if torch.compiler.is_dynamo_compiling():
            _number_all()
        else:
            self.number(joins=not calls.is_recorded())
        pairs: dict[tuple[Any, ...], list[Pair]] = defaultdict(list)
        named: dict[Hashable, list[tuple[str, _Kinds]]] = defaultdict(list)
        for layer, by_adapter in self.kinds:
            for name, pair in layer.active_pairs(names):
                if not (number := by_adapter[name].numbers[pair]):
                    continue
                tensors = look_up(layer.stacked_parameters(name, pair))
                sharded = layer.has_own_trains and all(map(is_sharded, tensors))
                if sharded or _are_plain(tensors):
                    kinds = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
                    key = number, kinds, sharded
                    pairs[key].append((layer, name, pair))
                    named[key].append((name, by_adapter[name]))
        groups = [Group(equal, _scale_of(named[key]), is_sharded=key[-1]) for key, equal in pairs.items()]
        if not torch.compiler.is_dynamo_compiling():
            for stacked, _, _ in (pair for group in groups for pair in group.pairs):
                _contraction_of[stacked] = ref(self)
            # kept for one mixed batch, and for one that is computed again, when FSDP has gathered a part of the cores
            self.grouped = {key: value for key, value in self.grouped.items() if key[0] is None}
            self.grouped[self._grouped_for()] = changes, groups
        return [(group, group.parameters()) for group in groups]

    def number(self, *, joins: bool, anew: bool = False) -> None:
        """Number the layers' pairs of trains, equal pairs alike, unless this was done after the last change.

        A number is never given to other pairs later, so a compiled graph needs to compare nothing but numbers.

        Args:
            joins: whether to keep the scales of equal pairs as one tensor: none can be made while a graph is recorded.
            anew: look again, also where no change was noted.
        """
        if self.numbered != _changes_of_adapters or anew:
            with _numbering:
                self._number(joins)

    def _number(self, joins: bool) -> None:
        changes = _changes_of_adapters
        numbers: dict[Hashable, int] = {None: 0}
        alike: dict[tuple[tuple[int, ...], str, torch.device], list[tuple[JointLayer, _Kinds]]] = defaultdict(list)
        found: list[tuple[JointLayer, dict[str, _Kinds]]] = []
        for layer in self.model.modules():
            if isinstance(layer, JointLayer):
                found.append((layer, {}))
                for name, pairs in layer.n_pairs.items():
                    keys = [layer.group_key(name, pair) for pair in range(pairs)]
                    for key in keys:
                        if key not in numbers:
                            numbers[key] = self.numbers.get(key) or next(_numbers)
                    kinds = found[-1][1][name] = _Kinds(tuple(numbers[key] for key in keys))
                    alike[kinds.numbers, name, layer.scaling.device].append((layer, kinds))
        for (_, name, _), equal in alike.items() if joins else []:
            scale = Scales.join([layer.scaling for layer, _ in equal], name)
            for _, kinds in equal:
                kinds.scale = scale
        self.kinds, self.numbers = tuple(found), numbers
        self.numbered = changes if joins else -1

    def recompute(self) -> Mapping[Pair, Factors]:
        """The factors for the second pass of checkpointed blocks, contracted once in each backward pass.

        Autograd goes back through the graph of the first pass and takes only numbers from the second. So these factors
        have no graph. They require gradients where those of the first pass did, so that the same tensors are saved.
        """
        backward, found = calls.current_backward(), self.recomputed
        if found is None or found[0] != backward:
            # a layer that is called without gradients may be the first one to ask, for all
            with calls.hidden_from_checkpoints(), torch.enable_grad():
                factors = self.contract().items()
            leaves = {pair: tuple(f.detach().requires_grad_(f.requires_grad) for f in each) for pair, each in factors}
            self.recomputed = found = backward, leaves
        return found[1]


@torch.compiler.assume_constant_result
def _number_all() -> bool:
    """:meth:`Contraction.number` of all models, for Dynamo, which runs this while it traces and looks not into it."""
    for contraction in list(_contractions):
        contraction.number(joins=True, anew=True)
    return True


class _Generating(threading.local):
    def __init__(self) -> None:
        self.kept: dict[Contraction, Kept] = {}


_generating = _Generating()
_contractions: "WeakSet[Contraction]" = WeakSet()
_contraction_of: "WeakKeyDictionary[nn.Module, ref[Contraction]]" = WeakKeyDictionary()


def find_factors(layer: JointLayer, adapter_name: str, pair: int) -> Factors | None:
    """The factors of one pair of trains of ``layer``, or None where the layer must contract them itself.

    They come from the call of the model that runs in this thread, or from the backward pass that computes a
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


def _is_as_grouped(group: Group, tensors: Sequence[Tensor | None]) -> bool:
    return all(map(is_sharded, tensors)) if group.is_sharded else _are_plain(tensors)


def _scale_of(pairs: Sequence[tuple[str, _Kinds]]) -> Tensor | None:
    """The tensor that holds the scales of these pairs and no others; None where they are of several adapters."""
    (name, kinds), *_ = pairs
    of_one = all(other == name and own.numbers == kinds.numbers for other, own in pairs)
    return kinds.scale if of_one and kinds.scale is not None and len(kinds.scale) == len(pairs) else None


def _are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are whole and here: not sharded by FSDP or ZeRO, not waiting on another device or for a hook."""
    # a list: a generator costs as much again as what it asks
    return all([t is not None and type(t) in _PLAIN and not t.is_meta and t.numel() > 0 for t in tensors])  # noqa: C419


_PLAIN = (Tensor, nn.Parameter)
