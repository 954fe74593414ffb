"""What a wrapped model trains, counted by kind."""

from collections import Counter

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from loretta.record import KINDS
from loretta.tuners.norms import TrainedNorm, is_norm
from loretta.tuners.rescaled import TrainedScale


def trainable_by_kind(model: nn.Module) -> dict[str, int]:
    """Trainable scalars of a PEFT model by kind (:class:`~loretta.record.ParameterCounts` says what each is)."""
    norms: list[str] = []
    copies: list[str] = []
    scales: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            (norms if is_norm(module.original_module) else copies).append(name + ".")
        elif isinstance(module, TrainedNorm) or ".ln_tuning_layers" in name:
            norms.append(name + ".")
        elif isinstance(module, TrainedScale):
            scales += [f"{name}.{attribute}." for attribute in module.adapter_layer_names]
    counts = Counter(dict.fromkeys(KINDS, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[_kind(name, tuple(norms), tuple(copies), tuple(scales))] += parameter.numel()
    return dict(counts)


def _kind(name: str, norms: tuple[str, ...], copies: tuple[str, ...], scales: tuple[str, ...]) -> str:
    if name.startswith(norms):
        return "norms"
    if name.startswith(copies):
        return "head"
    if name.startswith(scales):
        return "scales"
    if "loretta_adp_bias." in name or name.endswith(".bias"):
        return "biases"
    if any(f"loretta_{train}." in name for train in ("rep_down", "rep_up", "adp_down", "adp_up", "shared_train")):
        return "cores"
    return "other"
