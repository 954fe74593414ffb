"""A population in float64 and the ordinary models of its members, and batches and losses for both."""

import torch
from draws import seeded
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from loretta.population.population import Population, Start
from loretta.training.model import wrap

SIZE, ROWS, LABELS = 3, 4, 3
RATES, DECAYS = (1e-2, 3e-3, 2e-2), (0.0, 0.1, 0.01)


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
    )
    return BertForSequenceClassification(config).double()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double()


def gpt2() -> GPT2LMHeadModel:
    """Its queries, keys and values come from one layer."""
    options = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "initializer_range": 0.2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, **options, **dropout)).double()


WRITES = (gpt2, llama)


def member(make, method, options, seed):
    """A wrapped model whose base is that of all, but for the head, and whose adapter is its own."""
    set_seed(0)
    shared = {name: tensor for name, tensor in make().state_dict().items() if not name.startswith("classifier")}
    set_seed(seed)
    model = make()
    model.load_state_dict(shared, strict=False)
    kind = "language_modeling" if make in WRITES else "classification"
    return wrap(model, method, kind, options).double().eval()


def population(make, method, options):
    """One population and the models of its members, which stay as they are."""
    alone = [member(make, method, own, seed) for seed, own in enumerate(options)]
    skeleton = member(make, method, options[0], 0)
    return Population(skeleton, [Start.of(model, skeleton) for model in alone]), alone


def batch(step, causal):
    generator = seeded(step)
    ids = torch.randint(0, 32, (SIZE * ROWS, 7), generator=generator)
    mask = torch.ones_like(ids)
    if not causal:
        mask[::3, 5:] = 0
    return ids, mask, torch.randint(0, LABELS, (SIZE * ROWS,), generator=generator)


def losses(logits, ids, labels, causal):
    """The mean loss of each group of ROWS rows."""
    if causal:
        logits, labels = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    return each.view(len(ids) // ROWS, -1).mean(1)
