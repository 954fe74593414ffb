"""The folder of a run: the names in it, and who may write to it."""

import json
from pathlib import Path

from loretta.errors import InputError
from loretta.files import TEMPORARY
from loretta.record import RunRecord
from loretta.training.config import RunConfig

ADAPTER, CHECKPOINTS, TENSORBOARD = "adapter", "checkpoints", "tensorboard"
CONFIG, RECORD, PREDICTIONS = "config.json", "run.json", "predictions.jsonl"


def claim(folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> RunRecord | None:
    """Refuse to touch a folder that holds something else; the record if the run to resume is finished."""
    if folder.is_file():
        raise InputError(f"the output '{folder}' is a file: give a folder with --output")
    # a temporary file is what a kill left of the first one to be written
    if not folder.is_dir() or all(path.suffix == TEMPORARY for path in folder.iterdir()):
        return None
    if not (folder / CONFIG).is_file():
        raise InputError(f"the output folder '{folder}' holds other files: give an empty or new one with --output")
    if overwrite:
        return None
    if not resume:
        raise InputError(f"'{folder}' already holds a run: go on with --resume, replace it with --overwrite")
    try:
        # through the model: a run of an earlier version lacks the options that came later
        before = RunConfig(**json.loads((folder / CONFIG).read_bytes())).model_dump()
    except (ValueError, TypeError):
        raise InputError(f"'{folder / CONFIG}' is damaged: start again with --overwrite") from None
    now = config.model_dump()
    changed = sorted(key for key in now if key != "output" and before[key] != now[key])
    if changed:
        words = "; ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise InputError(f"cannot resume '{folder}' with other options ({words}): give the same ones, or --overwrite")
    return RunRecord.load(folder / RECORD) if (folder / RECORD).is_file() else None
