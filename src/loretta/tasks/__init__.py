"""Data and metrics for supervised runs: GLUE, the user's own files, and a built-in demo task."""

import os
from collections.abc import Mapping
from pathlib import Path

from loretta.errors import InputError
from loretta.tasks import glue, stdlib
from loretta.tasks.base import KINDS, Kind, Task
from loretta.tasks.files import load_table, load_text
from loretta.tasks.read import ENDINGS_IN_WORDS, TABLE_ENDINGS, TEXT_ENDINGS, column_names, ending
from loretta.wording import listed, nearest, quoted

__all__ = ["Kind", "Task", "load_task"]

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
    seed: int = 0,
) -> Task:
    """The task behind the name of a GLUE task, "stdlib", or the path of a file.

    ``text``, ``text_pair`` and ``label`` name columns of a table ("text" where ``text`` is not given);
    ``validation`` and ``test`` are further files of the same form; ``data_dir`` has GLUE's files.

    Raises:
        InputError: anything that cannot be found or read, and options that do not fit the data.
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
    }
    if kind is not None and kind not in KINDS:
        raise InputError(f"unknown kind {quoted(kind)}{nearest(kind, KINDS)}: give --kind {' or '.join(KINDS)}")
    if data in glue.GLUE:
        _refuse(options, set(options) - {"--data-dir"}, f"'{data}', a GLUE task with its own columns and splits")
        return glue.load(data, data_dir=None if data_dir is None else _path(data_dir))
    if data == STDLIB:
        _refuse(options, set(options), f"'{STDLIB}', which is built from the running Python")
        return stdlib.load()

    path = _path(data)
    if not _is_path(data, path):
        names = (*glue.GLUE, STDLIB)
        raise InputError(
            f"unknown data {quoted(data)}{nearest(data, names)}: give one of {listed(names)}, "
            f"or a file that ends in {ENDINGS_IN_WORDS}"
        )
    _refuse(options, {"--data-dir"}, f"the file '{data}'")
    validation_path = None if validation is None else _path(validation)
    test_path = None if test is None else _path(test)
    if ending(path) in TEXT_ENDINGS:
        others = [other for other in (validation_path, test_path) if other is not None]
        # a column to read may be that of a table for validation
        columnless = {"--text"} if all(ending(other) in TEXT_ENDINGS for other in others) else set()
        _refuse(options, {"--text-pair", "--label"} | columnless, f"'{data}', plain text without columns")
        if kind not in (None, "language_modeling"):
            raise InputError(f"--kind {kind} does not fit '{data}', plain text without labels: leave it out")
        return load_text(path, text=text, validation_path=validation_path, test_path=test_path, seed=seed)
    if kind == "language_modeling":
        _refuse(options, {"--text-pair", "--label"}, "--kind language_modeling, which reads one column of text")
        return load_text(path, text=text, validation_path=validation_path, test_path=test_path, seed=seed)

    columns = column_names(path) if text is None or label is None else ()
    if label is None:
        raise InputError(
            f"'{data}' needs labels: give --label COLUMN, one of {listed(columns)}, "
            f"or --kind language_modeling to train on its text alone"
        )
    # one column only: the separator may be wrong, which load_table tells
    if text is None and "text" not in columns and len(columns) > 1:
        raise InputError(f"'{data}' has no column 'text': give --text COLUMN, one of {listed(columns)}")
    return load_table(
        path,
        text=text or "text",
        text_pair=text_pair,
        label=label,
        kind=kind,
        validation_path=validation_path,
        test_path=test_path,
        seed=seed,
    )


def _path(given: Path | str) -> Path:
    if any(mark in os.fspath(given) for mark in "\0\r\n"):
        raise InputError(f"{quoted(os.fspath(given))} holds a line end or a zero byte: give the path of a file")
    # os.path's expanduser, unlike pathlib's, leaves the ~name of an unknown user alone
    return Path(os.path.expanduser(given))


def _is_path(data: str, path: Path) -> bool:
    separators = [mark for mark in (os.sep, os.altsep) if mark]
    known = ending(path) in (*TABLE_ENDINGS, *TEXT_ENDINGS)
    return bool(data) and (known or any(mark in data for mark in separators) or os.path.exists(path))


def _refuse(options: Mapping[str, object], names: set[str], what: str) -> None:
    given = [name for name in options if name in names and options[name] is not None]
    if given:
        do, them = ("does", "it") if len(given) == 1 else ("do", "them")
        raise InputError(f"{' and '.join(given)} {do} not fit {what}: leave {them} out")
