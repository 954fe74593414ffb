"""The classification head: what happens to each of its modules (LoRETTA section B), and the cost of head and norms."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from loretta import tt
from loretta.errors import InputError
from loretta.tuners.adapted import base_of
from loretta.tuners.config import LorettaConfig
from loretta.tuners.copies import AdapterCopy, CopyPolicy
from loretta.tuners.names import parts_of_adapters
from loretta.tuners.norms import is_norm, named_whole, norms_of, outer_modules, own_parameters
from loretta.tuners.schema import check_size
from loretta.tuners.task_types import AUTO_CLASSES, FINAL_LAYERS, HIDDEN_LAYERS, is_final, named_base
from loretta.tuners.tokens import rows_of_tokens
from loretta.wording import quoted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCost:
    """Numbers beside the trains: in norms, head and rows of tokens, and saved with the adapter though frozen."""

    norms: int
    head: int
    frozen: int
    tokens: int = 0
    parts: tuple[str, ...] = ()  # what happens to each module of the head, in words


def copy_cost(model: nn.Module, config: LorettaConfig) -> CopyCost:
    """What trained norms, the head, rows of tokens and ``modules_to_save`` will add, counted on sizes alone.

    Raises InputError when a given shape does not fit the head's hidden layer, for quantised modules, and for rows of
    tokens that cannot be trained.
    """
    heads = Head(model, config).policies
    whole = [name for name in named_whole(outer_modules(model), config) if name not in heads]
    _check_plain(model, [*heads, *whole])
    norms = norms_of(model, outside=[*heads, *whole]) if config.train_norms else []
    trained = Counter(norms=sum(_count(own_parameters(model.get_submodule(name))) for name in norms))
    frozen, parts = 0, []
    for name, policy in heads.items():
        copy = model.get_submodule(name)
        total = _count(copy.parameters())
        for path in policy.tensorized:
            dense = cast(nn.Linear, copy.get_submodule(path))
            size = dense.in_features, dense.out_features
            try:
                shape = tt.plan_shape(*size, rank=policy.rank, overrides=policy.shapes)
            except ValueError as error:
                raise InputError(f"'{name}': {error}") from None
            check_size(name, f"a train of rank {quoted(policy.rank)}", shape.n_params, size[0] * size[1])
            trained["head"] += shape.n_params + (0 if dense.bias is None else dense.bias.numel())
            total -= _count(dense.parameters())
            frozen += shape.n_params * policy.as_change + _count(dense.parameters()) * policy.saves_base
        parts.append(f"{name}: {_in_words(policy)}")
        if policy.frozen:
            frozen += total
        else:
            trained["norms" if is_norm(copy) else "head"] += total
    for name in whole:
        module = _original(model.get_submodule(name))
        trained["norms" if is_norm(module) else "head"] += _count(module.parameters())
    tokens = sum(rows_of_tokens(model, config).values())
    return CopyCost(norms=trained["norms"], head=trained["head"], frozen=frozen, tokens=tokens, parts=tuple(parts))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _check_plain(model: nn.Module, copied: Sequence[str]) -> None:
    """Refuse to copy modules whose weights are whole numbers, which no gradient reaches."""
    parts = {name: _original(model.get_submodule(name)).parameters() for name in copied}
    if packed := [name for name, own in parts.items() if not all(each.is_floating_point() for each in own)]:
        raise InputError(
            f"the adapter trains or saves {', '.join(map(repr, packed))} whole, and the base model was loaded with "
            f"quantised weights there: load it with llm_int8_skip_modules={packed} in its BitsAndBytesConfig"
        )


def _in_words(policy: CopyPolicy) -> str:
    rest = "frozen, and saved because it is random" if policy.frozen else "a plain dense layer, trained whole"
    if not policy.tensorized:
        return rest
    train = "a train that starts as its TT-SVD"
    if policy.as_change:
        kept = "kept, and saved because it may be nowhere else" if policy.saves_base else "pretrained"
        train = f"{kept}; a train is added to it, which starts as its TT-SVD and as no change"
    return train if policy.tensorized == ("",) else f"its hidden layer is {train}; its final layer is {rest}"


def agree_on_origins(model: nn.Module, config: LorettaConfig) -> None:
    """Have every process take over where the first one found the modules of the head to come from.

    With transformers' RAM-efficient loading for FSDP the others hold no weights, and take all of them for loaded.
    """
    if config.head_origins is None and is_fsdp_enabled():
        found = [Head(model, config).origins if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        config.head_origins = found[0]


def install_head(model: nn.Module, config: LorettaConfig, adapter_name: str) -> list[str]:
    """Wrap the modules of the head that ``config`` asks for. Returns their names, for ``modules_to_save``.

    PEFT activates the copies later, when it goes through ``modules_to_save``.
    """
    head = Head(model, config)
    config._origins_found = head.origins
    for name, policy in head.policies.items():
        logger.info("%s: %s", name, _in_words(policy))
        module = model.get_submodule(name)
        if isinstance(module, AdapterCopy):
            module.policies[adapter_name] = policy
        elif not isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, AdapterCopy(module, adapter_name, policy))
    _install_others(model, config, adapter_name)
    return list(head.policies)


def _install_others(model: nn.Module, config: LorettaConfig, adapter_name: str) -> None:
    """Wrap the user's ``modules_to_save`` as the head is: PEFT's own wrapper follows no merge, nor does it unload."""
    modules = outer_modules(model)
    for name in named_whole(modules, config):
        if not isinstance(modules[name], BaseTunerLayer | ModulesToSaveWrapper):
            model.set_submodule(name, AdapterCopy(modules[name], adapter_name, CopyPolicy(widened=False)))


def head_names(model: nn.Module, config: LorettaConfig) -> list[str]:
    """Names of the modules of the head that are copied whole under ``config.task_type``."""
    return list(Head(model, config).policies)


def _original(module: nn.Module) -> nn.Module:
    """The base model's own module, whatever other adapters have put around it."""
    return base_of(module.original_module if isinstance(module, ModulesToSaveWrapper) else module)


class Head:
    """The modules of a model's head for one task: where each comes from, and what happens to it.

    Attributes:
        origins: where each module comes from. "loaded": its weights came with the checkpoint. "fresh": transformers
            made them at random, and nobody has touched them since. "unknown": neither is sure. A module whose
            hidden layer gets a train has the origin of that layer. An adapter's file holds the origins for good.
        policies: what happens to each module that is copied. A train stands in for a fresh layer. To any other layer it
            is added, and the layer computes what it did before to the last bit. Layers that were not loaded are saved
            with the adapter.
    """

    def __init__(self, model: nn.Module, config: LorettaConfig) -> None:
        self.origins: dict[str, str] = {}
        self.policies: dict[str, CopyPolicy] = {}
        self._model, self._config = model, config
        if config.task_type not in FINAL_LAYERS:
            return
        adapted = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        self._modules = {n: _original(m) for n, m in outer_modules(model).items() if not n.startswith(adapted)}
        found = [name for name in self._modules if is_final(name, config.task_type)]
        self._finals = [name for name in found if not any(name.startswith(other + ".") for other in found)]
        for name in self._finals:
            self._add_final(name)
        for name in self._others():
            self._add_other(name)

    def _add_final(self, name: str) -> None:
        module, how = self._modules[name], self._config.train_head
        is_hidden = name.endswith("pre_classifier")  # DistilBERT: PEFT takes it for a final layer by its ending
        hidden = module if is_hidden else getattr(module, "dense", None)
        has_train = isinstance(hidden, nn.Linear) and how.startswith("tensorized")
        origin = self._origin(name, hidden if isinstance(hidden, nn.Linear) and has_train else module)
        self.policies[name] = self._policy(
            tensorized=("" if is_hidden else "dense",) if has_train else (),
            origin=origin,
            # the hidden layer is tensorised whole, and trains unless nothing of the head does
            frozen=how == "frozen" or (how == "tensorized_only" and not is_hidden),
        )

    def _add_other(self, name: str) -> None:
        module, how = self._modules[name], self._config.train_head
        n_labels = getattr(getattr(self._model, "config", None), "num_labels", None)
        is_hidden = isinstance(module, nn.Linear) and module.out_features != n_labels
        has_train = is_hidden and how.startswith("tensorized")
        frozen = how == "frozen" or (how == "tensorized_only" and not has_train)
        if is_norm(module):
            frozen = not self._config.train_norms
        origin = self._origin(name, module)
        if not (frozen and origin == "loaded"):
            self.policies[name] = self._policy(tensorized=("",) if has_train else (), origin=origin, frozen=frozen)

    def _policy(self, *, tensorized: tuple[str, ...], origin: str, frozen: bool) -> CopyPolicy:
        as_change = bool(tensorized) and origin != "fresh"
        return CopyPolicy(
            tensorized=tensorized,
            as_change=as_change,
            saves_base=as_change and origin == "unknown",
            frozen=frozen,
            rank=self._config.tensor_rank,
            shapes=self._config.shapes,
        )

    def _others(self) -> list[str]:
        """Modules of the head beside the final ones: around the base model, and fresh layers within it."""
        if self._config.head_origins is not None:
            return self._recorded(self._config.head_origins)
        inside = tuple(final + "." for final in self._finals)
        names = [name for name in self._modules if name not in self._finals and not name.startswith(inside)]
        leaves = [
            name
            for name in names
            if not any(True for _ in self._modules[name].children())
            and any(True for _ in self._modules[name].parameters())
            # a norm that nobody has touched is the same in every model
            and not (is_norm(self._modules[name]) and self._origin_of(name, self._modules[name]) != "unknown")
        ]
        around = [name for name in leaves if self._lies_around(name)]
        adapters = parts_of_adapters(self._model)  # transformers marks those that it loads, too
        knows = any(_is_marked(p) for n, p in self._model.named_parameters() if not n.startswith(adapters))
        fresh = [name for name in leaves if knows and is_fresh_layer(self._modules[name])]
        with_hidden = self._config.task_type == TaskType.SEQ_CLS
        hidden = [name for name in names if with_hidden and name.endswith(HIDDEN_LAYERS)]
        return [name for name in names if name in {*hidden, *around, *fresh}]

    def _recorded(self, origins: Iterable[str]) -> list[str]:
        recorded = [name for name in origins if name not in self._finals]
        if lacking := [name for name in recorded if name not in self._modules]:
            kind = AUTO_CLASSES.get(self._config.task_type or "")
            raise InputError(
                f"this adapter was trained for another base model, or with its head: it holds '{lacking[0]}' of one, "
                f"which this model does not have; load it with '{named_base(self._config)}'"
                f"{f' as {kind}' if kind else ''}"
            )
        return recorded

    def _lies_around(self, name: str) -> bool:
        """Whether a module is outside the base model, and outside any other whole model."""
        base = getattr(self._model, "base_model_prefix", "")
        if not isinstance(self._model, PreTrainedModel) or base not in self._model._modules:
            return False  # which part is the head cannot be told
        parents = name.split(".")[:-1]
        paths = [".".join(parents[: depth + 1]) for depth in range(len(parents))]
        return not any(isinstance(self._model.get_submodule(path), PreTrainedModel) for path in paths)

    def _origin(self, name: str, module: nn.Module) -> str:
        """As recorded in the adapter's file, else as the parameters tell."""
        if self._config.head_origins is not None and name in self._config.head_origins:
            origin, is_plan = self._config.head_origins[name], next(module.parameters()).is_meta
            if origin == "loaded" and not is_plan and self._origin_of(name, module) == "fresh":
                raise InputError(
                    f"this adapter was trained for a base model that brings '{name}', which is random here: load it "
                    f"with '{named_base(self._config)}'"
                )
        else:
            origin = self._origin_of(name, module)
        self.origins[name] = origin
        return origin

    def _origin_of(self, name: str, module: nn.Module) -> str:
        parameters, in_base = list(module.parameters()), self._lies_in_base(name)
        if any(_is_marked(parameter) for parameter in parameters):
            return "loaded"
        finals = [part for final in self._finals for part in self._modules[final].modules()]
        parts = [*module.modules(), *([] if in_base else finals)]
        is_plan = any(parameter.is_meta for parameter in parameters)
        if (is_plan and in_base) or (not is_plan and any(map(_has_moved, parts))):
            return "loaded" if in_base else "unknown"
        # values that came with load_state_dict show in biases alone, and in norms, which start alike everywhere
        as_made = is_norm(module) and (is_plan or all(bool(p.min() == p.max()) for p in parameters))
        has_bias = any(name == "bias" for part in parts for name, _ in part.named_parameters(recurse=False))
        return "fresh" if as_made or has_bias else "unknown"

    def _lies_in_base(self, name: str) -> bool:
        prefix = getattr(self._model, "base_model_prefix", "")
        return bool(prefix) and name.startswith(prefix + ".")


def _is_marked(parameter: Any) -> bool:
    """Whether transformers has loaded a parameter from a checkpoint. Copies of models lose the mark."""
    return getattr(parameter, "_is_hf_initialized", False)


def _has_moved(module: nn.Module) -> bool:
    """Whether own parameters of a module, which are not marked, may be anything but a random start.

    transformers starts biases as zeros, and training moves them. A random start writes to a weight up to seven
    times (torch's own, and a truncated normal distribution); to the weights of a copied model nobody has written.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if _is_marked(parameter):
            continue
        if parameter.is_meta or parameter.is_inference() or parameter.grad is not None:
            return True
        if not 1 <= parameter._version <= 7 or (name == "bias" and bool(parameter.any())):
            return True
    return False


def is_fresh_layer(module: nn.Module) -> bool:
    """Whether a linear layer within a loaded model was left to chance by the checkpoint."""
    return type(module) is nn.Linear and not _is_marked(module.weight) and not _has_moved(module)
