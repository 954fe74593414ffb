"""Data for decoders: conversations, prompts with completions or with pairs of answers, Alpaca's rows -> Task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from loretta.errors import InputError
from loretta.tasks.base import Kind, Task
from loretta.tasks.read import require
from loretta.tasks.sources import Source, column_names, read_columns, wrong_cell
from loretta.tasks.split import OtherFiles, split_rows, text_key
from loretta.wording import listed, quoted

SHARE = 0.1  # of the rows, held out for validation
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names
OTHER_ROLES = {"human": "user", "gpt": "assistant"}
OTHER_KEYS = {"role": "from", "content": "value"}
METRICS = ("perplexity",)
REWARDS = ("rewards/accuracies", "rewards/margins")

Message = dict[str, str]
Row = dict[str, Any]


def turns_of(columns: Sequence[str]) -> tuple[str, ...] | None:
    """The columns by which a table is one of these forms; None for any other table."""
    return next((names for names in READERS if set(names) <= set(columns)), None)


def load_turns(path: Source, *, kind: Kind | None = None, **files: Unpack[OtherFiles]) -> Task:
    """Conversations, prompts with completions, Alpaca's rows, or pairs of answers ("chosen", "rejected").

    The kind is "completion" for prompts and completions of plain text, which are joined as they stand, "preference" for
    pairs of answers, and "chat" for the others; ``kind="chat"`` also turns prompts and completions into conversations.
    Without a validation file, 10% of the rows are held out by ``seed``; rows that ask the same stay on one side.

    Raises InputError: a file that cannot be read, a row that cannot be trained, files of different forms, or too few
    rows to split.
    """
    from datasets import Dataset

    splits = split_rows(
        path,
        read_turns(path, kind),
        lambda other: read_turns(other, kind),
        key=question,
        share=SHARE,
        **files,
        alike="rows that ask the same",
    )
    first = splits.train[0]
    columns = tuple(first)
    for name, rows in (("validation_path", splits.validation), ("test_path", splits.test)):
        if rows and tuple(rows[0]) != columns:
            raise InputError(
                f"'{files.get(name)}' holds {listed(rows[0])} and '{path}' holds {listed(columns)}: give one form"
            )
    of_text = isinstance(first.get("prompt"), str)
    found: Kind = "preference" if "chosen" in first else "completion" if of_text else "chat"
    if kind not in (None, found):
        raise InputError(f"'{path}' holds {listed(columns)}, of the kind {found}, and not {kind}: leave --kind out")
    return Task(
        name=path.name,
        kind=found,
        columns=columns,
        label_names=(),
        metrics=REWARDS if found == "preference" else METRICS,
        **splits.datasets(Dataset.from_list),
        notes=tuple(splits.notes),
    )


def read_turns(path: Source, kind: Kind | None) -> list[Row]:
    """The rows of a file: "messages", or "prompt" with "completion" or with "chosen" and "rejected".

    Prompts and answers are text, or lists of messages. Raises InputError as :func:`load_turns` does.
    """
    found = column_names(path)
    names = turns_of(found)
    if names is None:
        raise InputError(f"'{path}' has the columns {listed(found)}: {FORMS_IN_WORDS}")
    also = [name for name in (*OPTIONAL, "prompt") if name in found and name not in names]
    columns = read_columns(path, (*names, *also))
    rows = []
    for at, cells in enumerate(zip(*columns.values(), strict=True)):
        row = READERS[names](Cells(path, at, dict(zip(columns, cells, strict=True))))
        if kind == "chat" and "completion" in row and isinstance(row["prompt"], str):
            row = {"messages": [turn("user", row["prompt"]), turn("assistant", row["completion"])]}
        rows.append(row)
    if len({(tuple(row), type(row.get("prompt"))) for row in rows}) > 1:
        raise InputError(f"column 'prompt' of '{path}' holds text in some rows and messages in others: give one form")
    return rows


def question(row: Row) -> tuple[str, ...]:
    """The question of a row, without its answers: rows with the same question belong on one side of a split."""
    asked = row["messages"] if "messages" in row else row["prompt"]
    return (asked,) if isinstance(asked, str) else tuple(m["content"] for m in asked if m["role"] != "assistant")


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Cells:
    """One row of a file, ``at`` counts from 0. A bad cell is refused with its row and column."""

    def __init__(self, source: Source, at: int, values: Mapping[str, Any]) -> None:
        self.source, self.at, self.values = source, at, values

    def wrong(self, column: str, what: str) -> InputError:
        return wrong_cell(self.source, self.at, column, what)

    def text(self, column: str) -> str:
        """A cell with text in it."""
        value = self.values[column]
        if not isinstance(value, str):
            raise self.wrong(column, f"{quoted(value)} is not text: give text")
        if not value.strip():
            raise self.wrong(column, "the cell is empty: fill it or leave the row out")
        return value

    def maybe(self, column: str) -> str:
        """The text of a cell that may be missing or empty: then ""."""
        value = self.values.get(column)
        is_empty = value is None or (isinstance(value, str) and not value.strip())
        return "" if is_empty else self.text(column)

    def messages(self, column: str, *, role: str = "role", content: str = "content") -> list[Message]:
        """A cell with a list of messages."""
        given = self.values[column]
        if not isinstance(given, list):
            raise self.wrong(column, f"{quoted(given)} is not a list of messages: give [{{role, content}}, ...]")
        if not given:
            raise self.wrong(column, "the list of messages is empty: fill it or leave the row out")
        return [self._message(column, at, message, role, content) for at, message in enumerate(given, start=1)]

    def _message(self, column: str, at: int, message: Any, role: str, content: str) -> Message:
        if not isinstance(message, dict) or role not in message or content not in message:
            raise self.wrong(column, f"message {at} is {quoted(message)}: give it {role!r} and {content!r}")
        who, words = OTHER_ROLES.get(message[role], message[role]), message[content]
        if who not in ROLES:
            raise self.wrong(column, f"message {at} has the unknown role {quoted(who)}: give one of {listed(ROLES)}")
        if message.get("tool_calls"):
            raise self.wrong(column, f"message {at} calls tools, which are not trained: write the call as its content")
        if not isinstance(words, str):
            raise self.wrong(column, f"message {at} has the content {quoted(words)}: give text")
        if who == "assistant" and not words.strip():
            raise self.wrong(column, f"message {at}, of the assistant, is empty: fill it or leave the row out")
        return turn(who, words)


def _chat(row: Cells, column: str = "messages", **keys: str) -> Row:
    messages = row.messages(column, **keys)
    if not any(message["role"] == "assistant" for message in messages):
        raise row.wrong(column, "no message is the assistant's: there is no answer to train")
    return {"messages": messages}


def _prompt_completion(row: Cells) -> Row:
    if isinstance(row.values["prompt"], str):
        return {"prompt": row.text("prompt"), "completion": row.text("completion")}
    answer = row.messages("completion")
    if answer[0]["role"] != "assistant":
        raise row.wrong("completion", f"it begins with the role {answer[0]['role']!r}: begin with the assistant's")
    return {"prompt": row.messages("prompt"), "completion": answer}


def _alpaca(row: Cells) -> Row:
    system, more = row.maybe("system"), row.maybe("input")
    asked = row.text("instruction") + (f"\n\n{more}" if more else "")
    start = [turn("system", system)] if system else []
    return {"messages": [*start, turn("user", asked), turn("assistant", row.text("output"))]}


def _preference(row: Cells) -> Row:
    if isinstance(row.values["chosen"], str):
        if "prompt" not in row.values:
            raise row.wrong("chosen", "its prompt is missing: give the answers a column 'prompt'")
        found: Row = {name: row.text(name) for name in ("prompt", "chosen", "rejected")}
    else:
        chosen, rejected, given = row.messages("chosen"), row.messages("rejected"), row.values.get("prompt")
        shared = next((k for k, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(chosen), len(rejected)) if shared is None else shared
        # often both conversations are whole, and their common beginning is the prompt
        prompt = chosen[:shared] or (row.messages("prompt") if isinstance(given, list) else [])
        found = {
            "prompt": prompt or [turn("user", row.text("prompt") if "prompt" in row.values else "")],
            "chosen": chosen[shared:],
            "rejected": rejected[shared:],
        }
    if found["chosen"] == found["rejected"]:
        raise row.wrong("rejected", "it is the same as 'chosen': leave the row out")
    for name in ("chosen", "rejected"):
        if not found[name] or (isinstance(found[name], list) and found[name][0]["role"] != "assistant"):
            raise row.wrong(name, "behind the prompt there is no answer of the assistant: give one")
    return found


OPTIONAL = ("input", "system")
READERS: dict[tuple[str, ...], Callable[[Cells], Row]] = {
    ("messages",): _chat,
    ("chosen", "rejected"): _preference,
    ("conversations",): lambda row: _chat(row, "conversations", **OTHER_KEYS),
    ("prompt", "completion"): _prompt_completion,
    ("instruction", "output"): _alpaca,
}


FORMS_IN_WORDS = "without a label these columns are read: " + " or ".join(" + ".join(form) for form in READERS)


def asked_of(columns: Mapping[str, list[Any]], file: Path, *, column: str) -> list[Any]:
    """The prompt in each row of a file: text, or messages without the answers at their end.

    ``column`` is read where the file has the columns of none of these forms.
    """
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [_asked(Cells(file, at, row), column) for at, row in enumerate(rows)]


def _asked(row: Cells, column: str) -> Any:
    for name, keys in (("messages", {}), ("conversations", OTHER_KEYS)):
        if name in row.values:
            messages = row.messages(name, **keys)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise row.wrong(name, "every message is the assistant's: there is nothing to answer")
            return messages
    if "prompt" in row.values:
        return row.text("prompt") if isinstance(row.values["prompt"], str) else row.messages("prompt")
    if "instruction" in row.values:
        return _alpaca(Cells(row.source, row.at, {**row.values, "output": "-"}))["messages"][:-1]
    require(row.source, (column,), tuple(row.values))
    return row.text(column)


def key_of(row: Row) -> tuple[str, ...]:
    """A key that rows with the same question share, whatever its case and spacing."""
    return text_key(question(row))
