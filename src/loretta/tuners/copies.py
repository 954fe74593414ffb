"""Copies of whole modules that belong to an adapter: trained, tensorised, or frozen and only saved with it."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_layer_requires_grad
from torch import Tensor, nn

from loretta import tt
from loretta.errors import InputError
from loretta.layers.fused import HALF
from loretta.layers.trains import TTLinear
from loretta.tuners.layer import brought_here, freeze_in_dtype, is_offloaded
from loretta.tuners.mixed import in_turn
from loretta.tuners.norms import call_here
from loretta.wording import listed


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPolicy:
    """How one adapter treats its copy of a module. Paths are relative to the module; "" is the module itself."""

    tensorized: tuple[str, ...] = ()
    as_change: bool = False  # the train is added to the base's layer instead of standing in for it
    saves_base: bool = False  # that layer is saved with the adapter, for it may be nowhere else
    frozen: bool = False  # all but the tensorised layers
    widened: bool = True  # of a base in half precision what trains holds float32
    rank: int = 1
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


def check_one_of_each(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise InputError where several adapters have their own copy of a module, or of its rows: one of them can act."""
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            held = [each for each in dict.fromkeys(adapter_names) if each in wrapper._get_available_adapters()]
            if len(held) > 1:
                what = "a copy" if isinstance(wrapper, ModulesToSaveWrapper) else "rows of tokens"
                raise InputError(
                    f"only one of the adapters {listed(held)} can be active at a time, for each has {what} of '{name}'"
                )


class ChangedLinear(TTLinear):
    """A frozen dense layer plus the change of a train, which starts as the layer's TT-SVD minus itself.

    It holds the dense weight itself: a copied module lies apart from the one that was copied.
    """

    base_weight: Tensor
    base_bias: Tensor | None

    @classmethod
    def from_dense(cls, dense: nn.Linear, shape: tt.TTShape, *, as_change: bool = True) -> "ChangedLinear":
        """No change of ``dense`` at first, to the last bit."""
        layer = cast(ChangedLinear, super().from_dense(_widened(dense), shape, as_change=as_change))
        layer.register_buffer("base_weight", dense.weight.detach().clone())
        layer.register_buffer("base_bias", None if dense.bias is None else dense.bias.detach().clone())
        return layer

    def forward(self, x_BI: Tensor) -> Tensor:
        return nn.functional.linear(x_BI, self.base_weight, self.base_bias) + super().forward(x_BI)

    @torch.no_grad()
    def to_dense(self, pretrained: nn.Linear | None = None) -> nn.Linear:
        """The dense layer with the same effect."""
        base = nn.Linear(self.in_features, self.out_features, device="meta")
        base.weight = nn.Parameter(self.base_weight)
        base.bias = None if self.base_bias is None else nn.Parameter(self.base_bias)  # type: ignore[assignment]
        return super().to_dense(pretrained=base)


def _widened(dense: nn.Linear) -> nn.Linear:
    """The layer in float32 where it has half precision, in which small steps of its cores would be lost."""
    if dense.weight.dtype not in HALF:
        return dense
    return copy.deepcopy(dense).float()


class AdapterCopy(ModulesToSaveWrapper):
    """PEFT's trained-and-saved copy of a module, which may hold a train in place of a dense layer, or be frozen.

    PEFT finds this wrapper already in place when it comes to ``modules_to_save`` and only calls :meth:`update`,
    so saving, loading and switching stay PEFT's.

    Of a base in half precision a trained copy holds float32, in which small steps are not lost, and computes with what
    that rounds to.
    """

    # PEFT tells by this that what is not saved with an adapter is none of the base model's either
    other_param_names = ("modules_to_save",)

    def __init__(self, module: nn.Module, adapter_name: str, policy: CopyPolicy) -> None:
        self.policies = {adapter_name: policy}
        self.before_merge: list[str] | None = None  # the active adapters, while a merged one computes in their place
        self.labels: Any = None  # of a final layer: loretta.tuners.labels.Labels
        # replicas of DataParallel have no parameters to list
        self.parameter_names = tuple(name for name, _ in module.named_parameters())
        super().__init__(module, adapter_name)

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs) -> None:
        is_new = adapter_name not in self.modules_to_save
        super().update(adapter_name, tied_module=tied_module, **kwargs)
        policy = self._policy(adapter_name)
        for path in policy.tensorized if is_new else ():
            self._tensorize(adapter_name, path, policy)
        for _, own, base in self._dense(adapter_name) if is_new and policy.widened and not policy.frozen else ():
            own.data = own.data.to(torch.float32 if base.dtype in HALF else own.dtype)
        self.freeze()
        self.show_labels()

    def _dense(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Of each parameter that is in no train: its name, the adapter's own, and the base model's."""
        trains = tuple(f"{path}." for path in self._policy(adapter_name).tensorized)
        for name in () if "." in trains else self.parameter_names:
            if not name.startswith(trains):
                find = attrgetter(name)
                yield name, find(self.modules_to_save[adapter_name]), find(self.original_module)

    def to_base_dtype(self, adapter_name: str) -> None:
        """Hold one adapter's copy in the dtype of the base."""
        for _, own, base in self._dense(adapter_name) if adapter_name in self.modules_to_save else ():
            own.data = own.data.to(base.dtype)

    def _compute(self, adapter_name: str, args: Any, kwargs: Any) -> Any:
        copied = self.modules_to_save[adapter_name]
        return call_here(copied, copied.modules(), lambda: self._rounded(adapter_name), args, kwargs)

    def _rounded(self, adapter_name: str) -> dict[str, Tensor]:
        """What a copy in float32 computes with, where the base has half precision."""
        return {
            name: own.to(base.dtype)
            for name, own, base in self._dense(adapter_name)
            if base.dtype in HALF and own.dtype == torch.float32
        }

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return self.original_module(*args, **kwargs)
        return self._compute(self.active_adapters[0], args, kwargs)

    def show_labels(self) -> None:
        """Have the model's config hold the label names of the adapter that computes."""
        if self.labels is not None:
            self.labels.show(None if self.disable_adapters else next(iter(self.active_adapters), None))

    def _tensorize(self, adapter_name: str, path: str, policy: CopyPolicy) -> None:
        copied = self.modules_to_save[adapter_name]
        dense = cast(nn.Linear, copied.get_submodule(path))
        shape = tt.plan_shape(dense.in_features, dense.out_features, rank=policy.rank, overrides=policy.shapes)
        as_change = policy.as_change
        train = ChangedLinear.from_dense(dense, shape) if as_change else TTLinear.from_dense(_widened(dense), shape)
        # an adapter that is added beside the active one is not trained yet
        train.requires_grad_(dense.weight.requires_grad)
        if path:
            copied.set_submodule(path, train)
        else:
            self.modules_to_save[adapter_name] = train

    def freeze(self) -> None:
        """Freeze parts of the copies again, after PEFT or transformers has made them trainable as a whole."""
        for adapter_name, policy in self.policies.items():
            if adapter_name not in self.modules_to_save:
                continue
            copied = self.modules_to_save[adapter_name]
            for path in policy.tensorized if policy.as_change else ():
                train = copied.get_submodule(path)
                if isinstance(train, ChangedLinear) and train.start is not None:
                    # rounded as the cores have been, as by TRL: they were equal
                    freeze_in_dtype(train.start, train.cores.values.dtype)
            trained = self.trained(adapter_name)
            for name, parameter in copied.named_parameters():
                if name not in trained and parameter.requires_grad:
                    parameter.requires_grad_(False)

    def trained(self, adapter_name: str) -> set[str]:
        """The parameters of one adapter's copy that train while it is active."""
        policy = self._policy(adapter_name)
        trains = tuple(f"{path}.".lstrip(".") for path in policy.tensorized)
        names = {name for name, _ in self.modules_to_save[adapter_name].named_parameters()}
        return {name for name in names if name.startswith(trains)} if policy.frozen else names

    def saved(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of one adapter's copy that its file holds."""
        tensors = self.modules_to_save[adapter_name].state_dict()
        return {name: tensor for name, tensor in tensors.items() if self._is_saved(adapter_name, name)}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As PEFT's, without the dense layers that came with the base model."""
        keys = super().adapter_state_dict_load_map(adapter_name)
        return {key: value for key, value in keys.items() if self._is_saved(adapter_name, key)}

    def adapter_state_dict(  # type: ignore[override] # as ModulesToSaveWrapper's own
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, without the dense layers that came with the base model."""
        tensors = super().adapter_state_dict(adapter_name, state_dict)
        saved = {key: value for key, value in tensors.items() if self._is_saved(adapter_name, key)}
        return brought_here(self.modules_to_save[adapter_name], saved) if saved else {}

    def _is_saved(self, adapter_name: str, key: str) -> bool:
        policy = self._policy(adapter_name)
        of_base = {f"{path}.{name}".lstrip(".") for path in policy.tensorized for name in ("base_weight", "base_bias")}
        return policy.saves_base or key not in of_base

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's. Where a base is loaded later than its adapters, their trains are a change of that base."""
        for adapter_name, policy in self.policies.items():
            for path in policy.tensorized if policy.as_change else ():
                for name in ("weight", "bias"):
                    own = _key(prefix, "modules_to_save", adapter_name, path, f"base_{name}")
                    base = state_dict.get(_key(prefix, "original_module", path, name))
                    if base is not None and own not in state_dict:
                        state_dict[own] = base.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """As PEFT's, for any number of active adapters; the next ones may have a copy where this one has none."""
        if adapter_name in self.modules_to_save:
            self._adapters.remove(adapter_name)
            del self.modules_to_save[adapter_name]
        self.policies.pop(adapter_name, None)
        active = [name for name in new_active_adapters or [] if name in self.modules_to_save]
        if self.before_merge is not None:
            self.before_merge = active
        elif active != self.active_adapters:  # otherwise what trains stays as it is, too
            self.set_adapter(active)
        if self.labels is not None:
            self.labels.by_adapter.pop(adapter_name, None)

    def follow_merge(self, merged: list[str]) -> None:
        """Compute with the copy of the adapter that is merged into the base weights, active or not.

        Two heads cannot be one: the active adapter's stays then.
        """
        if self.before_merge is not None:
            self._active_adapter, self.before_merge = _as_pefts(self.before_merge), None
        self.merged_adapters = [name for name in merged if name in self.modules_to_save]
        if merged and len(self.merged_adapters) < 2:
            self.before_merge, self._active_adapter = self.active_adapters, self.merged_adapters
        self.show_labels()

    def _mixed_batch_forward(self, input: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """As PEFT's, for any module that maps rows to rows: whole heads, not only linear layers."""

        def compute(name: str, rows: list[int]) -> Tensor:
            if name in self.modules_to_save:
                return self._compute(name, (input[rows], *args), kwargs)
            return self.original_module(input[rows], *args, **kwargs)

        return in_turn(adapter_names, compute)

    def is_frozen(self, adapter_name: str) -> bool:
        """Whether one adapter saves the module and trains nothing of it."""
        policy = self._policy(adapter_name)
        return policy.frozen and not policy.tensorized

    def _policy(self, adapter_name: str) -> CopyPolicy:
        return self.policies.get(adapter_name, CopyPolicy())

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.freeze()
        self.show_labels()

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__  # PEFT's messages print the module, and programs look for this name

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """As PEFT's, but no name is active once the last adapter has been deleted."""
        return super().check_set_adapter(adapter_name) if adapter_name else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's. Adapters without a copy here are passed over: transformers names them all.

        Raises ValueError for two heads.
        """
        wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = [name for name in wanted if name in self.modules_to_save]
        if len(names) > 1:
            raise ValueError(f"only one of the heads of {', '.join(names)} can be active at a time")
        self._active_adapter, self.before_merge = _as_pefts(names), None
        # freeze all others: PEFT freezes the one active before, and in transformers' add_adapter that is the new one
        for name, copied in self.modules_to_save.items():
            _set_layer_requires_grad(copied, name in names and not inference_mode)
        self.freeze()
        self.show_labels()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self.freeze()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module as it was, or (merged) the adapter's copy with plain dense layers."""
        names = [name for name in adapter_names or self.active_adapters if name in self.modules_to_save]
        if self.labels is not None:
            self.labels.show(names[0] if merge and names else None)
        if not merge or not names:
            return self.original_module
        if len(names) > 1:
            raise ValueError(
                f"cannot merge the heads of {', '.join(names)} into one: name one of them in adapter_names"
            )
        self.to_base_dtype(names[0])
        module = self.modules_to_save[names[0]]
        for path, train in list(module.named_modules()):
            if isinstance(train, TTLinear):
                dtype = cast(nn.Linear, self.original_module.get_submodule(path)).weight.dtype
                dense = train.to_dense().to(dtype)
                if not path:
                    return dense
                module.set_submodule(path, dense)
        return module


def _key(prefix: str, *parts: str) -> str:
    return prefix + ".".join(part for part in parts if part)


def rename_copy(wrapper: ModulesToSaveWrapper, old: str, new: str) -> None:
    """Give one adapter's copy of a module another name."""
    if old in wrapper.modules_to_save:
        wrapper.modules_to_save[new] = wrapper.modules_to_save.pop(old)
        wrapper._adapters = wrapper._adapters - {old} | {new}
        wrapper._active_adapter = _as_pefts([new if name == old else name for name in wrapper.active_adapters])
        if isinstance(wrapper, AdapterCopy):
            wrapper.policies = {new if name == old else name: policy for name, policy in wrapper.policies.items()}
            if wrapper.labels is not None and old in wrapper.labels.by_adapter:
                wrapper.labels.by_adapter[new] = wrapper.labels.by_adapter.pop(old)
            if wrapper.before_merge is not None:
                wrapper.before_merge = [new if name == old else name for name in wrapper.before_merge]


def _as_pefts(names: list[str]) -> Any:
    """Active adapters as PEFT holds them: a single one as a name, because PEFT compares it with names."""
    return names[0] if len(names) == 1 else names


def check_copies_are_here(model: nn.Module, copies: bool) -> None:
    """Refuse norms, scales and whole modules beside a base that accelerate has offloaded: there is nothing to copy."""
    if copies and (name := next((name for name, module in model.named_modules() if is_offloaded(module)), None)):
        raise InputError(
            f"norms, scales and heads cannot be trained where accelerate has offloaded '{name}', whose values are not "
            "here: offload after the adapter is on the model, or set train_norms=False, with no scales, no head and no "
            "modules_to_save"
        )


def shares_weights(model: nn.Module, name: str) -> bool:
    """Whether other modules of ``model`` hold a weight of the module that the copies of this name stand in for."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    copied = cast(ModulesToSaveWrapper, model.get_submodule(name))
    return any(owners[id(parameter)] > 1 for parameter in copied.original_module.parameters())
