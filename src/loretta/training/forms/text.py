"""Language modelling: documents one after the other, cut into blocks of tokens."""

from collections.abc import Callable, Mapping

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, default_data_collator

from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks.base import Task
from loretta.training.config import RunConfig
from loretta.training.forms.base import Data, Form, Recipe, Row
from loretta.training.forms.labels import ENCODED_AT_ONCE
from loretta.training.model import trains_base
from loretta.training.scores import named_values
from loretta.training.trainer import TwoRateTrainer


class Text(Form):
    """Blocks of ``max_length`` tokens."""

    unit, chosen_by = "blocks", "loss"

    def encode(self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> Dataset:
        return blocks(getattr(task, split), task.name, tokenizer, config.max_length)

    def lengths(self, data: Data) -> list[str]:
        return [f"a block is max_length={data.config.max_length} tokens of texts that follow each other"]

    def recipe(self, data: Data) -> Recipe:
        # the collator of language models would leave out the end of each text where the same token pads
        return Recipe(trainer=TwoRateTrainer, options={"data_collator": default_data_collator})

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        if split == "validation":
            return {}, []  # the history has its scores
        output = trainer.predict(data.splits[split], metric_key_prefix=split)
        return named_values(output.metrics or {}, data.task, f"{split}_"), []

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        def score() -> Mapping[str, float]:
            loader = trainer.get_eval_dataloader(data.splits[split])
            output = trainer.evaluation_loop(loader, "Base model", prediction_loss_only=True, metric_key_prefix="base")
            return output.metrics or {}

        return base_scores(trainer, data.task, split, score)


def blocks(data: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Blocks of ``max_length`` tokens of a split, whose documents are joined, each with its end; all tokens are labels.

    Raises InputError when the text is too short for one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for start in range(0, len(data), ENCODED_AT_ONCE):
        found = tokenizer(data[start : start + ENCODED_AT_ONCE]["text"], verbose=False)["input_ids"]
        parts.append(np.fromiter((token for row in found for token in [*row, *end]), dtype=np.int64))
    ids = np.concatenate(parts)
    rows = ids[: len(ids) // max_length * max_length].reshape(-1, max_length)
    if not len(rows):
        raise InputError(
            f"a split of '{name}' has {len(ids)} tokens, less than one block of {max_length}: "
            "give more text or a smaller max_length"
        )
    return Dataset.from_dict({"input_ids": rows, "attention_mask": np.ones_like(rows), "labels": rows})


def base_scores(
    trainer: TwoRateTrainer, task: Task, split: str, score: Callable[[], Mapping[str, float]]
) -> Answers | None:
    """The scores of the base model; None where the method has changed the base itself.

    ``score`` gives those of the trainer's model as it is, as the Trainer names them, with the prefix "base".
    """
    model = trainer.model
    if not isinstance(model, PeftModel) or trains_base(model):
        return None
    with model.disable_adapter():
        values = named_values(score(), task, "base_")
    return Answers(
        split=split, rows=len(getattr(task, split)), constant="the base model without the adapter", baseline=values
    )
