"""The official splits of a prompted task as rows, from the Hub or from a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.tasks.prompted.base import PromptedSpec, Row
from loretta.tasks.read import read_columns
from loretta.wording import quoted

# the name of a train file that was cut out of the official validation split
TRAIN_FROM_DEV = "train_from_dev.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Split:
    rows: Sequence[Row]
    source: str  # for messages: the file, or the Hub's name
    remark: str = ""  # what is unusual about the source, with a blank in front


def read_splits(spec: PromptedSpec, data_dir: Path | None) -> tuple[Split, Split]:
    """Train and validation. Raises InputError: see :func:`loretta.tasks.prompted.load_prompted`."""
    return _from_hub(spec) if data_dir is None else _from_folder(spec, data_dir)


def _from_hub(spec: PromptedSpec) -> tuple[Split, Split]:
    import datasets

    fields = [*spec.texts, *spec.gold]
    try:
        parts = datasets.load_dataset(*spec.hub, split=["train", "validation"])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the task {quoted(spec.name)} cannot be had from the Hub ({reason}): connect to a network, "
            f"or give --data-dir FOLDER with {spec.name}/train.jsonl.gz in it"
        ) from error
    train, validation = (
        _split(spec, name, part.select_columns(fields)[:], f"{'/'.join(spec.hub)} {name}")
        for name, part in zip(("train", "validation"), parts, strict=True)
    )
    return train, validation


def _from_folder(spec: PromptedSpec, data_dir: Path) -> tuple[Split, Split]:
    folder = data_dir / spec.name
    train, validation, other = (folder / f for f in ("train.jsonl.gz", "validation.jsonl.gz", TRAIN_FROM_DEV))
    remark = ""
    if not train.is_file() and other.is_file():
        train, remark = other, f" ('{other.name}', cut out of the official validation split)"
    missing = next((path for path in (train, validation) if not path.is_file()), None)
    if missing is not None:
        raise InputError(
            f"there is no file '{missing}' for the task {quoted(spec.name)}: "
            f"give a --data-dir with {spec.name}/train.jsonl.gz and {spec.name}/validation.jsonl.gz in it"
        )
    fields = (*spec.texts, *spec.gold)
    return (
        _split(spec, "train", read_columns(train, fields), str(train), remark),
        _split(spec, "validation", read_columns(validation, fields), str(validation)),
    )


def _split(spec: PromptedSpec, name: str, columns: Mapping[str, list[Any]], source: str, remark: str = "") -> Split:
    for field in spec.texts:
        for number, cell in enumerate(columns[field], start=1):
            if not isinstance(cell, str):
                raise bad_row(source, number, f"a text as {field!r}, not {quoted(cell)}")
    fields = tuple(columns)
    rows = [{"split": name, **dict(zip(fields, cells, strict=True))} for cells in zip(*columns.values(), strict=True)]
    return Split(rows, source, remark)


def bad_row(source: str, number: int, wanted: str) -> InputError:
    return InputError(
        f"'{source}' should have {wanted} in row {number}: write the file with the Hub's fields and label ids"
    )
