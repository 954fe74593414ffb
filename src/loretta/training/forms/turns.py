"""Conversations and completions: TRL tokenizes them and trains what the model has to answer."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments

from loretta.errors import InputError
from loretta.record import Answers
from loretta.tasks.base import Task
from loretta.tasks.turns import asked_of, key_of
from loretta.training.config import RunConfig
from loretta.training.forms.base import Data, Form, Recipe, Row
from loretta.training.forms.text import base_scores
from loretta.training.methods import virtual_tokens
from loretta.training.scores import named_values
from loretta.training.trainer import TwoRateTrainer
from loretta.wording import one_line, quoted

# transformers has given it another name
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
# For a tokenizer without one. What is between the marks of a generation is trained, the end of the text too.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant:{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}{{ '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# For a tokenizer that drops blanks: TRL looks for the token of the first character that is trained.
TEMPLATE_WITHOUT_BLANKS = PLAIN_TEMPLATE.replace("{% generation %} {{", " {% generation %}{{")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a split in the form that TRL takes, and what is to be said of them."""

    data: Dataset
    tokens: list[int]  # of each row, before it is cut
    largest: int  # the largest token of all
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Dataset, tokens: Sequence[Sequence[list[int]]], notes: Sequence[str]) -> "Rows":
        """``data``, of whose rows each has one or several texts of ``tokens``."""
        lengths = [max(map(len, texts)) for texts in tokens]
        largest = max((max(text, default=0) for texts in tokens for text in texts), default=0)
        return cls(data=data, tokens=lengths, largest=largest, notes=tuple(notes))

    def __len__(self) -> int:
        return len(self.data)


class Turns(Form):
    """Chat and completion. The loss is the mean over the tokens that the model has to answer."""

    unit, chosen_by = "rows", "loss"

    def encode(self, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: str) -> Rows:
        data, notes = getattr(task, split), prepare(config, task, tokenizer)
        if task.columns == ("messages",) and not _marks_answers(tokenizer):
            notes.append("the chat template does not mark the answers: each answer is a row with what came before it")
            data = Dataset.from_list([row for messages in data["messages"] for row in one_answer_each(messages)])
        return Rows.of(data, [[tokens_of(tokenizer, row, task, config)] for row in data], notes)

    def largest_token(self, rows: Rows) -> int:
        return rows.largest

    def lengths(self, data: Data) -> list[str]:
        fit = [] if self._cut(data) else [f"no row is longer than max_length={data.config.max_length} tokens"]
        return [*self.notes(data), *fit]

    def notes(self, data: Data) -> list[str]:
        return [*data.splits["train"].notes, *self._cut(data)]

    def _cut(self, data: Data) -> list[str]:
        tokens = [count for rows in data.splits.values() for count in rows.tokens]
        most = data.config.max_length
        cut = sum(count > most for count in tokens)
        if not cut:
            return []
        return [
            f"{cut:,} of the {len(tokens):,} rows are longer than max_length={most} tokens (the longest "
            f"has {max(tokens):,}): they lose their end, and without a part of an answer they are left out"
        ]

    def recipe(self, data: Data) -> Recipe:
        from trl import SFTConfig, SFTTrainer

        config, datasets = data.config, trl_data(data)
        if config.packing and virtual_tokens(config.method, config.method_args):
            raise InputError(f"packing: method {config.method!r} puts its tokens in front of a whole row: leave it out")
        options: dict[str, Any] = {
            CHECKPOINTING: config.gradient_checkpointing,  # which TRL would turn on
            "max_length": config.max_length,
            "packing": config.packing,
            "eval_packing": False,
            "assistant_only_loss": "messages" in datasets["train_dataset"].column_names,
        }
        return Recipe(trainer=with_trl(SFTTrainer), options=datasets, arguments=partial(SFTConfig, **options))

    def texts(self, task: Task, split: str) -> list[tuple[str, ...]]:
        return [key_of(row) for row in getattr(task, split)]

    def answer(self, data: Data, trainer: TwoRateTrainer, split: str) -> tuple[dict[str, float], list[Row]]:
        if split == "validation":
            return {}, []  # the history has its scores
        return named_values(score_after(trainer, data.splits[split].data, split), data.task, f"{split}_"), []

    def describe(self, data: Data, trainer: TwoRateTrainer, split: str, rows: list[Row]) -> Answers | None:
        return base_scores(trainer, data.task, split, lambda: score_after(trainer, data.splits[split].data, "base"))

    def asked(self, config: RunConfig, columns: Mapping[str, list[Any]], file: Path) -> list[list[Any]]:
        return [asked_of(columns, file, column=config.text or "text")]


def prepare(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give the tokenizer a chat template where it has none and needs one; what is to be said of it.

    Raises InputError without TRL, and for a tokenizer without an end of the text.
    """
    if importlib.util.find_spec("trl") is None:
        what = f"'{task.name}' ({task.kind})"
        raise InputError(f"{what} is trained through TRL, which is not installed: pip install 'loretta-peft[trl]'")
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of '{config.model}' has no end of text, which every answer needs: give it one")
    if isinstance(task.train[0].get("prompt"), str):
        return []
    if not tokenizer.chat_template:
        found = tokenizer("a: a", add_special_tokens=False)
        keeps_blanks = not tokenizer.is_fast or found.char_to_token(2) is not None
        tokenizer.chat_template = PLAIN_TEMPLATE if keeps_blanks else TEMPLATE_WITHOUT_BLANKS
    if tokenizer.chat_template not in (PLAIN_TEMPLATE, TEMPLATE_WITHOUT_BLANKS):
        return []
    return [f"'{config.model}' has no chat template: a plain one is used ('User: ...', 'Assistant: ...')"]


def trl_data(data: Data) -> dict[str, Dataset]:
    """The rows as TRL's trainers take them. Raises InputError for options of a run that do not go with these."""
    if data.config.cuda_graph:
        raise InputError("cuda_graph: TRL's trainers look at each loss, which no recorded step can: leave it out")
    return {"train_dataset": data.splits["train"].data, "eval_dataset": data.splits["validation"].data}


@cache
def with_trl(trainer: type) -> type[TwoRateTrainer]:
    """A trainer of TRL with what every run has: its order of the data, its checkpoints, its look at each loss."""

    class OfTrl(TwoRateTrainer, trainer):
        def __init__(self, *args: Any, model: Any, reference: Any = None, **kwargs: Any) -> None:
            if reference is not None:
                kwargs["ref_model"] = reference(model)
            # TRL rounds what is trained on a quantized base to bfloat16, where small steps are lost
            dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
            try:
                with without_bars():
                    super().__init__(*args, model=model, **kwargs)
            except RuntimeError as error:
                if "assistant_only_loss" not in str(error):
                    raise
                raise InputError(
                    f"the chat template marks no answer in at least one chat ({one_line(error)}): see that each has a "
                    "message of the assistant that is not empty, or mend the template"
                ) from None
            if "ref" in getattr(model, "peft_config", {}):
                # DPO's copy of an adapter that changes nothing yet: without it the base model is the reference
                model.delete_adapter("ref")
            for name, parameter in model.named_parameters():
                if name in dtypes:
                    parameter.data = parameter.data.to(dtypes[name])

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            with without_bars():
                return super().evaluate(*args, **kwargs)

        def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            found = super().prediction_step(model, inputs, *args, **kwargs)
            # TRL appends a mean over each batch, and takes the mean of them as if all had as many rows
            for values in self._metrics["eval"].values():
                values += values[-1:] * (len(inputs["input_ids"]) - 1)
            return found

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None: a run writes its own."""

    return OfTrl


def score_after(trainer: TwoRateTrainer, data: Dataset, prefix: str) -> dict[str, float]:
    """The trainer's scores of rows after the training. Its early stopping, which would look at them, is taken out."""
    trainer.remove_callback(EarlyStoppingCallback)
    values = trainer.evaluate(data, metric_key_prefix=prefix)
    # TRL's own scores are "eval_" of whatever was evaluated
    return {
        key.replace("eval_", f"{prefix}_", 1) if key.startswith("eval_") else key: value
        for key, value in values.items()
    }


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of datasets, of which TRL shows one for each thing that it does to a row."""
    were_hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            enable_progress_bars()


def one_answer_each(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A row for each answer of a conversation, with the messages before it; an answer to nothing is left out."""
    at = [k for k, message in enumerate(messages) if k and message["role"] == "assistant"]
    return [{"prompt": list(messages[:k]), "completion": [messages[k]]} for k in at]


def _marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether TRL can tell the answers of a conversation by the template, or knows one that marks them."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    task: Task,
    config: RunConfig,
    answer: str = "completion",
) -> list[int]:
    """The tokens of a row with its ``answer``. Raises InputError where the chat template refuses it."""
    if isinstance(row.get("prompt"), str):
        return list(tokenizer(row["prompt"] + row[answer] + tokenizer.eos_token, verbose=False)["input_ids"])
    messages = row["messages"] if "messages" in row else row["prompt"] + row[answer]
    try:
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, verbose=False)
        return list(found["input_ids"])
    except Exception as error:  # a template is a program that raises what it likes
        raise InputError(
            f"the chat template of '{config.model}' refuses a chat of '{task.name}' that begins with "
            f"{quoted(messages[0]['content'])} ({one_line(error)}): mend its roles or their order"
        ) from None
