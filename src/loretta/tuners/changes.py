"""Modules of the base that compute with changes which adapters hold beside them: trained norms and trained scales."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule, is_finite
from loretta.tuners.mixed import in_turn


class Change(nn.Module):
    """One adapter's change of one parameter of the base, or of what it is scaled by.

    It is a module so that the adapter's name stands between dots in the parameter's: TRL makes the reference of DPO
    and GRPO by copying what has ``.default.`` in its name, and would pass over a parameter that ends in ``.default``.
    """

    values: nn.Parameter

    def __init__(self, values: Tensor) -> None:
        nn.Module.__init__(self)
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)


class ChangedModule(AdaptedModule):
    """A module that computes with its base's parameters and the changes of the active adapters.

    The changes lie in dictionaries by adapter, one for each name, named after the prefix of the adapter's method and
    the ``kind`` of the module: ``loretta_rep_norm_weight`` and so on. They have at least float32 and start as zeros,
    with which the module computes what its base does to the last bit. Changes are held and not values: a change lies
    near zero, where every format has numbers close together, and a value near 1, where the numbers of bfloat16 are
    0.008 apart.
    """

    change_class: type[Change] = Change
    kind: str
    off: str  # the option that leaves such modules alone
    parameter_names: tuple[str, ...]  # of the base, which the changes act on

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.training = base_layer.training
        self.adapter_layer_names = ()
        self.other_param_names = ("known",)
        self.unmerged: dict[str, Tensor] = {}  # the base's own values, while adapters are merged into them

    def update_layer(self, adapter_name: str, prefix: str, *scaled: Any) -> None:
        """Add one adapter, of the method with this ``prefix``, whose changes are zeros: of scales, these of a layer."""
        raise NotImplementedError

    def hold(self, adapter_name: str, prefix: str, likes: Mapping[str, Tensor]) -> None:
        """Add changes of one adapter, of the method with this ``prefix``: zeros like the given tensors."""
        for name, value in likes.items():
            attribute = f"{prefix}{self.kind}_{name}"
            if attribute not in self._modules:
                setattr(self, attribute, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            dtype = torch.promote_types(value.dtype, torch.float32)
            getattr(self, attribute)[adapter_name] = self.change_class(torch.zeros_like(value, dtype=dtype))

    @property
    def held(self) -> list[str]:
        """The adapters that change this module."""
        return list(dict.fromkeys(name for at in self.adapter_layer_names for name in getattr(self, at)))

    def change(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The changes of one adapter, by their names; empty where it does not change this module."""
        return {name: getattr(self, at)[adapter_name].values for name, at in self.attributes(adapter_name).items()}

    def attributes(self, adapter_name: str) -> dict[str, str]:
        """The names of one adapter's changes, and of the dictionaries that hold them."""
        mark = f"_{self.kind}_"
        return {at.partition(mark)[2]: at for at in self.adapter_layer_names if adapter_name in getattr(self, at)}

    def with_changes(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The base's parameters under the weighted sum of the changes of some adapters, in the base's dtype.

        Empty where none of them changes this module.
        """
        raise NotImplementedError

    def _call_base(self, weights: Mapping[str, float], args: Any, kwargs: Any) -> Tensor:
        """What the base computes under these changes."""
        raise NotImplementedError

    def _beside(self, name: str) -> Tensor:
        """The parameter of the base whose device and dtype the change of this name has."""
        return self._own(name)

    def _own(self, name: str) -> Tensor:
        """A parameter of the base as it is without adapters. Replicas of DataParallel have no ``parameters()``."""
        return self.unmerged[name] if name in self.unmerged else getattr(self.base_layer, name)

    def _running(self) -> dict[str, float]:
        return {} if self.disable_adapters or self.merged else dict.fromkeys(self.active_adapters, 1.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base, in the shape and dtype that it gives, with the changes of the active adapters.

        ``adapter_names`` (one for each row of the first dimension) replace the active ones, as in PEFT.
        """
        adapter_names = self._take_names(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            return self._mixed(adapter_names, x, args, kwargs)
        return self._call_base(self._running(), (x, *args), kwargs)

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
            own = tuple(value[rows] if _has_rows_of(value, x) else value for value in (x, *args))
            named = {key: value[rows] if _has_rows_of(value, x) else value for key, value in kwargs.items()}
            return self._call_base({name: 1.0}, own, named)

        return in_turn(adapter_names, compute)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the parameters with the changes of ``adapter_names`` (default: the active ones) into the base.

        Those that are merged already, or have none here, are passed over. The updates around this module stay as they
        are. Raises ValueError when ``safe_merge`` finds a value that is not finite.
        """
        asked = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in asked if name in self.held and name not in self.merged_adapters]
        if not new:
            return
        with self.merged_before_others():
            self.check_around()
            values = self.with_changes(dict.fromkeys([*self.merged_adapters, *new], 1.0))
            if safe_merge and not all(map(is_finite, values.values())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {new[-1]} seems to be broken")
            for name, value in values.items():
                self.unmerged.setdefault(name, getattr(self.base_layer, name).detach())
                getattr(self.base_layer, name).data = value.detach()
            self.merged_adapters += new

    def unmerge(self) -> None:
        """Give the base its own values back, to the last bit. The updates around this module stay as they are."""
        with self.merged_before_others() if self.unmerged else nullcontext():
            for name, value in self.unmerged.items():
                getattr(self.base_layer, name).data = value
        # not before the layers around are merged again, which merge what is below them too
        self.unmerged, self.merged_adapters = {}, []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device alone. PEFT calls this after a load, and PEFT's own would round the changes."""
        for name, attribute in self.attributes(adapter_name).items():
            change = getattr(self, attribute)[adapter_name]
            if not change.values.is_meta:
                change.to(self._beside(name).device if device is None else device)

    def to_base_dtype(self, adapter_name: str) -> None:
        """Hold one adapter's changes in the dtype of the base."""
        for name, change in self.change(adapter_name).items():
            change.data = change.data.to(self._beside(name).dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "ChangedModule":
        self.unmerged = {name: fn(value) for name, value in self.unmerged.items()}
        return super()._apply(fn, recurse)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT asks right before it converts. Raises InputError: it stops here, whichever adapter trains this."""
        if adapter_name in self.held:
            raise InputError(
                f"the adapter {adapter_name!r} also trains {self.kind}s, which PEFT's conversion to LoRA would lose: "
                f"train with {self.off}, or export with --to merged"
            )
        raise InputError(
            f"PEFT cannot convert the adapter {adapter_name!r} on a model whose {self.kind}s "
            f"{self.held or 'an adapter'} trained: call loretta.export_lora, or load the adapter on a base model of "
            "its own"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not built yet
                raise
            return getattr(self.base_layer, name)


def _has_rows_of(value: Any, x: Tensor) -> bool:
    """Whether an input of a norm has a part for each row of ``x``, as the gate of Mamba 2's norms."""
    return isinstance(value, Tensor) and value.dim() == x.dim() and len(value) == len(x)


def put_changes(tuner: Any, kind: type[ChangedModule], name: str, adapter_name: str, *scaled: Any) -> ChangedModule:
    """Add one adapter's changes to the module of this name in a tuner's model, which becomes one of that ``kind``."""
    module = tuner.model.get_submodule(name)
    if not isinstance(module, kind):
        module = kind(module)
        module.set_adapter(tuner.active_adapters)
        tuner.model.set_submodule(name, module)
    if adapter_name not in module.held:
        module.update_layer(adapter_name, tuner.prefix, *scaled)
        is_active = adapter_name in tuner.active_adapters
        module.set_requires_grad(adapter_name, is_active and not tuner.peft_config[adapter_name].inference_mode)
    return module
