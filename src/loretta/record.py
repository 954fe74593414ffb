"""What a run leaves behind: the content of ``run.json``."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from loretta.errors import InputError
from loretta.files import read_object, read_plain
from loretta.folders import no_folder
from loretta.tt import TTShape

# no machine has more of anything, and floats hold it
Count = Annotated[int, Field(ge=0, lt=2**63)]


class ParameterCounts(BaseModel, frozen=True):
    """Trainable parameters by what they are, and the size of the whole model, as numbers of scalars."""

    cores: Count = Field(description="entries of the tensor-train cores, one of which may be a matrix")
    biases: Count = Field(description="of the adapters or of the base model")
    norms: Count = Field(description="weights and biases of normalisation layers")
    scales: Count = Field(default=0, description="factors on keys, values and MLPs")
    tokens: Count = Field(default=0, description="rows of embeddings that belong to single tokens")
    head: Count = Field(description="the task's own output layer")
    other: Count = Field(description="what another method trains beside these, such as LoRA's matrices")
    total: Count

    @property
    def trainable(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)


KINDS = {name: field.description or "" for name, field in ParameterCounts.model_fields.items() if name != "total"}


class Train(BaseModel, frozen=True):
    """One kind of tensor train in the model and how many there are; the fields of ``loretta.tt.TTShape``."""

    at: str  # ending of the modules' names, and whether the train goes down to the bottleneck or up from it
    count: int
    in_features: int
    out_features: int
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    n_in: int
    split: int

    @model_validator(mode="after")
    def _is_a_train(self) -> "Train":
        self.shape()
        return self

    def shape(self) -> TTShape:
        """The plan of the train."""
        return TTShape(**self.model_dump(exclude={"at", "count"}))


class Point(BaseModel, frozen=True):
    """One logged moment of a run."""

    step: int
    epoch: float
    split: str  # "train" or "validation"
    values: dict[str, float]  # "loss", and on validation the metrics by name; on train "learning_rate", "grad_norm"


class Mistake(BaseModel, frozen=True):
    """A wrong answer: of a class with its probability, of a score with the distance to it."""

    text: str
    gold: str
    answer: str
    size: float  # probability of the wrong class, or distance of the score


class Answers(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """A run's answers on the split that scores it, and the score of the best answer that reads no text."""

    split: str  # "test", or "validation" where there is none
    rows: int
    constant: str  # the best that needs no text, in words: the most frequent class of the training data, its mean
    baseline: dict[str, float]  # its scores, by metric
    confusion: list[list[int]] = []  # rows of each class (outer) by the class that was answered (inner)
    only: str | None = None  # the answer, where all answers are the same
    mistakes: list[Mistake] = []  # the worst ones first


class RunRecord(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """One finished training run. Seconds and bytes are plain; memory is the peak above the process's start."""

    config: dict[str, Any]
    command: str
    versions: dict[str, str]
    model: str
    task: str
    method: str
    kind: str  # of the task: loretta.tasks.base.Kind, or "choice" or "generation" of a prompted one
    seed: int
    device: str
    sizes: dict[str, Count]  # examples (or blocks of text) per split
    notes: list[str] = []  # what a reader should know about the data, a sentence each
    label_names: list[str] = []  # classification: class id -> name
    label_counts: dict[str, list[int]] = {}  # classification: split -> rows of each class
    answers: Answers | None = None  # None: generated answers and language models
    metric: str  # the task's first
    higher_is_better: bool
    selected_by: str = "metric"  # or "loss": what chose the best checkpoint, on validation
    learning_rate: float | None = None  # the highest of the schedule
    parameters: ParameterCounts
    trains: list[Train] = []
    adapter_bytes: Count
    population: int | None = None  # runs that were trained at once; the seconds are this one's share, the bytes of all
    train_seconds: float  # with those before the checkpoint that the run went on from
    peak_memory_bytes: Count
    history: list[Point]
    best_step: int
    validation: dict[str, float]  # at the best step
    test: dict[str, float] | None

    @property
    def scores(self) -> dict[str, float]:
        """Those of the test split, or of validation where there is none."""
        return self.validation if self.test is None else self.test

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Read a ``run.json``. Raises InputError when it is missing or is not one."""
        try:
            return cls.model_validate_json(read_plain(path))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(_why_no_record(path.parent)) from None
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"'{path}' is not a run.json of `loretta train` ({first}): remove it to do the run again"
            ) from None


def is_started(folder: Path) -> bool:
    """Whether the ``config.json`` in a folder is of a run, though it be one of a later version."""
    return (read_object(folder / "config.json") or {}).keys() >= {"model", "data", "method"}


def _why_no_record(folder: Path) -> str:
    """Why a folder has no ``run.json``, and what to give in its place."""
    if is_started(folder):
        return f"the run in '{folder}' is not finished: go on with loretta train --resume {shlex.quote(str(folder))}"
    if not folder.is_dir():
        return f"{no_folder(folder)}: give one that `loretta train` wrote"
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    such = f", but folders of runs, such as '{runs[0]}': give one of them" if runs else ""
    return f"no run.json in '{folder}'{such or ': give the folder that `loretta train` wrote'}"
