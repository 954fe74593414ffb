"""What a wrapped model holds of one rep or shared adapter: its updates as thin products, and what it trains whole.

Axes: I input features, O output features, R rank of the update.
"""

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from torch.nn.functional import pad

from loretta.errors import InputError
from loretta.tuners.adapter_file import check_finite
from loretta.tuners.copies import AdapterCopy
from loretta.tuners.names import name_in_base
from loretta.tuners.norms import TrainedNorm, is_norm
from loretta.tuners.rep import LorettaRepConfig, RepExperts, RepLinear
from loretta.tuners.rescaled import TrainedScale
from loretta.tuners.shared import LorettaSharedConfig


def read_adapter(
    model: PeftModel, adapter_name: str
) -> tuple[LorettaRepConfig | LorettaSharedConfig, dict[str, RepLinear], dict[str, ModulesToSaveWrapper]]:
    """The adapter's config, its layers, and the modules that it trains whole, by their names in the base model."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise InputError(f"the model has no adapter {adapter_name!r}: give one of {', '.join(configs) or 'none'}")
    config = configs[adapter_name]
    check_method(str(getattr(config.peft_type, "value", config.peft_type)))
    layers: dict[str, RepLinear] = {}
    copies: dict[str, ModulesToSaveWrapper] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RepLinear) and adapter_name in module.scaling:
            # perhaps within another method's layer; those of experts lie within each other
            layers[name if isinstance(module, RepExperts) else name_in_base(name)] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copies[name] = module
    if not layers:
        raise InputError(f"the adapter {adapter_name!r} changes no linear layer: there is nothing to export")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    check_finite(tensors.items(), f"the adapter {adapter_name!r}")
    return config, layers, copies


def trained_norms(model: PeftModel, adapter_name: str) -> list[str]:
    """Names of the layer norms that an adapter trains, those that the user had copied whole included."""
    return [
        name
        for name, module in model.get_base_model().named_modules()
        if (isinstance(module, TrainedNorm) and module.change(adapter_name))
        or (
            isinstance(module, ModulesToSaveWrapper)
            and adapter_name in module.modules_to_save
            and is_norm(module.original_module)
            # a frozen one is saved because its origin is unknown, and stock PEFT takes it for a module like any other
            and not (isinstance(module, AdapterCopy) and module.is_frozen(adapter_name))
        )
    ]


def trained_scales(model: PeftModel, adapter_name: str) -> list[str]:
    """Names of the layers that an adapter scales."""
    return [
        name.removesuffix(".base_layer")
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, TrainedScale) and module.change(adapter_name)
    ]


def check_method(peft_type: str) -> None:
    """Raise InputError, with the reason, for an adapter of a method that cannot be exported."""
    if peft_type == "LORETTA_ADP":
        raise InputError(
            "a LoRETTA_adp adapter has a non-linearity between its two trains, so no LoRA and no change of the base "
            "weights has the same effect: keep it loaded with loretta, or train rep, which exports exactly"
        )
    if peft_type == "LORA":
        raise InputError("this is a LoRA adapter already: use it as it is")
    if peft_type not in ("LORETTA_REP", "LORETTA_SHARED"):
        raise InputError(
            f"this is an adapter of the method {peft_type!r}: only LoRETTA_rep and LoRETTA_shared adapters are exported"
        )


def lora_pair(layer: RepLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with ``B @ A`` the scaled update, oriented as LoRA's for any base layer."""
    if isinstance(layer, RepExperts):
        raise InputError(
            f"'{layer.placements[adapter_name].name}' holds the matrices of experts, for which a LoRA of linear layers "
            "has no place: export with --to merged"
        )
    a_IR, b_RO = layer.factors(adapter_name)
    return a_IR.T, (layer.scaling[adapter_name] * b_RO).T


def expert_pair(layer: RepExperts, adapter_name: str, rank: int) -> tuple[Tensor, Tensor]:
    """A (E R, I) and B (O, R E) of the experts' scaled updates, as PEFT's LoRA on ``target_parameters`` lays them out.

    R is ``rank``, with zeros where theirs is lower. Without ``is_transposed`` PEFT takes a matrix to lie as (out, in).
    """
    base: Any = layer.get_base_layer()
    left, right = layer._operands(*layer.factors(adapter_name))  # (E, rows, R) and (E, R, columns)
    left = layer.scaling[adapter_name] * left
    a_ERI, b_EOR = (left.mT, right.mT) if getattr(base, "is_transposed", False) else (right, left)
    a_ERI, b_EOR = filled(a_ERI, b_EOR, rank)
    return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)


def filled(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same update as a LoRA of a higher rank, by zeros. Dimensions in front of the last two stay in front."""
    more = rank - a_RI.shape[-2]
    return pad(a_RI, (0, 0, 0, more)), pad(b_OR, (0, more))


def tied_to_embeddings(model: PeftModel, layers: Mapping[str, RepLinear]) -> str | None:
    """The name of an adapted module whose weight is also that of the input embeddings."""
    base = model.get_base_model()
    try:
        shared = cast(Any, base).get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # not every model has words for input
        return None
    return next((name for name, layer in layers.items() if layer._base_weight() is shared), None)
