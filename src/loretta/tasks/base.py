"""A task: the data of a supervised run and how to score it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import datasets

Kind = Literal[
    "classification",
    "regression",
    "language_modeling",
    "chat",
    "completion",
    "preference",
    "token_classification",
    "multi_label",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The labels that a model was trained with: other data are read by them, whichever of them these have."""

    data: str  # where they were found
    label_names: tuple[str, ...]  # () for scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Splits in one form for all sources, and how to score them.

    The columns of a split by kind:

    * classification, regression: "text", for pairs also "text_pair", and "label" (a class id, or a score as float)
    * multi_label: the same, where "label" is a list of 0.0 and 1.0, one for each of ``label_names``
    * language_modeling: "text"
    * chat: "messages" (each with "role" and "content"), or "prompt" and "completion" as lists of messages
    * completion: "prompt" and "completion" as text
    * preference: "prompt", "chosen" and "rejected" as text or as messages
    * token_classification: "tokens" and "tags" (class ids), both lists
    """

    name: str  # "sst2", "reviews.csv", "stdlib"
    kind: Kind
    columns: tuple[str, ...]  # the model's input, in order: ("text",), ("text", "text_pair"), ("messages",)
    label_names: tuple[str, ...]  # classification: class id -> name; () otherwise
    metrics: tuple[str, ...]  # names of loretta.tasks.metrics; the first one selects the best checkpoint
    train: "datasets.Dataset"
    validation: "datasets.Dataset"
    test: "datasets.Dataset | None"
    notes: tuple[str, ...] = ()  # sentences on the data for a reader of the results

    def limited(self, rows: int) -> "Task":
        """The same task with at most ``rows`` rows a split, drawn at random and the same in each run."""

        def cut(split: "datasets.Dataset") -> "datasets.Dataset":
            return split.shuffle(seed=0).select(range(rows)) if len(split) > rows else split

        return replace(
            self,
            train=cut(self.train),
            validation=cut(self.validation),
            test=None if self.test is None else cut(self.test),
            notes=(*self.notes, f"each split is cut to at most {rows} rows"),
        )
