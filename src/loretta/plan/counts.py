"""What a wrapped model trains, counted by kind."""

from collections import Counter

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from loretta.layers.trains import Cores
from loretta.tuners.norms import TrainedNorm, is_norm

KINDS = ("cores", "biases", "norms", "head", "other")


def trainable_by_kind(model: nn.Module) -> dict[str, int]:
    """Trainable scalars of a PEFT model by kind.

    "cores" are the trains of the adapters; "biases" those of the adapters or of the base model; "norms" the layer
    norms; "head" what is trained of the head, its trains included; "other" the scales, and what another method adds,
    such as the matrices of dense adapters.
    """
    norms: list[str] = []
    copies: list[str] = []
    matrices: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            (norms if is_norm(module.original_module) else copies).append(name + ".")
        elif isinstance(module, TrainedNorm) or ".ln_tuning_layers" in name:
            norms.append(name + ".")
        elif isinstance(module, Cores) and len(module) == 1:
            matrices.append(name + ".")
    counts = Counter(dict.fromkeys(KINDS, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[_kind(name, tuple(norms), tuple(copies), tuple(matrices))] += parameter.numel()
    return dict(counts)


def _kind(name: str, norms: tuple[str, ...], copies: tuple[str, ...], matrices: tuple[str, ...]) -> str:
    if name.startswith(norms):
        return "norms"
    if name.startswith(copies):
        return "head"
    if "loretta_adp_bias." in name or name.endswith(".bias"):
        return "biases"
    if name.startswith(matrices):
        return "other"
    if any(f"loretta_{train}." in name for train in ("rep_down", "rep_up", "adp_down", "adp_up", "shared_train")):
        return "cores"
    return "other"
