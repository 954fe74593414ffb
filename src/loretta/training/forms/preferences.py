"""Pairs of answers, of which one is preferred: direct preference optimization (Rafailov et al. 2023) through TRL."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from loretta import processes
from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks.base import Task
from loretta.training.config import RunConfig
from loretta.training.forms.base import Recipe
from loretta.training.forms.turns import CHECKPOINTING, Rows, Turns, count_tokens, prepare, refuse_for_trl, with_trl
from loretta.training.trainer import TwoRateTrainer


class Preferences(Turns):
    """The reference is the base model, for which the adapter is switched off."""

    def encode(self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> Rows:
        data, notes = getattr(task, split), prepare(config, task, tokenizer)
        answers = ("chosen", "rejected")
        tokens = [max(count_tokens(tokenizer, row, task, config, answer) for answer in answers) for row in data]
        return Rows(data=data, tokens=tokens, notes=tuple(notes))

    def recipe(
        self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, Any]
    ) -> Recipe:
        from trl import DPOConfig, DPOTrainer

        refuse_for_trl(config)
        if config.packing:
            raise InputError("packing is for chats and completions, and not for pairs of answers: leave it out")
        if config.start_from is not None:
            raise InputError(
                "start_from: pairs are held to the base model, and not to the run that the training starts from: give "
                "--model the merged model that `loretta export` makes of that run"
            )
        if processes.count() > 1:
            raise InputError("pairs of answers are trained in one process: leave torchrun out")
        options: dict[str, Any] = {
            CHECKPOINTING: config.gradient_checkpointing,
            "max_length": config.max_length,
            "beta": config.beta,
        }
        data = {"train_dataset": encoded["train"].data, "eval_dataset": encoded["validation"].data}
        return Recipe(trainer=with_trl(DPOTrainer), options=data, arguments=partial(DPOConfig, **options))

    def describe(
        self, task: Task, trainer: TwoRateTrainer, encoded: Mapping[str, Any], split: str, rows: list[dict[str, Any]]
    ) -> Answers | None:
        return Answers(
            split=split,
            rows=len(getattr(task, split)),
            constant="the base model, which prefers neither of two answers,",
            baseline={"loss": math.log(2), "rewards/accuracies": 0.5, "rewards/margins": 0.0},
        )
