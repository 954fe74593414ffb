"""Base models as sizes alone: by Hub id, folder, or a well-known name, on the meta device (no weight is loaded)."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from loretta.errors import InputError
from loretta.pretrained import NotLoaded, from_config, from_pretrained
from loretta.tuners.task_types import AUTO_CLASSES
from loretta.wording import nearest, one_line


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32000, **more):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


# name -> (model type, what differs from that type's default configuration); sizes as their makers publish them
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "deberta-base": (
        "deberta",
        {
            "vocab_size": 50265,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 0,
            "position_biased_input": False,
        },
    ),
    "gemma-2-2b": ("gemma2", _llama(2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-2-7b": ("llama", _llama(4096, 11008, 32, 32, 32)),
    "llama-2-13b": ("llama", _llama(5120, 13824, 40, 40, 40)),
    "llama-2-70b": ("llama", _llama(8192, 28672, 80, 64, 8)),
    "llama-3-8b": ("llama", _llama(4096, 14336, 32, 32, 8, 128256)),
    "llama-3-70b": ("llama", _llama(8192, 28672, 80, 64, 8, 128256)),
    "mistral-7b": ("mistral", _llama(4096, 14336, 32, 32, 8)),
    "qwen2.5-7b": ("qwen2", _llama(3584, 18944, 28, 28, 4, 152064)),
    "qwen3-0.6b": ("qwen3", _llama(1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True)),
    "qwen3-8b": ("qwen3", _llama(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
}

# Hub ids of these sizes, for machines that cannot reach the Hub; fine-tuned and uncased ones differ in no size
_IDS = {
    "bert-base": ("google-bert/bert-base-uncased", "bert-base-uncased"),
    "deberta-base": ("microsoft/deberta-base",),
    "gemma-2-2b": ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    **{size: (f"openai-community/{size}",) for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"),
    "llama-3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B-Instruct"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B",),
    "qwen3-8b": ("Qwen/Qwen3-8B",),
    "roberta-base": ("FacebookAI/roberta-base",),
}
HUB_IDS: dict[str, str] = {name: family for family, names in _IDS.items() for name in names}


def find_config(name: str) -> PreTrainedConfig:
    """The configuration of a folder, a name of ``FAMILIES``, or a Hub id, in that order.

    A Hub id of ``HUB_IDS`` that is not on this machine has the sizes of its family: the Hub is not asked for it.

    Raises InputError with the nearest known name when it is none of them.
    """
    if name in FAMILIES and not Path(name).is_dir():
        model_type, sizes = FAMILIES[name]
        return AutoConfig.for_model(model_type, **sizes)
    try:
        return from_pretrained(AutoConfig, name, local_files_only=name in HUB_IDS)
    except NotLoaded as error:
        if name in HUB_IDS:
            return find_config(HUB_IDS[name])
        raise InputError(
            f"no configuration of '{name}'{nearest(name, FAMILIES)}: {error}; give a Hub id that can be reached, "
            f"a model's folder, or one of {', '.join(FAMILIES)}"
        ) from None


def default_task_type(config: PreTrainedConfig) -> str:
    """What a model of this kind is mostly fine-tuned for: classification for encoders, generation for the rest."""
    kind = type(config)
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    if kind in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "IMAGE_CLS"
    if kind in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return "SEQ_CLS"
    return "CAUSAL_LM"


WITH_LABELS = ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS")


def meta_model(config: PreTrainedConfig, task_type: str, *, num_labels: int = 2) -> nn.Module:
    """The model of a configuration on the meta device: every module and size, no memory.

    Raises InputError for a task type that does not exist or that the model has no head for, and for no labels.
    """
    if task_type not in AUTO_CLASSES:
        raise InputError(f"task type {task_type!r} is none of {', '.join(AUTO_CLASSES)}")
    if not 1 <= num_labels <= 1_000_000:
        raise InputError(f"--num-labels {num_labels} must be a whole number from 1 to 1000000")
    auto = getattr(transformers, AUTO_CLASSES[task_type])
    if task_type in WITH_LABELS:
        config.num_labels = num_labels
    try:
        with torch.device("meta"):
            return from_config(auto, config)
    except NotLoaded as error:
        raise InputError(f"a {config.model_type} model has no head for {task_type} ({one_line(error, 120)})") from None
