"""What a run asks of a kind of task: its examples, its trainer, its answers."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase, TrainingArguments

from loretta.record import Answers
from loretta.training.config import RunConfig
from loretta.training.loaded import LoadedRun
from loretta.training.trainer import TwoRateTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The trainer of a kind of task.

    Args:
        options: of the trainer, beside those that every run has.
        arguments: makes the Trainer's options out of those that every run has.
    """

    trainer: type[TwoRateTrainer]
    options: Mapping[str, Any]
    arguments: Callable[..., TrainingArguments] = TrainingArguments


# loretta.training.trainers.make_trainer, which itself asks the forms for their recipes
MakeTrainer = Callable[..., TwoRateTrainer]


class Form(Protocol):
    """One kind of task. A split stays in the order of the task's rows throughout."""

    unit: str  # of the examples of a split, in words
    chosen_by: str  # "metric" or "loss": what chooses the best checkpoint where nothing is said

    def encode(self, config: RunConfig, task: Any, tokenizer: PreTrainedTokenizerBase, split: str) -> Any:
        """A split as the trainer takes it. Raises InputError for rows that do not fit the tokenizer or the length."""

    def lengths(
        self, config: RunConfig, task: Any, encoded: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """How many examples are too long, and what they lose, a sentence each."""

    def notes(self, config: RunConfig, encoded: Mapping[str, Any]) -> list[str]:
        """What a reader of the result should know of the examples, a sentence each."""

    def recipe(
        self, config: RunConfig, task: Any, tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, Any]
    ) -> Recipe:
        """Raises InputError for options of the run that this kind of task has not."""

    def counts(self, task: Any) -> dict[str, list[int]]:
        """Rows of each class in each split; empty for what has no classes."""

    def texts(self, task: Any, split: str) -> list[tuple[str, ...]]:
        """What each row of a split asks, to tell equal rows by."""

    def answer(
        self, task: Any, trainer: TwoRateTrainer, encoded: Mapping[str, Any], split: str
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The scores of a split by the trained model, and a row of ``predictions.jsonl`` for each example, or none.

        A row holds what was asked ("text", of a pair "text_pair"), the "gold" answer and the model's.
        """

    def describe(
        self, task: Any, trainer: TwoRateTrainer, encoded: Mapping[str, Any], split: str, rows: list[dict[str, Any]]
    ) -> Answers | None:
        """The answers, with the best constant answer; None where no constant answer can be compared."""

    def evaluate(self, run: LoadedRun, task: Any, split: str, make_trainer: MakeTrainer) -> dict[str, float]:
        """The scores of a split by a run that was loaded again, through a trainer where its steps score."""

    def asked(self, config: RunConfig, columns: Mapping[str, list[Any]], file: Path) -> list[list[Any]]:
        """The columns of a file that a run answers. Raises InputError for a column or a cell that is missing."""

    def predict(
        self, run: LoadedRun, asked: Sequence[Sequence[Any]], *, all_probabilities: bool, go_on: Any
    ) -> list[dict[str, Any]]:
        """An answer for each example of :meth:`asked`."""


def evaluate_again(form: Form, run: LoadedRun, task: Any, split: str, make_trainer: MakeTrainer) -> dict[str, float]:
    """What the trainer of a form says of a split, with a run that was loaded again."""
    rows = form.encode(run.config, task, run.tokenizer, split)
    of_training = {"cpu": run.model.device.type == "cpu", "tensorboard": False, "report_to": None, "packing": False}
    config = run.config.model_copy(update=of_training)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            config, task, run.model, run.tokenizer, {"train": rows, "validation": rows}, Path(folder)
        )
        return trainer.evaluate()
