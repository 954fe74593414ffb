"""Tiny random models of the families whose default targets are tested, with inputs for them."""

import torch
from draws import seed_torch, seeded
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerSelfAttention

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS = 64, 32, 48, 2, 4
END = 2

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "tie_word_embeddings": False}
# the width of a head is chosen freely in these, so that the attention is not as wide as the model
_GEMMA = {**_DECODER, "head_dim": 16, "tie_word_embeddings": True}
_GEMMA3 = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

OPTIONS: dict[str, dict] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "deberta": {**_ENCODER, "relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0},
    "deberta-v2": {  # as version 3 is configured: query_proj also reads the normed embeddings of the distances
        **_ENCODER,
        "relative_attention": True,
        "pos_att_type": "c2p|p2c",
        "type_vocab_size": 0,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 4,
    },
    "electra": {**_ENCODER, "embedding_size": 16},
    "modernbert": {
        **_ENCODER,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "cls_token_id": 1,
        "sep_token_id": END,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_inner": INNER,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 40,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
    },
    "opt": {**_ENCODER, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 4},
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 16},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 8},
    "gemma3_text": _GEMMA3,
    "gemma3": {
        "text_config": _GEMMA3,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
    },
    "phi3": {**_DECODER, "original_max_position_embeddings": 40},
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_kv": 16,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
        "eos_token_id": END,
    },
    "bart": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "max_position_embeddings": 40,
        "forced_eos_token_id": None,
        "decoder_start_token_id": END,
        "pad_token_id": 0,
    },
}
ENCODERS = ("bert", "roberta", "deberta", "deberta-v2", "electra", "modernbert")
SEQ2SEQ = ("t5", "bart")
DECODERS = tuple(name for name in OPTIONS if name not in (*ENCODERS, *SEQ2SEQ))

_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}


def natural_task(family: str) -> str:
    """The task type that the family is mostly used for."""
    if family in ENCODERS:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"


def config_of(family: str, **changes) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**OPTIONS[family], **changes})


def build(
    family: str, task: str | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model in eval mode and a batch of four rows. Every parameter is random, norms and biases too."""
    task = task or natural_task(family)
    config = config_of(family, **changes)
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        model = _CLASSES[task].from_config(config).eval()
    randomise(model.parameters(), seed=seed)
    if family == "t5":
        _scale_attention(model)
    return model.to(dtype), inputs_for(task)


@torch.no_grad()
def _scale_attention(model: PreTrainedModel) -> None:
    """T5 does not divide its scores by the root of a head's width: here its norms do, before the adapters.

    Scores of random weights would be so far apart that the softmax chooses by rounding.
    """
    for block in model.modules():
        if isinstance(block, (T5LayerSelfAttention, T5LayerCrossAttention)):
            block.layer_norm.weight.div_(model.config.d_kv**0.5)


def inputs_for(task: str) -> dict[str, Tensor]:
    generator = seeded(0)
    ids = torch.randint(4, VOCABULARY, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    if task == "SEQ_CLS":
        # padded on the right; T5 and BART read the one end token of a row
        ids[1, 5:] = mask[1, 5:] = 0
        ids[[0, 1, 2, 3], [6, 4, 6, 6]] = END
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids.flip(1)[:, :5]
    return inputs


@torch.no_grad()
def randomise(parameters, *, seed: int, scale: float = 0.15) -> None:
    """Add noise to every parameter, so that no norm is the identity and no bias is zero."""
    generator = seeded(seed)
    for parameter in parameters:
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **options) -> Tensor:
    return model(**inputs, **options).logits


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A loss that every logit enters with a weight of its own."""
    out = model(**inputs).logits
    weights = torch.randn(out.shape, generator=seeded(1))
    return (out.float() * weights).mean() + out.float().square().mean()


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def assert_plain(merged: nn.Module, family: str, task: str | None = None) -> None:
    """The model is built as the base model is: same modules, same parameters, nothing of ours."""
    base, _ = build(family, task)
    assert kinds(merged) == kinds(base)
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in base.state_dict().items()
    }
    assert not hasattr(merged, "peft_config")
