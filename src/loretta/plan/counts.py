"""What a wrapped model trains, counted by kind."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from loretta.record import KINDS
from loretta.tuners.adapted import AdaptedModule
from loretta.tuners.biases import trained_biases
from loretta.tuners.changes import ChangedModule
from loretta.tuners.copies import AdapterCopy
from loretta.tuners.names import parts_of_adapters
from loretta.tuners.norms import TrainedNorm, is_norm


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one adapter of a wrapped model holds, whether or not it is active or trains now.

    Attributes:
        trained: names of the parameters that it trains, biases of the base among them.
        frozen: numbers that are saved with it and do not train.
        of_base: numbers of the base model.
    """

    trained: frozenset[str]
    frozen: int
    of_base: int

    @classmethod
    def of(cls, model: Any, adapter_name: str) -> "Holdings":
        """Those of an adapter of rep, adp or shared."""
        trained: set[str] = set()
        frozen = 0
        for name, module in model.named_modules():
            if isinstance(module, AdapterCopy) and adapter_name in module.modules_to_save:
                own = module.trained(adapter_name)
                trained |= {f"{name}.modules_to_save.{adapter_name}.{each}" for each in own}
                frozen += sum(tensor.numel() for key, tensor in module.saved(adapter_name).items() if key not in own)
            elif isinstance(module, TrainableTokensLayer) and adapter_name in module.trainable_tokens_delta:
                trained.add(f"{name}.trainable_tokens_delta.{adapter_name}.values")
            elif isinstance(module, AdaptedModule) and adapter_name in module.held:
                for part in (*module.adapter_layer_names, *module.other_param_names):
                    held = getattr(module, part)
                    if not isinstance(held, nn.ModuleDict) or adapter_name not in held:
                        continue
                    found = dict(held[adapter_name].named_parameters())
                    if part in module.adapter_layer_names:
                        trained |= {f"{name}.{part}.{adapter_name}.{each}" for each in found}
                    else:
                        frozen += sum(parameter.numel() for parameter in found.values())
        trained |= trained_biases(model, adapter_name, model.peft_config[adapter_name].bias).keys()
        inside = parts_of_adapters(model)
        base = [parameter for name, parameter in model.named_parameters() if not name.startswith(inside)]
        return cls(frozenset(trained), frozen, sum(parameter.numel() for parameter in base))


def trainable_by_kind(model: nn.Module, trained: frozenset[str] | None = None) -> dict[str, int]:
    """Trainable scalars of a PEFT model by kind (:class:`~loretta.record.ParameterCounts` says what each is).

    ``trained`` names the parameters; by default those that train now.
    """
    norms: list[str] = []
    copies: list[str] = []
    scales: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            (norms if is_norm(module.original_module) else copies).append(name + ".")
        elif isinstance(module, ChangedModule):
            kind = norms if isinstance(module, TrainedNorm) else scales
            kind += [f"{name}.{attribute}." for attribute in module.adapter_layer_names]
        elif ".ln_tuning_layers" in name:
            norms.append(name + ".")
    counts = Counter(dict.fromkeys(KINDS, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad if trained is None else name in trained:
            counts[_kind(name, tuple(norms), tuple(copies), tuple(scales))] += parameter.numel()
    return dict(counts)


def _kind(name: str, norms: tuple[str, ...], copies: tuple[str, ...], scales: tuple[str, ...]) -> str:
    if name.startswith(norms):
        return "norms"
    if name.startswith(copies):
        return "head"
    if name.startswith(scales):
        return "scales"
    if ".trainable_tokens_delta." in name:
        return "tokens"
    if "loretta_adp_bias." in name or name.endswith(".bias"):
        return "biases"
    if any(f"loretta_{train}." in name for train in ("rep_down", "rep_up", "adp_down", "adp_up", "shared_train")):
        return "cores"
    return "other"
