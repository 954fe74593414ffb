"""The classification head: what happens to each of its modules (LoRETTA section B), and what it and norms cost."""

from dataclasses import dataclass
from functools import partial
from typing import cast

from peft import TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from loretta import tt
from loretta.errors import InputError
from loretta.tuners.config import LorettaConfig
from loretta.tuners.copies import AdapterCopy, CopyPolicy
from loretta.tuners.norms import is_norm, norms_of, outer_modules, own_parameters

# What PEFT itself puts into modules_to_save for a task, and BART's head, which it overlooks
_FINAL_LAYERS: dict[str | None, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score", "classification_head"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# The hidden layer between the encoder and the final layer, where it lies outside the module above
_HIDDEN_LAYERS = ("pooler.dense", "head.dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCost:
    """Numbers beside the trains: trained in norms and head, and saved with the adapter though frozen."""

    norms: int
    head: int
    frozen: int
    parts: tuple[str, ...] = ()  # what happens to each module of the head, in words


def copy_cost(model: nn.Module, config: LorettaConfig) -> CopyCost:
    """What trained norms, the head and the user's ``modules_to_save`` will add, counted on sizes alone.

    Raises InputError when a given shape does not fit the head's hidden layer.
    """
    heads = _head_policies(config, model)
    whole = [
        name
        for name in outer_modules(model)
        if name not in heads and any(name.endswith(ending) for ending in config.modules_to_save or [])
    ]
    norms = norms_of(model, outside=[*heads, *whole]) if config.train_norms else []
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
    n_norms = sum(parameter.numel() for name in norms for parameter in own_parameters(model.get_submodule(name)))
    for name in whole:
        module = _original(model.get_submodule(name))
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        if is_norm(module):
            n_norms += n_parameters
        else:
            head += n_parameters
    return CopyCost(norms=n_norms, head=head, frozen=frozen, parts=tuple(parts))


def _in_words(policy: CopyPolicy) -> str:
    if policy.as_change:
        return "pretrained; a train is added to it, which starts as its TT-SVD and as no change"
    hidden = "a train that starts as its TT-SVD"
    if policy.tensorized == ("",):
        return hidden
    rest = "frozen, and saved because it is random" if policy.frozen else "a plain dense layer, trained whole"
    return f"its hidden layer is {hidden}; its final layer is {rest}" if policy.tensorized else rest


def install_head(model: nn.Module, config: LorettaConfig, adapter_name: str) -> list[str]:
    """Wrap the modules of the head that ``config`` asks for. Returns their names, for ``modules_to_save``.

    PEFT activates the copies later, when it goes through ``modules_to_save``.
    """
    policies = _head_policies(config, model)
    for name, policy in policies.items():
        module = model.get_submodule(name)
        if isinstance(module, AdapterCopy):
            module.policies[adapter_name] = policy
        elif not isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, AdapterCopy(module, adapter_name, policy))
    return list(policies)


def head_names(model: nn.Module, config: LorettaConfig) -> list[str]:
    """Names of the modules of the head that are copied whole under ``config.task_type``."""
    return list(_head_policies(config, model))


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _head_policies(config: LorettaConfig, model: nn.Module) -> dict[str, CopyPolicy]:
    """Module name -> policy for the head under ``config.task_type``; empty where the task has none."""
    endings = _FINAL_LAYERS.get(config.task_type, ())
    if not endings:
        return {}
    modules = outer_modules(model)
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
