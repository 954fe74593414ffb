"""The official splits of a prompted task as rows, from the Hub or from a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.tasks.prompted.base import PromptedSpec, Row
from loretta.tasks.sources import load_official
from loretta.wording import quoted

# a train file that was cut out of the official validation split, without its ending
TRAIN_FROM_DEV = "train_from_dev"


@dataclass(frozen=True, slots=True)
class Split:
    rows: Sequence[Row]
    source: str  # for messages: the file, or the Hub's name
    remark: str = ""  # what is unusual about the source, with a blank in front


def read_splits(spec: PromptedSpec, data_dir: Path | None) -> tuple[Split, Split]:
    """Train and validation. Raises InputError: see :func:`loretta.tasks.prompted.load_prompted`."""
    train, remark = "train", ""
    sources = [f"{'/'.join(spec.hub)} {split}" for split in ("train", "validation")]
    if data_dir is not None:
        folder = data_dir / spec.name
        other = folder / f"{TRAIN_FROM_DEV}.jsonl.gz"
        if not (folder / "train.jsonl.gz").is_file() and other.is_file():
            train, remark = TRAIN_FROM_DEV, f" ('{other.name}', cut out of the official validation split)"
        sources = [str(folder / f"{split}.jsonl.gz") for split in (train, "validation")]
    columns = load_official(spec.name, spec.hub, (train, "validation"), (*spec.texts, *spec.gold), data_dir)
    return (
        _split(spec, "train", columns[0], sources[0], remark),
        _split(spec, "validation", columns[1], sources[1]),
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
