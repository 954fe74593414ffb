"""Copies of whole modules: trained and saved with an adapter, with a train in place of a dense layer, or frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper, _set_layer_requires_grad
from torch import Tensor, nn

from loretta import tt
from loretta.layers.trains import TTLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPolicy:
    """How one adapter treats its copy of a module. Paths are relative to the module; "" is the module itself."""

    tensorized: tuple[str, ...] = ()
    as_change: bool = False  # the train is added to the pretrained layer instead of standing in for it
    frozen: bool = False  # all but the tensorised layers
    rank: int = 1
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


class AdapterCopy(ModulesToSaveWrapper):
    """PEFT's trained-and-saved copy of a module, which may hold a train in place of a dense layer, or be frozen.

    PEFT finds this wrapper already in place when it comes to ``modules_to_save`` and only calls :meth:`update`,
    so saving, loading and switching stay PEFT's.
    """

    def __init__(self, module: nn.Module, adapter_name: str, policy: CopyPolicy) -> None:
        self.policies = {adapter_name: policy}
        self.standing_in: str | None = None  # computes in place of the active adapter, while it is merged
        self.follows_merge = False
        super().__init__(module, adapter_name)

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs) -> None:
        is_new = adapter_name not in self.modules_to_save
        super().update(adapter_name, tied_module=tied_module, **kwargs)
        policy = self._policy(adapter_name)
        for path in policy.tensorized if is_new else ():
            self._tensorize(adapter_name, path, policy)
        self._apply_frozen()

    def _tensorize(self, adapter_name: str, path: str, policy: CopyPolicy) -> None:
        copy = self.modules_to_save[adapter_name]
        dense = cast(nn.Linear, copy.get_submodule(path))
        shape = tt.plan_shape(dense.in_features, dense.out_features, rank=policy.rank, overrides=policy.shapes)
        train = TTLinear.from_dense(dense, shape, as_change=policy.as_change)
        # an adapter that is added beside the active one is not trained yet
        train.requires_grad_(dense.weight.requires_grad)
        if path:
            copy.set_submodule(path, train)
        else:
            self.modules_to_save[adapter_name] = train

    def _apply_frozen(self) -> None:
        """Freeze again what PEFT, which trains whole copies, has just set trainable."""
        for adapter_name, policy in self.policies.items():
            if adapter_name not in self.modules_to_save:
                continue
            trained = tuple(path + "." for path in policy.tensorized)
            for name, parameter in self.modules_to_save[adapter_name].named_parameters():
                if policy.frozen and not name.startswith(trained):
                    parameter.requires_grad_(False)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """As PEFT's, for any number of active adapters; the next ones may have a copy where this one has none."""
        if adapter_name in self.modules_to_save:
            self._adapters.remove(adapter_name)
            del self.modules_to_save[adapter_name]
        self.policies.pop(adapter_name, None)
        active = [name for name in new_active_adapters or [] if name in self.modules_to_save]
        if active != self.active_adapters:  # otherwise what trains stays as it is, too
            self.set_adapter(active)

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Tensor:
        name = self.standing_in if self.follows_merge else next(iter(self.active_adapters), None)
        return self.original_module(*args, **kwargs) if name is None else self._forward_of(name, args, kwargs)

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward_of(active_adapter, (x, *args), kwargs)

    def _forward_of(self, name: str, args: Any, kwargs: Any) -> Tensor:
        result = self.modules_to_save[name](*args, **kwargs)
        return result + self.original_module(*args, **kwargs) if self._policy(name).as_change else result

    def follow_merge(self, merged: list[str]) -> None:
        """Compute with the copy of the adapter that is merged into the base weights, active or not.

        Two heads cannot be one: the active adapter's stays then.
        """
        here = [name for name in merged if name in self.modules_to_save]
        self.merged_adapters = here
        self.follows_merge = bool(merged) and len(here) < 2
        self.standing_in = here[0] if len(here) == 1 else None

    def _mixed_batch_forward(self, input: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """As PEFT's, for any module that maps rows to rows: whole heads, not only linear layers."""
        result = None
        for name in sorted(set(adapter_names)):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            if name in self.modules_to_save:
                part = self._forward_wrapped_mixed_batch(input[rows], name, *args, **kwargs)
            else:
                part = self.original_module(input[rows], *args, **kwargs)
            if result is None:
                result = part.new_empty(len(input), *part.shape[1:])
            result[rows] = part
        return cast(Tensor, result)

    def _policy(self, adapter_name: str) -> CopyPolicy:
        return self.policies.get(adapter_name, CopyPolicy())

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._apply_frozen()

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """As PEFT's, but no name at all is what is active once the last adapter has been deleted."""
        return super().check_set_adapter(adapter_name) if adapter_name else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's. Adapters without a copy here are passed over: transformers names them all.

        Raises ValueError for two heads.
        """
        wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = [name for name in wanted if name in self.modules_to_save]
        if len(names) > 1:
            raise ValueError(f"only one of the heads of {', '.join(names)} can be active at a time")
        active: Any = names[0] if names else []  # PEFT compares a single one with a name
        self._active_adapter = active
        # all others are frozen: PEFT freezes the one active before, which in transformers' add_adapter is the new one
        for name, copy in self.modules_to_save.items():
            _set_layer_requires_grad(copy, name in names and not inference_mode)
        self._apply_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._apply_frozen()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module as it was, or (merged) the adapter's copy with plain dense layers."""
        names = [name for name in adapter_names or self.active_adapters if name in self.modules_to_save]
        if not merge or not names:
            return self.original_module
        if len(names) > 1:
            raise ValueError(
                f"cannot merge the heads of {', '.join(names)} into one: name one of them in adapter_names"
            )
        module = self.modules_to_save[names[0]]
        if isinstance(module, TTLinear):
            return module.to_dense(self.original_module if module.start is not None else None)
        for name, child in list(module.named_modules()):
            if isinstance(child, TTLinear):
                module.set_submodule(name, child.to_dense())
        return module


def rename_copy(wrapper: ModulesToSaveWrapper, old: str, new: str) -> None:
    """Give one adapter's copy of a module another name."""
    if old in wrapper.modules_to_save:
        wrapper.modules_to_save[new] = wrapper.modules_to_save.pop(old)
        wrapper._adapters = wrapper._adapters - {old} | {new}
        active: list[Any] = [new if name == old else name for name in wrapper.active_adapters]
        wrapper._active_adapter = active[0] if len(active) == 1 else active  # PEFT compares a single one with a name
        if isinstance(wrapper, AdapterCopy) and old in wrapper.policies:
            wrapper.policies[new] = wrapper.policies.pop(old)
