"""A tag for each token of a row: names of people and places, parts of speech."""

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks import metrics
from loretta.tasks.base import Task
from loretta.tasks.prompted.encoding import IGNORED
from loretta.tasks.read import require
from loretta.tasks.sources import wrong_cell
from loretta.tasks.split import text_key
from loretta.tasks.tokens import ENTITY_METRICS
from loretta.training.config import RunConfig
from loretta.training.forms.base import Asked, Data, Form, Recipe, Row
from loretta.training.forms.labels import (
    LONGEST,
    confusion,
    count_classes,
    count_cut,
    cut_words,
    in_parts,
    lengths_of,
    only_one,
    scored_recipe,
    worst,
)
from loretta.training.loaded import LoadedRun
from loretta.training.scores import logits_alone, named_values
from loretta.training.trainer import TwoRateTrainer
from loretta.wording import quoted

NOT_FINITE = -1  # in the place of a tag, where a logit is NaN or infinite
MOST_IN_CONFUSION = 40  # tags: a larger matrix cannot be read


class Tokens(Form):
    """The first piece of a token has its tag, its other pieces none. Pieces after ``max_length`` are not scored."""

    unit, chosen_by = "rows", "metric"

    def encode(self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        if task.metrics == ENTITY_METRICS and importlib.util.find_spec("seqeval") is None:
            raise InputError(
                f"the entities of '{task.name}' are scored by seqeval, which is not installed: "
                "pip install 'loretta-peft[seqeval]'"
            )

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            found = tokenize(tokenizer, rows["tokens"], config.max_length)
            words = [found.word_ids(k) for k in range(len(rows["tokens"]))]
            labels = [first_pieces(row, tags) for row, tags in zip(words, rows["tags"], strict=True)]
            # the Trainer leaves "words" out of a batch
            return {**found, "labels": labels, "words": words}

        return in_parts(getattr(task, split), encode)

    def lengths(self, data: Data) -> list[str]:
        return cut_words(data, self)

    def cut(self, data: Data, split: str) -> int:
        columns, whole = [getattr(data.task, split)["tokens"]], partial(tokenize, data.tokenizer, max_length=None)
        return count_cut(lengths_of(data.splits[split]), data.config.max_length, columns, whole)

    def recipe(self, data: Data) -> Recipe:
        collator = DataCollatorForTokenClassification(data.tokenizer)
        return scored_recipe(data, collator, partial(score_tags, data.task), best_tags)

    def counts(self, task: Task) -> dict[str, list[int]]:
        return count_classes(task, lambda data: [tag for row in data["tags"] for tag in row])

    def texts(self, task: Task, split: str) -> list[tuple[str, ...]]:
        return [text_key(tuple(words)) for words in getattr(task, split)["tokens"]]

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        output = trainer.predict(data.splits[split], metric_key_prefix=split)
        asked, names, pieces = getattr(data.task, split), data.task.label_names, data.splits[split]["words"]
        rows = [
            {
                "text": " ".join(tokens),
                "gold": [names[tag] for tag in gold],
                "tags": tags_of_words(words, tags, len(tokens), names),
            }
            for tokens, gold, words, tags in zip(
                asked["tokens"], asked["tags"], pieces, output.predictions, strict=True
            )
        ]
        return named_values(output.metrics or {}, data.task, f"{split}_"), rows

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        task, names = data.task, data.task.label_names
        most = Counter(tag for row in task.train["tags"] for tag in row).most_common(1)[0][0]
        golds = [[tag for tag in row if tag != IGNORED] for row in data.splits[split]["labels"]]
        pairs = [
            [(gold, tag) for gold, tag in zip(row["gold"], row["tags"], strict=True) if tag is not None] for row in rows
        ]
        shares = [sum(gold != tag for gold, tag in row) / max(1, len(row)) for row in pairs]

        def shown(k: int) -> tuple[str, str, str]:
            gold, answer = (" ".join(tags)[:LONGEST] for tags in zip(*pairs[k], strict=True))
            return rows[k]["text"][:LONGEST], gold, answer

        return Answers(
            split=split,
            rows=len(rows),
            constant=f"{names[most]!r}, the most frequent tag of train,",
            baseline=score_sequences(task, [[most] * len(row) for row in golds], golds),
            confusion=[]
            if len(names) > MOST_IN_CONFUSION
            else confusion(names, [gold for row in pairs for gold, _ in row], [tag for row in pairs for _, tag in row]),
            only=only_one(tag for row in pairs for _, tag in row),
            mistakes=worst({k: share for k, share in enumerate(shares) if share > 0}, shown),
        )

    def asked(self, config: RunConfig, columns: Mapping[str, list[Any]], file: Path) -> list[list[Any]]:
        name = config.text or "tokens"
        require(file, (name,), tuple(columns))
        for at, cell in enumerate(columns[name]):
            if not cell or not (isinstance(cell, str) or all(isinstance(word, str) for word in cell)):
                raise wrong_cell(file, at, name, f"{quoted(cell)} is no list of tokens")
        return [columns[name]]

    @torch.inference_mode()
    def predict(self, run: LoadedRun, asked: Asked, *, all_probabilities: bool, go_on: Any) -> Iterator[Row]:
        if all_probabilities:
            raise InputError("the run gives one tag for each token: leave --probabilities out")
        size, cut_here = run.config.eval_batch_size, any(isinstance(cell, str) for cell in asked[0])
        for start in range(0, len(asked[0]), size):
            batch = _words(asked[0][start : start + size])
            found = tokenize(run.tokenizer, batch, run.config.max_length, padding=True, return_tensors="pt")
            run.cut += count_cut(
                found["attention_mask"].sum(1).tolist(),
                run.config.max_length,
                [batch],
                partial(tokenize, run.tokenizer, max_length=None),
            )
            with run.as_trained():
                best = best_tags(run.model(**found.to(run.model.device)).logits).tolist()
            for k, words in enumerate(batch):
                tags = tags_of_words(found.word_ids(k), best[k], len(words), run.record.label_names)
                yield {**({"tokens": words} if cut_here else {}), "tags": tags}


def _words(cells: Sequence[Any]) -> list[list[str]]:
    """Lists of tokens as they are, and texts cut at their blanks."""
    return [cell.split() if isinstance(cell, str) else list(cell) for cell in cells]


def tokenize(tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int | None, **options: Any) -> Any:
    """Rows of tokens as pieces; a token after another one is read as after a blank."""
    steps = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(steps, pre_tokenizers.ByteLevel):
        # GPT-2's and RoBERTa's tokenizers refuse lists of tokens otherwise
        tokenizer.add_prefix_space = steps.add_prefix_space = True
    elif isinstance(steps, pre_tokenizers.Sequence) and "ByteLevel(" in repr(steps):
        # Qwen's and Llama 3's split a token first, and would put a blank before each part
        rows = [[f" {word}" for word in row] for row in rows]
    return tokenizer(
        [list(row) for row in rows],
        is_split_into_words=True,
        truncation=max_length is not None,
        max_length=max_length,
        verbose=False,
        **options,
    )


def first_pieces(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The tag of each token at its first piece, and elsewhere what the loss leaves out."""
    before = [None, *words[:-1]]
    return [IGNORED if word is None or word == last else tags[word] for word, last in zip(words, before, strict=True)]


def tags_of_words(words: Sequence[int | None], best: Sequence[int], n_words: int, names: Sequence[str]) -> list[Any]:
    """The tag at the first piece of each token; None for one that was cut off, has no piece, or numbers that are none.

    The tags of ``best`` are as :func:`best_tags` gives them.
    """
    first: dict[int, int] = {}
    for at, word in enumerate(words):
        if word is not None:
            first.setdefault(word, at)
    found = [best[first[word]] if word in first else NOT_FINITE for word in range(n_words)]
    return [None if tag == NOT_FINITE else names[int(tag)] for tag in found]


def best_tags(outputs: Any, labels: Tensor | None = None) -> Tensor:
    """The tag of each piece, (rows, pieces), out of (rows, pieces, tags) logits."""
    logits = logits_alone(outputs, labels)
    return logits.argmax(-1).where(logits.isfinite().all(-1), NOT_FINITE)


def score_tags(task: Task, best: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The scores of (rows, pieces) tags; all are NaN where one logit of a tag was not finite."""
    wanted = labels != IGNORED
    if (best[wanted] == NOT_FINITE).any():
        return dict.fromkeys(task.metrics, np.nan)
    rows = zip(best, labels, wanted, strict=True)
    pairs = [(tags[at].tolist(), golds[at].tolist()) for tags, golds, at in rows]
    return score_sequences(task, [tags for tags, _ in pairs], [golds for _, golds in pairs])


def score_sequences(task: Task, tags: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> dict[str, float]:
    """The task's metrics of the tags of each row: of entities by seqeval, of tokens as of classes."""
    flat = [[tag for row in rows for tag in row] for rows in (tags, golds)]
    by_token = [name for name in task.metrics if not name.startswith("entity_")]
    values = metrics.compute(by_token, *flat)
    if len(by_token) == len(task.metrics):
        return values
    words = [[[task.label_names[tag] for tag in row] for row in rows] for rows in (tags, golds)]
    return {**metrics.of_entities(*words), **values}
