"""Which modules each method adapts by default, by ``config.model_type``.

Entries are matched as PEFT matches ``target_modules``: a list by the end of the module's name, a string as a
regular expression.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from loretta.errors import InputError
from loretta.tuners.config import LorettaConfig

# rep: the query and value projections (LoRETTA section 4), or the fused one that holds them
REP_TARGETS: dict[str, Sequence[str]] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gemma3": r".*language_model\..*\.(q_proj|v_proj)",
    "mamba": ["in_proj"],  # the fused kernels read the other projections' weights and go past their adapters
    "gpt2": ["c_attn", "q_attn"],  # in cross-attention c_attn has no query
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "phi3": ["qkv_proj"],
    **dict.fromkeys(("mbart", "olmo2", "qwen2_moe", "qwen3_moe"), ("q_proj", "v_proj")),
    "vit": ["attention.query", "attention.value", "q_proj", "v_proj"],  # older and newer transformers
}

# adp: the projections that end the attention and the feed-forward block (LoRETTA section 3.2)
_BERT_LIKE = ("bert", "camembert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta")
_LLAMA_LIKE = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
ADP_TARGETS: dict[str, Sequence[str]] = {
    **dict.fromkeys(_BERT_LIKE, ("output.dense",)),  # attention.output.dense and output.dense
    **dict.fromkeys(_LLAMA_LIKE, ("o_proj", "down_proj")),
    **dict.fromkeys(("bart", "mbart"), ("self_attn.out_proj", "encoder_attn.out_proj", "fc2")),
    **dict.fromkeys(("bloom", "falcon"), ("self_attention.dense", "dense_4h_to_h")),
    "distilbert": ["out_lin", "lin2"],
    "gemma3": r".*language_model\..*\.(o_proj|down_proj)",
    "gpt2": ["attn.c_proj", "crossattention.c_proj", "mlp.c_proj"],
    "gpt_neo": ["out_proj", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "dense_4h_to_h"],
    "gptj": ["out_proj", "fc_out"],
    "mixtral": ["o_proj"],  # its experts are not linear layers
    "modernbert": ["attn.Wo", "mlp.Wo"],
    "mpnet": ["attn.o", "output.dense"],
    "opt": ["out_proj", "fc2"],
    "phi": ["self_attn.dense", "fc2"],
    "qwen2_moe": ["o_proj", "shared_expert.down_proj"],
    **dict.fromkeys(("t5", "mt5"), ("o", "wo")),
    "vit": ["output.dense", "o_proj", "fc2"],  # older and newer transformers
}


def chosen_targets(config: LorettaConfig, model_type: str | None, defaults: Mapping[str, Sequence[str]]) -> Any:
    """``config.target_modules``, or the default among a method's ``defaults`` for the model's type.

    Raises InputError when there is neither, or layers are to be picked of a default that picks them itself.
    """
    if config.target_modules is not None:
        return config.target_modules
    if model_type is None or model_type not in defaults:
        if config.target_parameters:
            return set()
        raise InputError(
            f"no default target modules are known for model type {model_type!r}: "
            "give target_modules=['name', ...] or target_modules='all-linear'"
        )
    targets = defaults[model_type]
    if not isinstance(targets, str):
        return set(targets)
    if config.layers_to_transform is not None or config.layers_pattern is not None:
        raise InputError(
            f"the default target modules for model type {model_type!r} are the expression {targets!r}, of which "
            "layers_to_transform and layers_pattern cannot pick: give target_modules=['name', ...]"
        )
    return targets
