"""In units of the weights (docs/choosing.md): a factor that moves from a weight to its norm changes no training."""

import copy

import pytest
import torch
from draws import seed_torch, seeded
from peft import LoraConfig
from tolerances import assert_near
from transformers import LlamaConfig, LlamaForCausalLM

from loretta import LorettaRepConfig, LorettaSharedConfig, get_peft_model

FACTOR = 4.0
FORMS = {
    "rep": (LorettaRepConfig, {"tensor_rank": 2, "train_norms": False}),
    "shared": (LorettaSharedConfig, {"tensor_rank": 2, "train_norms": False}),
    "LoRA": (LoraConfig, {"r": 2}),
}


def base() -> LlamaForCausalLM:
    seed_torch(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def moved(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function: what reads a norm of attention is smaller, and the norm is larger by as much."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.input_layernorm.weight *= FACTOR
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight /= FACTOR
    return other


def trained(model: LlamaForCausalLM, form: str, alpha: float) -> torch.Tensor:
    """The logits behind three steps of Adam."""
    kind, options = FORMS[form]
    seed_torch(1)
    config = kind(target_modules=["q_proj", "v_proj"], lora_alpha=alpha, **options)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    ids = torch.randint(0, 40, (3, 9), generator=seeded(2))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    return adapted(ids).logits.detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_factor_between_norm_and_weight_changes_no_training(form):
    model = base()
    ids = torch.randint(0, 40, (3, 9), generator=seeded(2))
    assert_near("the same function", moved(model)(ids).logits, model(ids).logits)
    plain, same, other = (
        trained(of, form, alpha)
        for of, alpha in ((copy.deepcopy(model), 8), (moved(model), 8 / FACTOR), (moved(model), 8))
    )
    assert_near("in units of the weights", same, plain)
    assert (plain - model(ids).logits).abs().max() > 1e-2, "trained"
    assert (other - plain).abs().max() > 1e-2, "at the fixed scale it is another training"
