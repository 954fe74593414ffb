"""Data and metrics for supervised runs: GLUE, the user's own files, and a built-in demo task."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.tasks import glue, stdlib
from loretta.tasks.base import KINDS, Kind, Known, Task
from loretta.tasks.files import load_table, load_text
from loretta.tasks.read import ENDINGS_IN_WORDS, TEXT_ENDINGS, other_separator
from loretta.tasks.sources import (
    HubSplit,
    Source,
    column_names,
    ending,
    find_files,
    is_hub_id,
    is_saved,
    load_hub,
    load_saved,
    names_files,
    read_columns,
)
from loretta.tasks.tokens import load_tokens, tags_of
from loretta.tasks.turns import FORMS_IN_WORDS, load_turns, turns_of
from loretta.wording import listed, nearest, quoted

__all__ = ["Kind", "Known", "Task", "load_task"]

STDLIB = "stdlib"


def load_task(
    data: Path | str,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: Kind | None = None,
    data_dir: Path | str | None = None,
    validation: Path | str | None = None,
    test: Path | str | None = None,
    separator: str | None = None,
    split: str | None = None,
    seed: int = 0,
    known: Known | None = None,
) -> Task:
    """Load a task: ``data`` is the name of a GLUE task, "stdlib", files, or a dataset on the Hub.

    Files are given as a path, several paths with commas between them, a pattern (``data/*.csv``) or a folder; a dataset
    of the Hub as "org/name" or "org/name:config", a saved one as its folder. See :mod:`loretta.tasks.sources` for
    these, ``separator`` and ``split``.

    ``text``, ``text_pair`` and ``label`` name columns of a table ("text" and "label" by default); ``validation`` and
    ``test`` are further files of the same form; ``data_dir`` holds GLUE's files. ``known`` are the labels of a model
    that was trained on a task of this ``kind``; without them the labels are those of ``data``.

    Raises InputError for data that cannot be found or read, and for options that do not fit the data.
    """
    data = os.fspath(data)
    options = {
        "--text": text,
        "--text-pair": text_pair,
        "--label": label,
        "--kind": kind,
        "--data-dir": data_dir,
        "--validation": validation,
        "--test": test,
        "--separator": separator,
        "--split": split,
    }
    if kind is not None and kind not in KINDS:
        raise InputError(f"unknown kind {quoted(kind)}{nearest(kind, KINDS)}: give --kind {' or '.join(KINDS)}")
    if data in glue.GLUE:
        _refuse(options, set(options) - {"--data-dir"}, f"'{data}', a GLUE task with its own columns and splits")
        return glue.load(data, data_dir=None if data_dir is None else Path(os.path.expanduser(data_dir)))
    if data == STDLIB:
        _refuse(options, set(options), f"'{STDLIB}', which is built from the running Python")
        return stdlib.load()
    splits = _splits(data, options)
    path = splits["train"]
    more: dict[str, Any] = {"validation_path": splits.get("validation"), "test_path": splits.get("test"), "seed": seed}
    if ending(path) in TEXT_ENDINGS:
        _refuse_columns(data, splits.values(), options)
        return load_text(path, text=text, **more)
    if kind == "language_modeling":
        _refuse(options, {"--text-pair", "--label"}, "--kind language_modeling, which reads one column of text")
        return load_text(path, text=text, **more)

    columns = column_names(path) if text is None or label is None else ()
    if kind in ("chat", "completion", "preference") or (
        label is None and text is None and kind is None and turns_of(columns)
    ):
        _refuse(options, {"--text", "--text-pair", "--label"}, f"'{data}', which is read by its columns")
        return load_turns(path, kind=kind, **more)
    if kind == "token_classification" or (kind is None and label is None and text is None and tags_of(columns)):
        _refuse(options, {"--text-pair"}, f"'{data}', which has tokens and tags")
        return load_tokens(path, tokens=text, tags=label, known=known, **more)
    # where the separator may be wrong load_table says so
    label = label or ("label" if other_separator(path, columns) else _own_label(data, columns))
    if text is None and "text" not in columns and len(columns) > 1:
        raise InputError(f"'{data}' has no column 'text': give --text COLUMN, one of {listed(columns)}")
    unlabelled = _has_no_labels(more["test_path"], label)
    if unlabelled:
        more["test_path"] = None
    task = load_table(path, text=text or "text", text_pair=text_pair, label=label, kind=kind, known=known, **more)
    return replace(task, notes=(*task.notes, *[f"the test split of '{data}' has no labels: left out"] * unlabelled))


def _splits(data: str, options: Mapping[str, Any]) -> dict[str, Source]:
    """What holds the rows of each split. Raises InputError where ``data`` names nothing that can be read."""
    beside = {"validation": options["--validation"], "test": options["--test"]}
    if is_hub_id(data) or is_saved(data):
        _refuse(options, {"--data-dir", "--separator"}, f"'{data}', a dataset with splits of its own")
        own = (load_saved if is_saved(data) else load_hub)(data, options["--split"])
        return {**own, **{role: _find(file, None) for role, file in beside.items() if file is not None}}
    if not names_files(data):
        names = (*glue.GLUE, STDLIB)
        raise InputError(
            f"unknown data {quoted(data)}{nearest(data, names)}: give one of {listed(names)}, a dataset on the Hub "
            f"(org/name), or a file that ends in {ENDINGS_IN_WORDS}"
        )
    _refuse(options, {"--data-dir", "--split"}, f"the file '{data}'")
    files = {role: os.fspath(name) for role, name in {"train": data, **beside}.items() if name is not None}
    found = {name: _find(name, options["--separator"]) for name in dict.fromkeys(files.values())}
    return {role: found[name] for role, name in files.items()}


def _refuse_columns(data: str, splits: Collection[Source], options: Mapping[str, Any]) -> None:
    """Refuse options of a table for plain text, but that of a column of another file, which may be a table."""
    columnless = {"--text"} if all(ending(each) in TEXT_ENDINGS for each in splits) else set()
    _refuse(options, {"--text-pair", "--label"} | columnless, f"'{data}', plain text without columns")
    if (kind := options["--kind"]) not in (None, "language_modeling"):
        raise InputError(f"--kind {kind} does not fit '{data}', plain text without labels: leave it out")


def _own_label(data: str, columns: Sequence[str]) -> str:
    """The column of labels where none is given."""
    if "label" not in columns:
        raise InputError(
            f"'{data}' needs labels: give --label COLUMN, one of {listed(columns)}, "
            f"or --kind language_modeling to train on its text alone; {FORMS_IN_WORDS}"
        )
    return "label"


def _has_no_labels(test: Source | None, label: str) -> bool:
    """Whether a dataset keeps the labels of its test split to itself, as the Hub's often do."""
    if not isinstance(test, HubSplit) or label not in test.data.column_names:
        return False
    return all(cell is None for cell in read_columns(test, (label,))[label])


def _find(given: Path | str, separator: str | None) -> Source:
    given = os.fspath(given)
    if any(mark in given for mark in "\0\r\n"):
        raise InputError(f"{quoted(given)} holds a line end or a zero byte: give the path of a file")
    return find_files(given, separator)


def _refuse(options: Mapping[str, object], names: set[str], what: str) -> None:
    given = [name for name in options if name in names and options[name] is not None]
    if given:
        do, them = ("does", "it") if len(given) == 1 else ("do", "them")
        raise InputError(f"{' and '.join(given)} {do} not fit {what}: leave {them} out")
