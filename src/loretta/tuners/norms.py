"""Trained layer norms: each adapter holds a change of the base norm's weight and bias (LoRETTA section 3.2)."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from loretta.tuners.changes import Change, ChangedModule
from loretta.tuners.config import LorettaConfig
from loretta.tuners.layer import is_offloaded

_NORM_CLASS = re.compile(r"(Layer|RMS|Group)Norm")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm (of any library) with parameters of its own, and no others within it."""
    own = list(module.parameters(recurse=False))
    # RobertaPreLayerNormLMHead is no norm
    return bool(own and _NORM_CLASS.search(type(module).__name__)) and len(own) == len(list(module.parameters()))


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Named modules without the insides of trained norms and of copied modules."""
    wrapped = (TrainedNorm, ModulesToSaveWrapper)
    inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, wrapped))
    return {name: module for name, module in model.named_modules() if name and not name.startswith(inside)}


def named_whole(names: Iterable[str], config: LorettaConfig) -> list[str]:
    """Those of the names that ``config.modules_to_save`` trains whole: PEFT matches them by their ends."""
    ends = tuple(config.modules_to_save or ())
    return [name for name in names if name.endswith(ends)]


def norms_of(model: nn.Module, outside: Sequence[str] = ()) -> list[str]:
    """Full names of the layer norms, trained already or not, but for the modules named in ``outside`` and theirs."""
    within = tuple(name + "." for name in outside)
    return [
        name
        for name, module in outer_modules(model).items()
        if name not in outside and not name.startswith(within) and (isinstance(module, TrainedNorm) or is_norm(module))
    ]


def own_parameters(norm: nn.Module) -> list[nn.Parameter]:
    """The parameters of the base norm, whether or not adapters change them."""
    return list((norm.base_layer if isinstance(norm, TrainedNorm) else norm).parameters(recurse=False))


def norm_names(model: nn.Module) -> list[str]:
    """Endings (or full names) that PEFT matches to every layer norm of ``model`` and to nothing else."""
    names = norms_of(model)
    others = outer_modules(model).keys() - set(names)
    chosen: dict[str, None] = {}
    for name in names:
        ending = name.rpartition(".")[2]
        ambiguous = ending.isdecimal() or any(other.endswith(ending) for other in others)
        chosen[name if ambiguous else ending] = None
    return list(chosen)


class NormChange(Change, nn.LayerNorm):
    """A change of a norm. The Trainer takes weight decay off norms, which it knows by some names and by this class."""

    # transformers initialises those of norms, where there are any
    weight = bias = None  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return ""


class TrainedNorm(ChangedModule):
    """A norm that computes with its base's parameters plus the changes of the active adapters."""

    change_class = NormChange
    kind, off = "norm", "train_norms=False"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        own = dict(base_layer.named_parameters(recurse=False))
        self.parameter_names = tuple(own)
        self.in_features = self.out_features = max(parameter.shape[-1] for parameter in own.values())

    def update_layer(self, adapter_name: str, prefix: str, *scaled: Any) -> None:
        self.hold(adapter_name, prefix, {name: self._own(name) for name in self.parameter_names})

    def with_changes(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for adapter_name, weight in weights.items():
            for name, change in self.change(adapter_name).items():
                term = change if weight == 1 else weight * change
                values[name] = values.get(name, self._own(name)) + term
        return {name: value.to(self._own(name).dtype) for name, value in values.items()}

    def _call_base(self, weights: Mapping[str, float], args: Any, kwargs: Any) -> Tensor:
        holders = (getattr(self, attribute) for attribute in self.adapter_layer_names)
        parts = [self.base_layer, *(changes[name] for changes in holders for name in weights if name in changes)]
        return call_here(self.base_layer, parts, lambda: self.with_changes(weights), args, kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight that the norm computes with, for code that reads it past the module."""
        return self._effective("weight")

    @property
    def bias(self) -> Tensor:
        """As :attr:`weight`."""
        return self._effective("bias")

    def _effective(self, name: str) -> Tensor:
        return self.with_changes(self._running()).get(name, getattr(self.base_layer, name))

    def __getattr__(self, name: str) -> Any:
        # one that is no property here, of a norm with parameters of other names
        return self._effective(name) if name in self.__dict__.get("parameter_names", ()) else super().__getattr__(name)


def call_here(
    module: nn.Module,
    parts: Iterable[nn.Module],
    parameters: Callable[[], Mapping[str, Tensor]],
    args: Any,
    kwargs: Any,
) -> Any:
    """As :func:`call_with`, also where accelerate keeps some of ``parts``, which ``parameters`` reads, elsewhere."""
    if not (offloaded := [part for part in parts if is_offloaded(part)]):
        return call_with(module, parameters(), args, kwargs)
    # accelerate's forward pass would put the parameters of the base over those that are given here
    with ExitStack() as here:
        for part in offloaded:
            here.enter_context(align_module_device(part))
        return call_with(module, parameters(), args, kwargs, own_forward=True)


def call_with(
    module: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any, *, own_forward: bool = False
) -> Any:
    """The forward pass of ``module`` with other parameters; its class's, past one bound to it, if asked for."""
    if not parameters:
        return module(*args, **kwargs)
    parts = module.modules() if module._modules else (module,)
    if torch.compiler.is_compiling() or (not own_forward and any("forward" in part.__dict__ for part in parts)):
        # what is bound to the instance, as accelerate's forward passes are, sees no other one
        return functional_call(module, dict(parameters), args, kwargs)
    return _holding(module, parameters)(*args, **kwargs)


def _holding(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A second module with these parameters and all else of the first, but a forward pass that is bound to it.

    functional_call writes to the module for the length of the call, which another thread may be computing with.
    """
    below: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for name, value in parameters.items():
        child, dot, rest = name.partition(".")
        (below.setdefault(child, {}) if dot else own)[rest or child] = value
    children = {name: _holding(child, below[name]) if name in below else child
                for name, child in module._modules.items() if child is not None}  # fmt: skip
    other = module.__new__(type(module))
    other.__dict__ = {**module.__dict__, **own, "_modules": {**module._modules, **children}}
    other.__dict__.pop("forward", None)
    return other
