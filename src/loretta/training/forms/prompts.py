"""Tasks that are prompts: the answer is the most probable option, or generated text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loretta.record import Answers, Mistake
from loretta.tasks.prompted import PromptedTask
from loretta.tasks.split import text_key
from loretta.training.config import RunConfig
from loretta.training.forms.base import Data, Form, MakeTrainer, Recipe, Row
from loretta.training.forms.labels import LONGEST, MISTAKES, count_classes, finite
from loretta.training.loaded import LoadedRun
from loretta.training.prompted import PromptedTrainer, Texts, encode_examples, judge, loss_of, notes_on_length
from loretta.training.trainer import TwoRateTrainer


class Prompts(Form):
    """Choice and generation."""

    unit, chosen_by = "rows", "loss"

    def encode(
        self, config: RunConfig, task: PromptedTask, tokenizer: PreTrainedTokenizerBase, split: str
    ) -> list[Texts]:
        # training as language modelling reads the gold completion alone
        gold_alone = split == "train" and loss_of(config, task) == "language_modeling"
        return encode_examples(getattr(task, split), tokenizer, config, gold_alone=gold_alone)

    def lengths(self, data: Data) -> list[str]:
        return self.notes(data) or [f"no prompt is longer than max_length={data.config.max_length} allows"]

    def notes(self, data: Data) -> list[str]:
        return notes_on_length(data.splits, data.config)

    def recipe(self, data: Data) -> Recipe:
        lengths = [len(texts) for texts in data.splits["train"]]
        return Recipe(trainer=PromptedTrainer, options={"data": data, "lengths": lengths})

    def counts(self, task: PromptedTask) -> dict[str, list[int]]:
        return count_classes(task, _golds)  # type: ignore[arg-type]

    def texts(self, task: PromptedTask, split: str) -> list[tuple[str, ...]]:
        return [text_key((example.prompt,)) for example in getattr(task, split)]

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        judged = judge(trainer.model, data, split)
        return judged.values, [
            {"text": example.prompt, "gold": example.completion.strip(), **row}
            for example, row in zip(getattr(data.task, split), judged.answers, strict=True)
        ]

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        task: PromptedTask = data.task
        examples = getattr(task, split)
        if task.kind != "choice":
            return None
        place = Counter(_golds(task.train)).most_common(1)[0][0]
        if any(len(example.options) <= place for example in examples):
            return None
        names = {example.options[place].strip() for example in examples}
        alike = len(names) == 1
        constant = (
            f"{names.pop()!r}, the most frequent answer" if alike else f"option {place + 1}, the most frequent one"
        )
        wrong = [k for k, row in enumerate(rows) if row["option"] != row["gold"]]
        sure = [_probability(row["log_probabilities"]) for row in rows]
        answered = {row["option"] for row in rows}
        return Answers(
            split=split,
            rows=len(rows),
            constant=f"{constant} of train,",
            baseline=task.score([place] * len(examples), examples),
            only=answered.pop() if alike and len(answered) == 1 else None,
            mistakes=[
                # the end of a prompt is what is asked
                Mistake(
                    text=examples[k].prompt[-LONGEST:], gold=rows[k]["gold"], answer=rows[k]["option"], size=sure[k]
                )
                for k in sorted(wrong, key=lambda k: -sure[k])[:MISTAKES]
            ],
        )

    def evaluate(self, run: LoadedRun, task: PromptedTask, split: str, make_trainer: MakeTrainer) -> dict[str, float]:
        texts = {split: encode_examples(getattr(task, split), run.tokenizer, run.config)}
        data = Data(config=run.config, task=task, tokenizer=run.tokenizer, splits=texts)
        return judge(run.model, data, split).values


def _golds(examples: Any) -> list[int]:
    return [example.correct[0] for example in examples if example.correct]


def _probability(log_probabilities: Sequence[float]) -> float:
    values = np.array(log_probabilities)
    return finite(float(np.exp(values.max() - np.logaddexp.reduce(values))))
