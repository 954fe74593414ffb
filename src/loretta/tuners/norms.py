"""Trained layer norms: each adapter holds a change of the base norm's weight and bias (LoRETTA section 3.2)."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from loretta.errors import InputError
from loretta.tuners.layer import AdaptedModule, is_offloaded
from loretta.tuners.mixed import in_turn

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


class Change(nn.Module):
    """One adapter's change of one parameter of a norm.

    It is a module so that the adapter's name stands between dots in the parameter's: TRL makes the reference of DPO
    and GRPO by copying what has ``.default.`` in its name, and would pass over a parameter that ends in ``.default``.
    """

    values: nn.Parameter

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


class TrainedNorm(nn.Module, AdaptedModule):
    """A norm that computes with its base's parameters plus the changes of the active adapters.

    The changes lie in dictionaries by adapter, one for each parameter of the base, named after the prefix of the
    adapter's method: ``loretta_rep_norm_weight`` and so on. They have at least float32 and start as zeros, with which
    the norm computes what its base does to the last bit. Changes are held and not weights: a change lies near zero,
    where every format has numbers close together, and a weight near 1, where the numbers of bfloat16 are 0.008 apart.
    """

    cast_input_dtype_enabled = True  # for PEFT's disable_input_dtype_casting: there is no such casting here

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        own = dict(base_layer.named_parameters(recurse=False))
        self.parameter_names = tuple(own)
        self.in_features = self.out_features = max(parameter.shape[-1] for parameter in own.values())
        self.adapter_layer_names = ()
        self.other_param_names = ("known",)
        self.known: dict[str, bool] = {}  # every adapter of the model: whether it trains this norm
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Tensor] = {}  # the base's own values, while adapters are merged into them
        self.expects_values_of: str | None = None
        self.followers = []

    def update_layer(self, adapter_name: str, prefix: str) -> None:
        """Add one adapter, of the method with this ``prefix``, whose changes are zeros."""
        for name in self.parameter_names:
            attribute = f"{prefix}norm_{name}"
            if attribute not in self._modules:
                setattr(self, attribute, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            value = self._own(name)
            dtype = torch.promote_types(value.dtype, torch.float32)
            getattr(self, attribute)[adapter_name] = Change(torch.zeros_like(value, dtype=dtype))
        self.known[adapter_name] = True

    @property
    def held(self) -> list[str]:
        """The adapters that train this norm."""
        return [name for name, trains in self.known.items() if trains]

    def change(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The changes of one adapter, by the base's names; empty where it does not train this norm."""
        found = {}
        for attribute in self.adapter_layer_names:
            changes = getattr(self, attribute)
            if adapter_name in changes:
                found[attribute.partition("_norm_")[2]] = changes[adapter_name].values
        return found

    def with_changes(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The base's parameters plus the weighted sum of the changes of some adapters, in the base's dtype.

        Empty where none of them trains this norm.
        """
        values: dict[str, Tensor] = {}
        for adapter_name, weight in weights.items():
            for name, change in self.change(adapter_name).items():
                term = change if weight == 1 else weight * change
                values[name] = values.get(name, self._own(name)) + term
        return {name: value.to(self._own(name).dtype) for name, value in values.items()}

    def _own(self, name: str) -> Tensor:
        """A parameter of the base as it is without adapters. Replicas of DataParallel have no ``parameters()``."""
        return self._unmerged[name] if name in self._unmerged else getattr(self.base_layer, name)

    def _running(self) -> dict[str, float]:
        return {} if self.disable_adapters or self.merged else dict.fromkeys(self.active_adapters, 1.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base norm, in the shape and dtype that it gives, with the changes of the active adapters.

        ``adapter_names`` (one for each row of the first dimension) replace the active ones, as in PEFT.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            return self._mixed(adapter_names, x, args, kwargs)
        return self._call_base(self._running(), (x, *args), kwargs)

    def _call_base(self, weights: Mapping[str, float], args: Any, kwargs: Any) -> Tensor:
        holders = (getattr(self, attribute) for attribute in self.adapter_layer_names)
        parts = [self.base_layer, *(changes[name] for changes in holders for name in weights if name in changes)]
        return call_here(self.base_layer, parts, lambda: self.with_changes(weights), args, kwargs)

    def _mixed(self, adapter_names: Sequence[str], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if isinstance(x, nn.Parameter) and not self.merged:
            # DeBERTa norms its embeddings of distances, which all rows share
            warnings.warn(
                f"a norm of {tuple(x.shape)} weights, which belong to no row of the batch, computes without adapters "
                "where adapter_names gives one for each row: set one adapter at a time for its own results",
                stacklevel=2,
            )
            return self.base_layer(x, *args, **kwargs)
        self._check_mixed_batch(x, adapter_names)

        def compute(name: str, rows: list[int]) -> Tensor:
            own = [value[rows] if _has_rows_of(value, x) else value for value in (x, *args)]
            named = {key: value[rows] if _has_rows_of(value, x) else value for key, value in kwargs.items()}
            return self._call_base({name: 1.0}, own, named)

        return in_turn(adapter_names, compute)

    def take_values(self, adapter_name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn whole parameters, as adapters once held them, into changes: attribute name -> change of the base."""
        attributes = {a.partition("_norm_")[2]: a for a in self.adapter_layer_names if adapter_name in getattr(self, a)}
        return {attributes[name]: value - self._own(name).to(value.device) for name, value in values.items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.expects_values_of is not None:
            # transformers loads what lies under a name of the state dict, and then sets the attribute
            destination |= {prefix + name: self._own(name).detach() for name in self.parameter_names}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and name in self.__dict__.get("parameter_names", ()):
            assert self.expects_values_of is not None, f"the {name} of a trained norm is that of its base_layer"
            with torch.no_grad():
                for attribute, change in self.take_values(self.expects_values_of, {name: value}).items():
                    getattr(self, attribute)[self.expects_values_of].values.copy_(change)
        else:
            super().__setattr__(name, value)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the parameters with the changes of ``adapter_names`` (default: the active ones) into the base.

        Raises ValueError when ``safe_merge`` finds a value that is not finite.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.known]
        merged = [*self.merged_adapters, *new]
        values = self.with_changes(dict.fromkeys(merged, 1.0))
        if safe_merge and not all(value.isfinite().all() for value in values.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {new[-1]} seems to be broken")
        for name, value in values.items():
            self._unmerged.setdefault(name, getattr(self.base_layer, name).detach())
            getattr(self.base_layer, name).data = value.detach()
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Give the base its own values back, to the last bit."""
        for name, value in self._unmerged.items():
            getattr(self.base_layer, name).data = value
        self._unmerged, self.merged_adapters = {}, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT asks right before it converts. Raises InputError: it stops at a norm, whichever adapter trains it."""
        if self.known.get(adapter_name):
            raise InputError(
                f"the adapter {adapter_name!r} also trains norms, which PEFT's conversion to LoRA would lose: train "
                "with train_norms=False, or export with --to merged"
            )
        owners = [name for name, trains in self.known.items() if trains]
        raise InputError(
            f"PEFT cannot convert the adapter {adapter_name!r} on a model whose norms {owners or 'an adapter'} "
            "trained: call loretta.export_lora, or load the adapter on a base model of its own"
        )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device alone. PEFT calls this after a load, and PEFT's own would round the changes."""
        for attribute in self.adapter_layer_names:
            changes = getattr(self, attribute)
            if adapter_name in changes and not changes[adapter_name].values.is_meta:
                target = self._own(attribute.partition("_norm_")[2]).device if device is None else device
                changes[adapter_name].to(target)

    def to_base_dtype(self, adapter_name: str) -> None:
        """Hold one adapter's changes in the dtype of the base."""
        for name, change in self.change(adapter_name).items():
            change.data = change.data.to(self._own(name).dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "TrainedNorm":
        self._unmerged = {name: fn(value) for name, value in self._unmerged.items()}
        return super()._apply(fn, recurse)

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
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not built yet
                raise
            is_parameter = name in self.__dict__.get("parameter_names", ())
            return self._effective(name) if is_parameter else getattr(self.base_layer, name)


def _has_rows_of(value: Any, x: Tensor) -> bool:
    """Whether an input of a norm has a part for each row of ``x``, as the gate of Mamba 2's norms."""
    return isinstance(value, Tensor) and value.dim() == x.dim() and len(value) == len(x)


def values_as_changes(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved tensors of an adapter, with norms that were saved as whole values turned into changes.

    Adapters once held copies of the norms, under the names of the base's own parameters, and then changes that were
    parameters of the norm.
    """
    translated = dict(tensors)
    for path, norm in model.named_modules():
        if isinstance(norm, TrainedNorm) and norm.known.get(adapter_name):
            norm.expects_values_of = None
            for start in {"", "base_model.model."}:
                found = {n: translated.pop(f"{start}{path}.{n}", None) for n in norm.parameter_names}
                values = {name: value for name, value in found.items() if value is not None}
                changes = norm.take_values(adapter_name, values)
                translated |= {f"{start}{path}.{attribute}": change for attribute, change in changes.items()}
                for attribute in norm.adapter_layer_names:
                    if (change := translated.pop(f"{start}{path}.{attribute}", None)) is not None:
                        translated[f"{start}{path}.{attribute}.values"] = change
    return translated


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
