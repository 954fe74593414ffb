"""A decoder on prompted tasks, as populations: which of the options' first tokens comes next.

The prompts are those of ``loretta.tasks.prompted``. Where every example has the same options, and each is one token,
the log-probability of an option is a row of the output embeddings times the last hidden state: that is a classifier
whose head is frozen, which a population can train. Before the first step its scores are those of the untrained model.
"""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from protocol import TASKS, lines_of
from torch import nn
from transformers import PreTrainedTokenizerBase

from loretta.tasks.prompted import PROMPTED

TRAINED, HELD_OUT, OFFICIAL = 1000, 500, 1000  # examples at most, as in the paper's low-data tables
SMALL = {"cb": 100}  # held out of a small task, as there
TEXTS = {"stories": "tinystories_1000", "wiki": "wikitext_1000"}  # for perplexity: 700, 100 and 200 texts


def write_words(task: str, tokenizer: PreTrainedTokenizerBase, source: Path, target: Path) -> None:
    """Write ``train``, ``validation`` (both of the official training rows) and ``official`` as tables of prompts.

    Training prompts that are longer than the plan of the task are left out, so that none loses its question.
    """
    (target / task).mkdir(parents=True, exist_ok=True)
    if task in TEXTS:
        lines = lines_of(source / "lm" / f"{TEXTS[task]}.jsonl.gz")
        random.Random(0).shuffle(lines)
        parts = {"validation": lines[:100], "official": lines[100:300], "train": lines[300:]}
    else:
        pool, official = (_examples(task, source, name) for name in ("train", "validation"))
        length = TASKS[task].length
        fits = [len(ids) <= length for ids in tokenizer([row["text"] for row in pool])["input_ids"]]
        pool = [row for row, fit in zip(pool, fits, strict=True) if fit]
        held_out = SMALL.get(name_of(task), HELD_OUT)
        cut = {"validation": pool[:held_out], "train": pool[held_out:][:TRAINED], "official": official[:OFFICIAL]}
        parts = {name: [json.dumps(row) + "\n" for row in rows] for name, rows in cut.items()}
    for name, part in parts.items():
        with gzip.open(target / task / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(part)


def name_of(task: str) -> str:
    return task.removesuffix("-words")


def _examples(task: str, source: Path, split: str) -> list[dict[str, Any]]:
    lines = lines_of(source / name_of(task) / f"{split}.jsonl.gz")
    random.Random(0).shuffle(lines)
    found = [PROMPTED[name_of(task)].example({**json.loads(line), "split": split}) for line in lines]
    return [{"text": example.prompt, "label": example.correct[0]} for example in found if example is not None]


def option_tokens(task: str, tokenizer: PreTrainedTokenizerBase, source: Path) -> list[int]:
    """The token of each option. Raises ValueError where an option is not one token behind the prompt."""
    row = json.loads(lines_of(source / name_of(task) / "train.jsonl.gz")[0])
    example = PROMPTED[name_of(task)].example({**row, "split": "train"})
    assert example is not None
    before = tokenizer(example.prompt)["input_ids"]
    tokens = []
    for option in example.options:
        ids = tokenizer(example.prompt + option)["input_ids"]
        if ids[:-1] != before:
            raise ValueError(f"option {option!r} of {task} is not one token: {ids[len(before) - 1 :]}")
        tokens.append(ids[-1])
    return tokens


@torch.no_grad()
def give_head(model: nn.Module, tokens: Sequence[int]) -> None:
    """Make the frozen head of a classifier out of the rows of the (tied) embeddings."""
    base: Any = model.get_base_model()
    rows = base.get_input_embeddings().weight[list(tokens)]
    for name, parameter in model.named_parameters():
        if "score." in name and name.endswith("weight"):
            parameter.copy_(rows)
            parameter.requires_grad_(False)


READ = 100  # texts of WikiText whose perplexity says what a training forgets; nothing is trained or chosen on them


@torch.no_grad()
def perplexities(loop: Any, tokenizer: PreTrainedTokenizerBase, source: Path) -> list[float]:
    """The mean loss of a token of other texts, for each member: what the decoder can still read after its training."""
    lines = lines_of(source / "lm" / f"{TEXTS['wiki']}.jsonl.gz")
    random.Random(0).shuffle(lines)
    texts = [json.loads(line)["text"] for line in lines[:READ]]
    population, held = loop.population, {}
    base: Any = population.model.get_base_model()
    embeddings = base.get_input_embeddings().weight
    hook = base.model.register_forward_hook(lambda module, given, made: held.update(x=made.last_hidden_state))
    sums, counts = torch.zeros(population.size, device=loop.device), torch.zeros(population.size, device=loop.device)
    population.eval()
    try:
        for k in range(0, len(texts), 4):
            batch = tokenizer(texts[k : k + 4], truncation=True, max_length=128, padding=True, return_tensors="pt")
            ids, mask = (batch[name].to(loop.device) for name in ("input_ids", "attention_mask"))
            with torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.args.bf16):
                population(input_ids=ids.repeat(population.size, 1), attention_mask=mask.repeat(population.size, 1))
                for member, x in enumerate(held["x"].unflatten(0, (population.size, -1))):
                    logits = nn.functional.linear(x[:, :-1], embeddings).float()
                    both = (mask[:, :-1] * mask[:, 1:]).float()
                    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                    sums[member] += (each * both.flatten()).sum()
                    counts[member] += both.sum()
    finally:
        hook.remove()
        population.train()
    return [float(loss) for loss in sums / counts]
