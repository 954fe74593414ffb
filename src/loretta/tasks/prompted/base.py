"""A prompted task: its examples and how to score them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loretta.errors import InputError
from loretta.tasks.metrics import compute

Kind = Literal["choice", "generation"]
TrainAs = Literal["classification", "language_modeling"]
Row = Mapping[str, Any]  # one row with the Hub's fields, and "split": "train" or "validation"

STOP = "\n"  # ends every answer: training appends it, and text that a model writes after it is cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and what should follow it.

    ``prompt + option`` is the text to score: an option begins with the blank before it, unless the prompt ends with a
    line end.
    """

    prompt: str
    options: tuple[str, ...] = ()  # choice: completions to choose from; () for generation
    correct: tuple[int, ...] = ()  # choice: the right options, the first one is trained on (ReCoRD has several)
    answers: tuple[str, ...] = ()  # generation and ReCoRD: gold answers as text, the first one is trained on
    entities: tuple[str, ...] = ()  # ReCoRD: what each option puts into the blank
    spans: tuple[tuple[str, ...], ...] = ()  # DROP: the parts of each answer

    @property
    def completion(self) -> str:
        """The text that training appends to the prompt: the right option, or the first answer and :data:`STOP`."""
        return self.options[self.correct[0]] if self.options else f" {self.answers[0]}{STOP}"


Scorer = Callable[[Sequence[Any], Sequence[Example]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How many examples of each split are drawn; the defaults are those of the LoRETTA paper."""

    train: int = 1000
    validation: int = 500
    test: int = 1000

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            if getattr(self, split) < 1:
                raise InputError(f"the sample needs at least 1 {split} example, got {getattr(self, split)}: raise it")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedTask:
    """Drawn examples, each split in a random order, and how to score what a model makes of them."""

    name: str
    kind: Kind
    train_as: TrainAs  # the loss with which MeZO (Malladi et al. 2023) trains the task
    metrics: tuple[str, ...]  # keys of score(); the first one is the task's main metric
    label_names: tuple[str, ...]  # option -> name, where every example has the same options; () otherwise
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...] = ()  # sentences on the data for a reader of the results
    scorer: Scorer = field(repr=False)

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Metric -> fraction from 0 to 1. A prediction is the index of an option, or generated text up to :data:`STOP`.

        Raises InputError: no examples, or not as many predictions as examples.
        """
        if len(predictions) != len(examples) or not len(examples):
            raise InputError(
                f"scoring needs one prediction for each of at least one example, "
                f"got {len(predictions)} predictions and {len(examples)} examples"
            )
        if self.kind == "generation":
            predictions = [text.lstrip().partition(STOP)[0].rstrip() for text in predictions]
        return self.scorer(predictions, examples)

    def limited(self, rows: int) -> "PromptedTask":
        """The same task with the first ``rows`` examples of each split."""
        return replace(
            self,
            train=self.train[:rows],
            validation=self.validation[:rows],
            test=self.test[:rows],
            notes=(*self.notes, f"each split is cut to at most {rows} rows"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedSpec:
    """One task as the Hub has it, and how its rows become examples. The sizes are rows of the official splits."""

    name: str
    hub: tuple[str, ...]  # arguments of datasets.load_dataset
    kind: Kind = "choice"
    train_as: TrainAs = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    label_names: tuple[str, ...] = ()
    texts: tuple[str, ...]  # fields of plain text, on which alone the draw depends
    gold: tuple[str, ...] = ("label",)  # the other fields to read
    train_rows: int
    validation_rows: int
    max_validation: int | None = None  # most examples for validation, where a small task keeps more for training
    hub_note: str | None = None  # what the Hub's form of the rows loses
    # returns None for a row without a usable answer; raises ValueError with what the row should hold
    example: Callable[[Row], Example | None]
    scorer: Scorer | None = None  # None: class ids through loretta.tasks.metrics

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        if self.scorer is not None:
            return self.scorer(predictions, examples)
        return compute(self.metrics, list(predictions), [example.correct[0] for example in examples])


def class_id(row: Row, n_classes: int) -> int | None:
    """The label of a row; None where it has none, which the Hub writes as -1. Raises ValueError for another one."""
    label = row["label"]
    if label is None or label == -1:
        return None
    if type(label) is not int or not 0 <= label < n_classes:
        raise ValueError(f"a class id from 0 to {n_classes - 1} as 'label'")
    return label


def of_classes(prompt: Callable[[Row], str], options: tuple[str, ...]) -> Callable[[Row], Example | None]:
    """Makes examples of rows with a label: an option for each class behind the ``prompt`` of the row's texts."""

    def example(row: Row) -> Example | None:
        label = class_id(row, len(options))
        return None if label is None else Example(prompt=prompt(row), options=options, correct=(label,))

    return example


def strings(values: Any, field_name: str) -> tuple[str, ...]:
    """The texts of a list that are not blank, each once, in order. Raises ValueError for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"a list of texts as {field_name!r}")
    return tuple(dict.fromkeys(value.strip() for value in values if value.strip()))
