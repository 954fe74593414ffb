"""What is trained beside the trains: layer norms, and the classification head (LoRETTA sections 3.2 and B).

Both go through PEFT's ``modules_to_save`` machinery, so that they are copied per adapter, saved with it, and the
base model stays as it was when the adapter is disabled or unloaded.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft import TaskType
from peft.utils.other import ModulesToSaveWrapper, _set_layer_requires_grad
from torch import Tensor, nn
from torch.func import functional_call

from loretta import tt
from loretta.errors import InputError
from loretta.layers.trains import TTLinear
from loretta.tuners.config import LorettaConfig

_NORM_CLASS = re.compile(r"(Layer|RMS|Group)Norm")
# What PEFT itself puts into modules_to_save for a task, and BART's head, which it overlooks
_FINAL_LAYERS: dict[str | None, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score", "classification_head"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# The hidden layer between the encoder and the final layer, where it lies outside the module above
_HIDDEN_LAYERS = ("pooler.dense", "head.dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPolicy:
    """How one adapter treats its copy of a module. Paths are relative to the module; "" is the module itself."""

    is_norm: bool = False  # the changes that several adapters make to it add up
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
        self.standing_in: list[str] | None = None  # adapters that compute in place of the active ones, while merged
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

    @property
    def is_norm(self) -> bool:
        """Whether several adapters may be active here: a norm is linear in its parameters, so changes add up."""
        return bool(self.modules_to_save) and all(self._policy(name).is_norm for name in self.modules_to_save)

    def parameters_of(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The base module's parameters plus the weighted sum of what each named adapter changes in them."""
        copies = [(weight, dict(self.modules_to_save[name].named_parameters())) for name, weight in weights.items()]
        return {
            name: base + sum((weight * (copy[name] - base) for weight, copy in copies), torch.zeros_like(base))
            for name, base in self.original_module.named_parameters()
        }

    @torch.no_grad()
    def assign(self, adapter_name: str, weights: Mapping[str, float]) -> None:
        """Overwrite one adapter's copy with :meth:`parameters_of` the others."""
        for name, value in self.parameters_of(weights).items():
            self.modules_to_save[adapter_name].get_parameter(name).copy_(value)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """As PEFT's, for any number of active adapters; the next ones may have a copy where this one has none."""
        if adapter_name in self.modules_to_save:
            self._adapters.remove(adapter_name)
            del self.modules_to_save[adapter_name]
        self.policies.pop(adapter_name, None)
        active = [name for name in new_active_adapters or [] if name in self.modules_to_save]
        if active != self.active_adapters:  # otherwise what trains stays as it is, too
            self.set_adapter(active)

    def widen(self, adapter_name: str) -> None:
        """Hold one adapter's copy of a norm in float32 where the base's has half precision.

        Its weights are near 1, where the numbers of bfloat16 lie 0.008 apart: smaller steps of training are lost.
        The base computes on in its own dtype.
        """
        if self._policy(adapter_name).is_norm and adapter_name in self.modules_to_save:
            for parameter in self.modules_to_save[adapter_name].parameters():
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()

    def _is_wider(self, adapter_name: str) -> bool:
        if not self._policy(adapter_name).is_norm:
            return False
        mine, its = (next(m.parameters()) for m in (self.modules_to_save[adapter_name], self.original_module))
        return mine.dtype != its.dtype

    def _call_with(self, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The base module's forward pass with other parameters, in its own dtype."""
        dtypes = {name: parameter.dtype for name, parameter in self.original_module.named_parameters()}
        cast = {name: value.to(dtypes[name]) for name, value in parameters.items()}
        return functional_call(self.original_module, cast, args, kwargs)

    def _forward_of(self, names: list[str], args: Any, kwargs: Any) -> Any:
        """What the module computes with the changes of the named adapters, each of which has a copy here."""
        if not names:
            return self.original_module(*args, **kwargs)
        if len(names) > 1:
            return self._call_with(self.parameters_of(dict.fromkeys(names, 1.0)), args, kwargs)
        if self._is_wider(names[0]):
            return self._call_with(dict(self.modules_to_save[names[0]].named_parameters()), args, kwargs)
        result = self.modules_to_save[names[0]](*args, **kwargs)
        return result + self.original_module(*args, **kwargs) if self._policy(names[0]).as_change else result

    def _forward_wrapped(self, *args, **kwargs):
        return self._forward_of(self.active_adapters if self.standing_in is None else self.standing_in, args, kwargs)

    def _forward_wrapped_mixed_batch(self, x, active_adapter, *args, **kwargs):
        return self._forward_of([active_adapter], (x, *args), kwargs)

    def follow_merge(self, merged: list[str]) -> None:
        """Compute with the copies of the adapters that are merged into the base weights, active or not.

        Two heads cannot be one: the active adapter's stays then.
        """
        self.merged_adapters = [name for name in merged if name in self.modules_to_save]
        follows = bool(merged) and (self.is_norm or len(self.merged_adapters) < 2)
        self.standing_in = self.merged_adapters if follows else None

    def _mixed_batch_forward(self, input, *args, adapter_names, **kwargs):
        """As PEFT's, for any module that maps rows to rows: norms and whole heads, not only linear layers."""
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
        return result

    def _policy(self, adapter_name: str) -> CopyPolicy:
        return self.policies.get(adapter_name, CopyPolicy())

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._apply_frozen()

    def summed(self, adapter_names: str | list[str]) -> list[str]:
        """Those of a list of adapters that change this norm; none for a single name, or what is not a norm."""
        if isinstance(adapter_names, str) or not self.is_norm:
            return []
        return [name for name in adapter_names if name in self.modules_to_save]

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """As PEFT's, which allows one name; several norms are activated by :meth:`LorettaModel.set_adapter`.

        No name at all is what is active once the last adapter has been deleted.
        """
        if not adapter_name:
            return None
        if self.is_norm and not isinstance(adapter_name, str):
            here = self.summed(adapter_name)
            return here[0] if len(here) == 1 else None
        return super().check_set_adapter(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, for several norms too. Adapters without a copy here are passed over: transformers names them all.

        Raises ValueError for two heads.
        """
        wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = [name for name in wanted if name in self.modules_to_save]
        if len(names) > 1 and not self.is_norm:
            raise ValueError(f"only one of the heads of {', '.join(names)} can be active at a time")
        active: Any = names[0] if len(names) == 1 else names  # PEFT compares a single one with a name
        self._active_adapter = active
        # all others are frozen: PEFT freezes the one active before, which in transformers' add_adapter is the new one
        for name, copy in self.modules_to_save.items():
            _set_layer_requires_grad(copy, name in names and not inference_mode)
        self._apply_frozen()

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._apply_frozen()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names) -> nn.Module:
        """The base module as it was, or (merged) the adapter's copy with plain dense layers; of norms, the sum."""
        names = [name for name in adapter_names or self.active_adapters if name in self.modules_to_save]
        if not merge or not names:
            return self.original_module
        module = self.modules_to_save[names[0]]
        if len(names) > 1 and not self.is_norm:
            raise ValueError(
                f"cannot merge the heads of {', '.join(names)} into one: name one of them in adapter_names"
            )
        if len(names) > 1:
            self.assign(names[0], dict.fromkeys(names, 1.0))
        if self._is_wider(names[0]):
            return module.to(next(self.original_module.parameters()).dtype)
        if isinstance(module, TTLinear):
            return module.to_dense(self.original_module if module.start is not None else None)
        for name, child in list(module.named_modules()):
            if isinstance(child, TTLinear):
                module.set_submodule(name, child.to_dense())
        return module


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCost:
    """Numbers beside the trains: trained in norms and head, and saved with the adapter though frozen."""

    norms: int
    head: int
    frozen: int
    parts: tuple[str, ...] = ()  # what happens to each module of the head, in words


def copy_cost(model: nn.Module, config: LorettaConfig) -> CopyCost:
    """What :func:`install_copies` and the user's ``modules_to_save`` will add, counted on sizes alone.

    Raises InputError when a given shape does not fit the head's hidden layer.
    """
    heads = _head_policies(config, model)
    norms = _norm_names(model, inside=tuple(name + "." for name in heads)) if config.train_norms else []
    head = frozen = 0
    parts: list[str] = []
    for name, policy in heads.items():
        copy, trains = model.get_submodule(name), 0
        total = sum(parameter.numel() for parameter in copy.parameters())
        for path in policy.tensorized:
            dense = cast(nn.Linear, copy.get_submodule(path))
            try:
                shape = tt.plan_shape(dense.in_features, dense.out_features, rank=policy.rank, overrides=policy.shapes)
            except ValueError as error:
                raise InputError(f"'{name}': {error}") from None
            trains += shape.n_params + (0 if dense.bias is None else dense.bias.numel())
            total -= sum(parameter.numel() for parameter in dense.parameters())
            frozen += shape.n_params if policy.as_change else 0
        parts.append(f"{name}: {_in_words(policy)}")
        head += trains + (0 if policy.frozen else total)
        frozen += total if policy.frozen else 0
    ours = {*heads, *norms}
    for name, module in model.named_modules():
        wanted = name not in ours and any(name.endswith(ending) for ending in config.modules_to_save or [])
        if name and wanted:
            head += sum(parameter.numel() for parameter in module.parameters())
    norm_total = sum(parameter.numel() for name in norms for parameter in model.get_submodule(name).parameters())
    return CopyCost(norms=norm_total, head=head, frozen=frozen, parts=tuple(parts))


def _in_words(policy: CopyPolicy) -> str:
    if policy.as_change:
        return "pretrained; a train is added to it, which starts as its TT-SVD and as no change"
    hidden = "a train that starts as its TT-SVD"
    if policy.tensorized == ("",):
        return hidden
    rest = "frozen, and saved because it is random" if policy.frozen else "a plain dense layer, trained whole"
    return f"its hidden layer is {hidden}; its final layer is {rest}" if policy.tensorized else rest


def install_copies(model: nn.Module, config: LorettaConfig, adapter_name: str) -> list[str]:
    """Wrap the head and the norms that ``config`` asks for. Returns the names for ``modules_to_save``.

    PEFT activates the copies later, when it goes through ``modules_to_save``.
    """
    heads = _head_policies(config, model)
    norms = _norm_names(model, inside=tuple(name + "." for name in heads)) if config.train_norms else []
    for name, policy in {**heads, **{name: CopyPolicy(is_norm=True) for name in norms}}.items():
        module = model.get_submodule(name)
        if isinstance(module, AdapterCopy):
            module.policies[adapter_name] = policy
        elif not isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, AdapterCopy(module, adapter_name, policy))
    return [*heads, *_short_endings(norms, model)]


def rename_copies(model: nn.Module, old: str, new: str) -> None:
    """Give one adapter's copies, those of the user's ``modules_to_save`` included, another name."""
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or old not in wrapper.modules_to_save:
            continue
        wrapper.modules_to_save[new] = wrapper.modules_to_save.pop(old)
        wrapper._adapters = wrapper._adapters - {old} | {new}
        names: list[str] = [new if name == old else name for name in wrapper.active_adapters]
        wrapper._active_adapter = names
        if isinstance(wrapper, AdapterCopy) and old in wrapper.policies:
            wrapper.policies[new] = wrapper.policies.pop(old)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm (of any library) with parameters of its own."""
    return bool(_NORM_CLASS.search(type(module).__name__)) and any(True for _ in module.parameters(recurse=False))


def norm_names(model: nn.Module) -> list[str]:
    """Endings (or full names) that PEFT matches to every layer norm of ``model`` and to nothing else."""
    return _short_endings(_norm_names(model, inside=()), model)


def head_names(model: nn.Module, config: LorettaConfig) -> list[str]:
    """Names of the modules of the head that are copied whole under ``config.task_type``."""
    return list(_head_policies(config, model))


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Named modules without the insides of earlier adapters' copies."""
    wrappers = [name + "." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    return {name: module for name, module in model.named_modules() if name and not name.startswith(tuple(wrappers))}


def _head_policies(config: LorettaConfig, model: nn.Module) -> dict[str, CopyPolicy]:
    """Module name -> policy for the head under ``config.task_type``; empty where the task has none."""
    endings = _FINAL_LAYERS.get(config.task_type, ())
    if not endings:
        return {}
    modules = _modules(model)
    finals = [name for name in modules if name.endswith(endings)]
    finals = [name for name in finals if not any(name.startswith(other + ".") for other in finals)]
    tensorize = config.train_head.startswith("tensorized")
    policy = partial(CopyPolicy, rank=config.tensor_rank, shapes=config.shapes)
    policies = {}
    for name in finals:
        has_hidden = isinstance(getattr(_original(modules[name]), "dense", None), nn.Linear)
        is_hidden = name.endswith("pre_classifier")  # DistilBERT: PEFT takes it for a final layer by its ending
        path = "" if is_hidden else "dense"
        policies[name] = policy(
            tensorized=(path,) if tensorize and (has_hidden or is_hidden) else (),
            # the hidden layer is tensorised whole, and trains unless nothing of the head does
            frozen=config.train_head == "frozen" or (config.train_head == "tensorized_only" and not is_hidden),
        )
    if not finals or config.task_type != TaskType.SEQ_CLS:
        return policies
    for name, module in modules.items():
        if not name.endswith(_HIDDEN_LAYERS) or name.startswith(tuple(final + "." for final in finals)):
            continue
        pretrained = _is_pretrained(model, name, _original(module))
        if config.train_head != "frozen":
            policies[name] = policy(tensorized=("",) if tensorize else (), as_change=tensorize and pretrained)
        elif not pretrained:
            policies[name] = policy(frozen=True)
    return policies


def _is_pretrained(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a hidden layer came with the checkpoint, or was made at random with the head.

    It lies inside the base model then. A checkpoint may still lack it (BERT saved as a masked language model has no
    pooler); transformers marks what it did load, and starts the rest with a bias of zeros.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not name.startswith(prefix + "."):
        return False
    weight, bias = cast(nn.Linear, module).weight, cast(nn.Linear, module).bias
    was_loaded = getattr(weight, "_is_hf_initialized", False)
    return was_loaded or bias is None or bias.is_meta or bool(bias.any())


def _norm_names(model: nn.Module, inside: tuple[str, ...]) -> list[str]:
    """Full names of the layer norms, but for those inside the head, which are copied with it."""
    return [
        name for name, module in _modules(model).items() if not name.startswith(inside) and is_norm(_original(module))
    ]


def _short_endings(names: Sequence[str], model: nn.Module) -> list[str]:
    """Endings that name all of ``names`` and no other module, as PEFT matches them; full names where none do."""
    others = _modules(model).keys() - set(names)
    chosen: dict[str, None] = {}
    for name in names:
        ending = name.rpartition(".")[2]
        ambiguous = ending.isdecimal() or any(other.endswith(ending) for other in others)
        chosen[name if ambiguous else ending] = None
    return list(chosen)
