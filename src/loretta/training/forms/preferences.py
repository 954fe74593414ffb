"""Pairs of answers, of which one is preferred: direct preference optimization (Rafailov et al. 2023) through TRL."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase

from loretta import processes
from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks.base import Task
from loretta.training.config import RunConfig
from loretta.training.folder import ADAPTER
from loretta.training.forms.base import Data, Recipe, Row
from loretta.training.forms.turns import CHECKPOINTING, Rows, Turns, prepare, tokens_of, trl_data, with_trl
from loretta.training.methods import virtual_tokens
from loretta.training.model import load_base, start_from, trains_base
from loretta.training.trainer import TwoRateTrainer


class Preferences(Turns):
    """The reference is the model before its first step: the base, or the run that the training starts from."""

    def encode(self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> Rows:
        data, notes = getattr(task, split), prepare(config, task, tokenizer)
        answers = ("chosen", "rejected")
        tokens = [[tokens_of(tokenizer, row, task, config, answer) for answer in answers] for row in data]
        return Rows.of(data, tokens, notes)

    def recipe(self, data: Data) -> Recipe:
        config = data.config
        from trl import DPOConfig, DPOTrainer

        if config.start_from is not None and virtual_tokens(config.method, config.method_args):
            raise InputError(
                f"start_from: method {config.method!r} puts its tokens in front of a text, and TRL's reference model "
                "takes none: give another method"
            )
        if processes.count() > 1:
            raise InputError("pairs of answers are trained in one process: leave torchrun out")
        options: dict[str, Any] = {
            CHECKPOINTING: config.gradient_checkpointing,
            "max_length": config.max_length,
            "beta": config.beta,
        }
        more = {**trl_data(data), "reference": partial(_reference, config), "loss_is_mean": True}
        return Recipe(trainer=with_trl(DPOTrainer), options=more, arguments=partial(DPOConfig, **options))

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        return Answers(
            split=split,
            rows=len(getattr(data.task, split)),
            constant="the model before its first step, which prefers neither of two answers,",
            baseline={"loss": math.log(2), "rewards/accuracies": 0.5, "rewards/margins": 0.0},
        )


def _reference(config: RunConfig, model: Any) -> nn.Module | None:
    """What the training starts from, also where ``model`` is trained already; it shares the weights of the base.

    None stands for the model with its adapter switched off. Raises InputError where the run it started from is gone.
    """
    before = None if config.start_from is None else Path(config.start_from) / ADAPTER
    if before is not None and not before.is_dir():
        raise InputError(f"the pairs are held to the run '{config.start_from}', which is gone: put it back")
    if not isinstance(model, PeftModel) or (before is None and trains_base(model)):
        base = load_base(
            str(before or config.model), "preference", dtype=config.dtype, quantize=config.quantize, cpu=config.cpu
        )
        return (base if config.quantize else base.to(model.dtype)).requires_grad_(False)
    if before is None:
        return None
    own = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
    shared = [*(p for p in model.parameters() if p.data_ptr() not in own), *model.buffers()]
    reference = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    start_from(reference, before)
    return reference.requires_grad_(False).get_base_model()
