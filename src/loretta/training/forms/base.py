"""What a run needs of each kind of task: its examples, its trainer, its answers."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainingArguments

from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks.files import refuse_missing
from loretta.tasks.glue import GLUE
from loretta.tasks.read import require
from loretta.tasks.split import text_key
from loretta.training.config import RunConfig
from loretta.training.loaded import LoadedRun
from loretta.training.scores import named_values
from loretta.training.trainer import TwoRateTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The trainer of a kind of task, its options beside those of every run, and what holds the arguments of both."""

    trainer: type[TwoRateTrainer]
    options: Mapping[str, Any]
    arguments: Callable[..., TrainingArguments] = TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a run learns from: its task, and the splits of it as the trainer takes them."""

    config: RunConfig
    task: Any  # a Task, or a PromptedTask
    tokenizer: PreTrainedTokenizerBase
    splits: Mapping[str, Any]


Row = dict[str, Any]
Asked = Sequence[Sequence[Any]]  # the columns that a model answers
# loretta.training.arguments.make_trainer, which itself asks the forms for their recipes
MakeTrainer = Callable[[Data, Any, Path], TwoRateTrainer]


class Form(Protocol):
    """One kind of task. The examples of a split keep the order of its rows."""

    unit: str  # word for the examples of a split
    chosen_by: str  # "metric" or "loss": what chooses the best checkpoint by default

    def encode(self, config: RunConfig, task: Any, tokenizer: PreTrainedTokenizerBase, split: str) -> Any:
        """A split as the trainer takes it. Raises InputError for rows that do not fit the tokenizer or the length."""

    def largest_token(self, rows: Any) -> int:
        """The largest token of an encoded split; by default of a data set with ``input_ids``."""
        return pc.max(pc.list_flatten(rows.with_format("arrow")["input_ids"][:])).as_py() or 0

    def lengths(self, data: Data) -> list[str]:
        """Sentences on how many examples are too long, and what these lose."""

    def cut(self, data: Data, split: str) -> int:
        """How many texts of a split lose an end to the run's ``max_length``; by default nobody counts them."""
        return 0

    def notes(self, data: Data) -> list[str]:
        """Sentences on the examples for a reader of the results; by default none."""
        return []

    def recipe(self, data: Data) -> Recipe:
        """How to train. Raises InputError for options of the run that do not fit this kind of task."""

    def counts(self, task: Any) -> dict[str, list[int]]:
        """Rows of each class in each split; by default empty, for tasks without classes."""
        return {}

    def texts(self, task: Any, split: str) -> list[tuple[str, ...]]:
        """A key that rows of a split with the same question share; by default their texts."""
        data = getattr(task, split)
        return [text_key(words) for words in zip(*(data[column][:] for column in task.columns), strict=True)]

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        """The scores of the trained model on a split, and a row of ``predictions.jsonl`` for each example, or no rows.

        A row holds the question ("text", of a pair also "text_pair"), the "gold" answer and the model's.
        """

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        """The answers, with the best constant answer; None where no constant answer can be compared."""

    def evaluate(self, run: LoadedRun, task: Any, split: str, make_trainer: MakeTrainer) -> dict[str, float]:
        """The scores on a split of a run that was loaded again; by default those of the form's trainer."""
        rows = self.encode(run.config, task, run.tokenizer, split)
        other = {"cpu": run.model.device.type == "cpu", "tensorboard": False, "report_to": None, "packing": False}
        config = run.config.model_copy(update=other)
        data = Data(
            config=config, task=task, tokenizer=run.tokenizer, splits={split: rows, "train": rows, "validation": rows}
        )
        run.cut += self.cut(data, split)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(data, run.model, Path(folder))
            trainer.remove_callback(ProgressCallback)
            return named_values(trainer.evaluate(), task, "eval_")

    def asked(self, config: RunConfig, columns: Mapping[str, list[Any]], file: Path) -> list[list[Any]]:
        """The columns of a file that a run answers, by default as text. Raises InputError where one is missing."""
        names = text_columns(config)
        require(file, names, tuple(columns))
        for name in names:
            refuse_missing(columns[name], name, file)
        return [[str(value) for value in columns[name]] for name in names]

    def predict(self, run: LoadedRun, asked: Asked, *, all_probabilities: bool, go_on: Any) -> Iterator[Row]:
        """An answer for each example of :meth:`asked`, one after the other; by default the model's continuation."""
        if all_probabilities:
            raise InputError(f"the run was trained on a {run.kind} task and has no classes: leave --probabilities out")
        for example in asked[0]:
            yield {"continuation": go_on(run, example)}


def text_columns(config: RunConfig) -> tuple[str, ...]:
    """The columns of text, by their names in the data, that a run was trained on."""
    if config.data in GLUE:
        return GLUE[config.data].columns
    return (config.text or "text", *((config.text_pair,) if config.text_pair else ()))
