"""The low-data protocol: the official splits as rows, and a seeded draw of train, validation and test examples."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loretta.errors import InputError
from loretta.tasks.prompted.base import Example, PromptedSpec, Row, Sample
from loretta.tasks.sources import load_official
from loretta.tasks.split import text_key
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
    return (_split(spec, "train", columns[0], sources[0], remark), _split(spec, "validation", columns[1], sources[1]))


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


class Place(NamedTuple):
    """The place of a row in the draw. Places are sorted, so that rows with equal texts are neighbours."""

    texts: str  # hash of the seed and the row's texts, whatever their case and spacing
    row: str  # hash of the whole row, so that the order of rows does not matter among equal texts
    number: int


def draw(
    spec: PromptedSpec, train: Split, validation: Split, *, sample: Sample, seed: int
) -> tuple[dict[str, tuple[Example, ...]], list[str]]:
    """Train and validation from the train split, without a text in common; test from the validation split.

    Texts are the same whatever their case and spacing. Rows are taken in the order of a hash of the seed and their
    texts, validation first. So whether a row is drawn does not depend on the order of the rows, on the wording of the
    prompts or on a random generator's version, and a larger draw contains the smaller one. Where the train split has
    fewer rows than are asked for, at most half of them validate. Rows without a usable gold answer are passed over.

    Raises InputError: a row that is not as the Hub's, or fewer usable rows than 2 in train and 1 in validation.
    """
    pool, test_pool = _usable(spec, train, seed, at_least=2), _usable(spec, validation, seed, at_least=1)
    n_validation = validation_rows(spec, len(pool), sample)
    held = {place.texts for place in pool[:n_validation]}
    kept = [place for place in pool if place.texts not in held]
    drawn = {
        "train": _examples(spec, train, kept[: sample.train]),
        "validation": _examples(spec, train, pool[:n_validation]),
        "test": _examples(spec, validation, test_pool[: sample.test]),
    }
    if not drawn["train"]:
        raise InputError(f"'{train.source}' has too few different texts to split: add rows with different texts")
    notes = [
        f"{lost} of the {len(split.rows)} rows of the {name} split have no usable gold answer and were passed over"
        for name, split, n_usable in (("train", train, len(pool)), ("validation", validation, len(test_pool)))
        if (lost := len(split.rows) - n_usable)
    ]
    for name, examples in drawn.items():
        if len(examples) < (asked := getattr(sample, name)):
            spared = name == "validation" and len(examples) == spec.max_validation
            few = f"as the split has {len(test_pool if name == 'test' else pool)}"
            notes.append(
                f"{len(examples)} {name} examples instead of {asked}, {'to leave more for training' if spared else few}"
            )
    return drawn, notes


def validation_rows(spec: PromptedSpec, n_rows: int, sample: Sample) -> int:
    """How many of the train split's usable rows validate."""
    wanted = min(sample.validation, spec.max_validation or sample.validation)
    return wanted if wanted + sample.train <= n_rows else min(wanted, n_rows // 2)


def _usable(spec: PromptedSpec, split: Split, seed: int, *, at_least: int) -> list[Place]:
    pool: list[Place] = []
    for number, row in enumerate(split.rows):
        try:
            usable = spec.example(row) is not None
        except ValueError as error:
            raise bad_row(split.source, number + 1, str(error)) from None
        if usable:
            texts = tuple(row[field] for field in spec.texts)
            rest = _hash(*texts, *(row[field] for field in spec.gold))
            pool.append(Place(_hash(spec.name, seed, *text_key(texts)), rest, number))
    if len(pool) < at_least:
        raise InputError(
            f"'{split.source}' has {len(pool)} usable rows for {quoted(spec.name)}, which needs at least {at_least}: "
            f"add rows with a gold answer"
        )
    return sorted(pool)


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _examples(spec: PromptedSpec, split: Split, pool: Sequence[Place]) -> tuple[Example, ...]:
    # built anew for the rows drawn: a split of ReCoRD has a million options, too many to keep
    examples = (spec.example(split.rows[place.number]) for place in pool)
    return tuple(example for example in examples if example is not None)
