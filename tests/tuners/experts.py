"""Tiny models with experts, and rep on their matrices."""

import torch
from draws import seed_torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from tuners.families import randomise

from loretta import LorettaRepConfig, get_peft_model
from loretta.tuners.rep import RepExperts

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


HIDDEN, INNER, EXPERTS = 32, 24, 4


_BASE = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


_QWEN = {**_BASE, "moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2}


_LOCAL = {**_BASE, "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}


_DEEPSEEK = {
    **_BASE, "num_key_value_heads": 4, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip


OPTIONS = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_QWEN, "head_dim": 8},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    "gpt_oss": {**_LOCAL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama4_text": {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1},
}


INPUTS = {"input_ids": torch.tensor([[5, 9, 33, 4, 61, 7, 20], [8, 8, 41, 50, 3, 19, 6]])}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = AutoConfig.for_model(family, **OPTIONS[family])
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        seed_torch(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model.parameters(), seed=0)
    return model.to(dtype)


def config(**options) -> LorettaRepConfig:
    given = {"r": 4, "tensor_rank": 3, "target_modules": [], "train_norms": False, "target_parameters": BOTH}
    return LorettaRepConfig(**{**given, **options})


def wrap(family: str = "mixtral", dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        seed_torch(1)
        return get_peft_model(build(family, dtype), config(**options)).eval()


def layers_of(model: nn.Module) -> list[RepExperts]:
    return [module for module in model.modules() if isinstance(module, RepExperts)]
