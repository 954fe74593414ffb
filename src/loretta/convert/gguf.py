"""A rep adapter of a LLaMA-architecture decoder as a LoRA file for llama.cpp.

Axes: I input features, O output features, R rank of the update.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model_state_dict
from torch import Tensor

from loretta.convert.rep_adapter import lora_pair, read_adapter, tied_to_embeddings, trained_norms, trained_scales
from loretta.convert.written import Export, own_memory, report_of, writing
from loretta.errors import InputError
from loretta.tuners.tokens import has_rows

# the model types of transformers that llama.cpp runs as its architecture "llama"
GGUF_MODEL_TYPES = ("llama", "mistral")


@torch.no_grad()
def export_gguf_lora(
    model: PeftModel, file: str | os.PathLike, adapter_name: str = "default", *, overwrite: bool = False
) -> Export:
    """Write a rep adapter of a LLaMA-architecture decoder as a LoRA file for llama.cpp. The model is left as it is.

    Raises InputError for other architectures, for an adapter that trains more than linear layers, when the package
    gguf is missing, or when ``file`` is taken.
    """
    config, layers, copies = read_adapter(model, adapter_name)
    base_config: Any = model.get_base_model().config
    kind = getattr(base_config, "model_type", None)
    if kind not in GGUF_MODEL_TYPES or config.task_type not in (None, TaskType.CAUSAL_LM):
        raise InputError(
            f"--to gguf-lora writes adapters of language models of the types {' and '.join(GGUF_MODEL_TYPES)}, and "
            f"this is a model of type {kind!r} for {config.task_type or 'no task'}: export with --to lora or merged"
        )
    whole = [*trained_norms(model, adapter_name), *trained_scales(model, adapter_name), *copies]
    whole += [name for name, module in model.get_base_model().named_modules() if has_rows(module, adapter_name)]
    if whole or config.bias != "none":
        what = f"'{whole[0]}'" if whole else f"biases (bias={config.bias!r})"
        raise InputError(
            f"the adapter also trains {what}, which llama.cpp does not load with an adapter: "
            "train with train_norms=False, without scales, tokens, modules_to_save, biases, or export with --to merged"
        )
    if tied := tied_to_embeddings(model, layers):
        raise InputError(
            f"the adapter changes '{tied}', which is no tensor of its own in a GGUF file of this model, because it is "
            "tied to the input embeddings: export with --to lora"
        )
    try:
        gguf: Any = importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise InputError("--to gguf-lora needs the package gguf: pip install 'loretta-peft[gguf]'") from None
    arch = gguf.MODEL_ARCH.LLAMA
    gguf_names = gguf.get_tensor_name_map(arch, base_config.num_hidden_layers)
    rotated = {"q_proj": base_config.num_attention_heads, "k_proj": base_config.num_key_value_heads}
    pairs = {name: lora_pair(layer, adapter_name) for name, layer in layers.items()}
    ranks = {name: a_RI.shape[0] for name, (a_RI, _) in pairs.items()}
    alpha = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in pairs.items():
        target = gguf_names.get_name(name)
        if target is None:
            raise InputError(f"the adapter changes '{name}', which llama.cpp does not know: export with --to lora")
        if heads := rotated.get(name.rpartition(".")[2]):
            # rotary embeddings turn rows k and k + half of a head in transformers, which are neighbours in llama.cpp
            b_OR = b_OR.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        # llama.cpp has one alpha, and divides it by each tensor's own rank
        b_OR = b_OR * (ranks[name] / alpha)
        tensors |= {f"{target}.weight.lora_a": a_RI.float(), f"{target}.weight.lora_b": b_OR.float()}
    base = base_config.name_or_path
    with writing(Path(file), file=True, overwrite=overwrite, keep=[base]) as new:
        _write(gguf, new, gguf.MODEL_ARCH_NAMES[arch], tensors, alpha=alpha, base=base)
    before = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return report_of("gguf-lora", file, base, ranks, copies, torch.float32, before.values(), tensors.values())


def _write(gguf: Any, file: Path, arch: str, tensors: Mapping[str, Tensor], *, alpha: int, base: str | None) -> None:
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(base).name)
    for name, tensor in tensors.items():
        writer.add_tensor(name, own_memory(tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
