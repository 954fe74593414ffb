"""A rep or shared adapter as a LoRA adapter of stock PEFT.

Axes: I input features, O output features, R rank of the update.
"""

import copy
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loretta.convert.load import CONFIG, WEIGHTS
from loretta.convert.rep_adapter import expert_pair, filled, lora_pair, read_adapter, trained_norms, trained_scales
from loretta.convert.written import Export, own_memory, report_of, writing
from loretta.errors import InputError
from loretta.tuners.adapted import AdaptedModule
from loretta.tuners.adapter_file import PREFIX
from loretta.tuners.rep import RepExperts


@torch.no_grad()
def export_lora(
    model: PeftModel, folder: str | os.PathLike, adapter_name: str = "default", *, overwrite: bool = False
) -> Export:
    """Write a rep or shared adapter as a LoRA adapter of stock PEFT that computes the same. The model is left as it is.

    Each update becomes a LoRA of rank ``min(r, tensor_rank)`` at most (a denoised start adds its own rank), from the
    contracted trains: nothing is approximated. Trained heads are written dense, as ``modules_to_save``, and the updates
    of experts as a LoRA on ``target_parameters``, which repeats what they share for each of them. So are those of
    linear layers that PEFT would take for experts by their names. Returns what was written: ranks and bytes of tensors.

    Raises InputError when the adapter is neither, trains layer norms or scales, or ``folder`` is taken.
    """
    config, layers, copies = read_adapter(model, adapter_name)
    _refuse_norms_and_scales(model, adapter_name)
    base = model.get_base_model()
    linear = {name: layer for name, layer in layers.items() if not isinstance(layer, RepExperts)}
    experts = _named_by_peft([layer for layer in layers.values() if isinstance(layer, RepExperts)], adapter_name)
    pairs = {name: lora_pair(layer, adapter_name) for name, layer in linear.items()}
    modules = linear.keys() - _taken_for_experts(linear.keys(), base)
    parameters = {name: f"{name}.weight" for name in linear.keys() - modules}
    parameters |= {name: layer.placements[adapter_name].name for name, layer in experts.items()}
    ranks = {parameters.get(name, name): a_RI.shape[0] for name, (a_RI, _) in pairs.items()}
    ranks |= {parameters[name]: layer.factors(adapter_name)[0].shape[1] for name, layer in experts.items()}
    rank = max(ranks.values())
    # PEFT's patterns are for modules: the parameters of a smaller rank are filled up with zeros
    pairs |= {name: filled(*pairs[name], rank) for name in linear.keys() - modules}
    pairs |= {name: expert_pair(layer, adapter_name, rank) for name, layer in experts.items()}
    pattern = _rank_pattern({**ranks, **dict.fromkeys(parameters.values(), rank)}, rank)
    lora = LoraConfig(
        r=rank,
        # alpha = rank everywhere, so that LoRA's scaling is 1 and ours is in B: engines that serve adapters read
        # lora_alpha / r alone, and would scale the modules of the patterns wrongly
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=cast(Any, _target_modules(modules, base, list(copies))),
        target_parameters=list(parameters.values()) or None,
        modules_to_save=list(copies) or None,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        lora_dropout=0.0 if parameters else config.lora_dropout,  # PEFT knows none on parameters, and serves the same
        bias=cast(Any, config.bias if config.bias in ("none", "all") else "lora_only"),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path or getattr(base, "name_or_path", None),
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )
    before = get_peft_model_state_dict(model, adapter_name=adapter_name)
    copied = tuple(f"{PREFIX}{name}." for name in copies)
    # trained biases, rows of tokens and resized embeddings: PEFT writes them under the same names for every method
    prefix = next(iter(layers.values())).prefix
    tensors = {key: v for key, v in before.items() if prefix not in key and not key.startswith(copied)}
    for name, (a_RI, b_OR) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a_RI, f"{PREFIX}{name}.lora_B.weight": b_OR}
    for name, wrapper in copies.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in _dense(wrapper, adapter_name).items()}
    keep = [getattr(base, "name_or_path", None)]
    with writing(Path(folder), file=False, overwrite=overwrite, keep=keep, kind=CONFIG) as new:
        lora.save_pretrained(str(new))
        save_file({key: own_memory(value) for key, value in tensors.items()}, new / WEIGHTS, metadata={"format": "pt"})
    dtype = next(iter(pairs.values()))[0].dtype
    return report_of(
        "lora", folder, lora.base_model_name_or_path, ranks, copies, dtype, before.values(), tensors.values()
    )


def _refuse_norms_and_scales(model: PeftModel, adapter_name: str) -> None:
    scales = trained_scales(model, adapter_name)
    if norms := trained_norms(model, adapter_name):
        raise InputError(
            f"the adapter trains {len(norms)} layer norms (such as '{norms[0]}'), which no engine loads with a LoRA "
            f"adapter: train with train_norms=False{', train_scales=[]' if scales else ''}, or export with --to merged"
        )
    if scales:
        raise InputError(
            f"the adapter scales {len(scales)} layers (such as '{scales[0]}'), which no LoRA does: train with "
            "train_scales=[], or export with --to merged"
        )


def _dense(wrapper: ModulesToSaveWrapper, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter's copy of a module, with dense layers in place of its trains."""
    own = copy.deepcopy(wrapper)  # the model keeps its trains
    own.set_adapter(adapter_name)
    return own.unload_and_optionally_merge_module(True, False, [adapter_name]).state_dict()


def _named_by_peft(layers: Collection[RepExperts], adapter_name: str) -> dict[str, RepExperts]:
    """The layers of experts by the names that PEFT's have in a LoRA.

    Those of one module lie inside each other: PEFT wraps the parameters of a module in their order there.
    """
    wrapped: dict[str, dict[str, RepExperts]] = {}
    for layer in layers:
        at = layer.placements[adapter_name].name.rpartition(".")[0]
        wrapped.setdefault(at, {})[layer.parameter_name] = layer
    named: dict[str, RepExperts] = {}
    for at, by_parameter in wrapped.items():
        module = next(iter(by_parameter.values())).get_base_layer()
        order = [name for name, _ in module.named_parameters(recurse=False) if name in by_parameter]
        named |= {at + ".base_layer" * depth: by_parameter[name] for depth, name in enumerate(reversed(order))}
    return named


def _taken_for_experts(names: Collection[str], base: nn.Module) -> set[str]:
    """The modules of whose names PEFT reads a LoRA on transformers' fused experts.

    It does so by the ending, for files of transformers 4: DeepSeek's shared experts and dense layers have it too.
    """
    taken = set()
    for ending in {_ending(name) for name in names}:
        config = LoraConfig(target_modules=[ending])
        try:
            convert_peft_config_for_transformers(config, base, None)
        except ValueError:  # up_proj without gate_proj, which are one parameter of the experts
            taken.add(ending)
        else:
            taken |= {ending} - set(config.target_modules or ())
    return {name for name in names if _ending(name) in taken}


def _target_modules(adapted: Collection[str], base: nn.Module, modules_to_save: list[str]) -> set[str] | str:
    """Endings, full names where an ending is ambiguous, or an expression, that PEFT matches to ``adapted`` alone."""
    wrapped = [n + "." for n, m in base.named_modules() if isinstance(m, AdaptedModule | ModulesToSaveWrapper)]
    names = [name for name, _ in base.named_modules() if name and not name.startswith(tuple(wrapped))]

    def matched(targets: set[str]) -> set[str]:
        config = LoraConfig(target_modules=list(targets), modules_to_save=modules_to_save)
        return {name for name in names if check_target_module_exists(config, name)}

    clear = {ending for ending in {_ending(name) for name in adapted} if matched({ending}) <= set(adapted)}
    targets = clear | {name for name in adapted if _ending(name) not in clear}
    # PEFT takes a full name for the ending of a deeper one too; an expression has to match all of a name
    return targets if matched(targets) == set(adapted) else "|".join(map(re.escape, sorted(adapted)))


def _rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Ranks other than ``default``, by ending where all modules that end so have the same rank, else by full name."""
    by_ending: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        by_ending.setdefault(_ending(name), set()).add(rank)
    # PEFT reads the keys as expressions for the end of a name
    return {
        _ending(name) if len(by_ending[_ending(name)]) == 1 else f"^{re.escape(name)}": rank
        for name, rank in ranks.items()
        if rank != default
    }


def _ending(name: str) -> str:
    return name.rpartition(".")[2]
