"""Tasks that a causal language model reads as prompts: choice by log-probability, and generation.

The prompts are those of MeZO (Malladi et al. 2023, arXiv:2305.17333, Appendix D), which the LoRETTA paper takes over.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from loretta.errors import InputError
from loretta.tasks.prompted.base import STOP, Example, PromptedSpec, PromptedTask, Sample
from loretta.tasks.prompted.choices import CHOICES
from loretta.tasks.prompted.generation import QUESTIONS
from loretta.tasks.prompted.sampling import draw, read_splits
from loretta.wording import listed, nearest, quoted

__all__ = ["PROMPTED", "STOP", "Example", "PromptedTask", "Sample", "load_prompted"]

PROMPTED: Mapping[str, PromptedSpec] = MappingProxyType({spec.name: spec for spec in (*CHOICES, *QUESTIONS)})


def load_prompted(
    name: str, *, data_dir: Path | str | None = None, sample: Sample | None = None, seed: int = 0
) -> PromptedTask:
    """One task in the low-data form of the LoRETTA paper.

    Train and validation examples are drawn with ``seed`` from the official train split and have no text in common;
    test examples are drawn from the official validation split, because the official test labels are not public. The
    same rows and seed give the same draw on every machine and in every order of the rows.

    With ``data_dir`` the rows come from ``<data_dir>/<name>/train.jsonl.gz`` and ``validation.jsonl.gz``, with the
    Hub's field names and label ids. What differs from the official sizes or from ``sample`` is noted in the task.

    Raises InputError: an unknown name, a missing or broken file, too few rows, or a Hub that cannot be reached.
    """
    if name not in PROMPTED:
        raise InputError(
            f"unknown prompted task {quoted(name)}{nearest(name, tuple(PROMPTED))}: give one of {listed(PROMPTED)}"
        )
    spec = PROMPTED[name]
    folder = None if data_dir is None else Path(os.path.expanduser(data_dir))
    train, validation = read_splits(spec, folder)
    official = {"train": (train, spec.train_rows), "validation": (validation, spec.validation_rows)}
    sizes = [
        f"the {name} split{split.remark} has {len(split.rows)} of the official {n_rows} rows"
        for name, (split, n_rows) in official.items()
        if len(split.rows) != n_rows
    ]
    lost = [spec.hub_note] if folder is None and spec.hub_note is not None else []
    drawn, notes = draw(spec, train, validation, sample=sample or Sample(), seed=seed)
    return PromptedTask(
        name=name,
        kind=spec.kind,
        train_as=spec.train_as,
        metrics=spec.metrics,
        label_names=spec.label_names,
        **drawn,
        notes=(*sizes, *lost, *notes),
        scorer=spec.score,
    )
