"""Tiny models with an adapter, and batches of token ids of chosen lengths for them."""

import torch
from draws import seed_torch, seeded
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from loretta import LorettaAdpConfig, LorettaRepConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}


METHODS = {
    "rep": lambda task: LorettaRepConfig(task_type=task),
    "adp": lambda task: LorettaAdpConfig(task_type=task),
    "lora": lambda task: LoraConfig(task_type=task, r=4),
}


def tiny_bert(method="rep", *, dropout=0.0):
    seed_torch(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2)
    return get_peft_model(BertForSequenceClassification(config), METHODS[method]("SEQ_CLS"))


def tiny_llama(method="adp"):
    seed_torch(0)
    config = LlamaConfig(**SIZES, use_cache=False)
    return get_peft_model(LlamaForCausalLM(config), METHODS[method]("CAUSAL_LM"))


def examples(lengths, *, causal=False):
    """Token ids of these lengths, with a label for each of them or for each of their tokens."""
    generator = seeded(3)
    ids = [torch.randint(5, 50, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row if causal else row[0] % 2} for row in ids]


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows],
        "labels": [row["labels"] for row in rows],
    }
    if isinstance(rows[0]["labels"], list):
        batch["labels"] = [row["labels"] + [-100] * (length - len(row["labels"])) for row in rows]
    return {name: torch.tensor(value) for name, value in batch.items()}
