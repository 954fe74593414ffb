"""Where a run's data come from: tasks with splits of their own, or the user's files, and whether these have changed."""

import glob
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loretta.files import read_object, write_json
from loretta.tasks import STDLIB
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED
from loretta.tasks.sources import digests, names_files
from loretta.training.config import RunConfig

NAMED = {*GLUE, *PROMPTED, STDLIB}  # tasks with splits of their own
FILES = "data.json"  # in the folder of a run: the SHA-256 of the user's files when it began, by option
DATA = ("data", "validation", "test")
PLACES = (*DATA, "model", "data_dir", "start_from")  # options of a run that may be paths


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options of ``now`` that were others ``before``, a few words each; a path that leads to the same is none."""
    return [
        f"{key} was {before[key]!r} and is {now[key]!r}"
        for key in sorted(now)
        if before[key] != now[key] and not (key in PLACES and has_moved(key, before[key], now[key]))
    ]


def has_moved(option: str, before: str | None, now: str | None) -> bool:
    """Whether a path leads to what another one led to: the same file, or one of its name where that is gone.

    What a file of data holds is compared elsewhere (:func:`changed_files`).
    """
    if before is None or now is None or (option in DATA and not _is_path(before)):
        return False
    then, here = Path(before).expanduser(), Path(now).expanduser()
    is_alike = then.name == here.name
    if is_alike and glob.has_magic(here.name):
        then, here = then.parent, here.parent
    if not here.exists():
        return False
    return here.samefile(then) if then.exists() else is_alike


def _is_path(given: str) -> bool:
    return given not in NAMED and names_files(given)


def write_digests(folder: Path, config: RunConfig) -> None:
    """Note in the folder of a run what the files are that it reads."""
    write_json(folder / FILES, _digests(config))


def changed_files(folder: Path, config: RunConfig, options: Collection[str] = DATA) -> str:
    """Which of the files that ``options`` name are others than when the run in ``folder`` began, in words.

    "" where they are the same, and for a run of a version that took no note of them.
    """
    before = read_object(folder / FILES) or {}
    now = _digests(config) if before else {}
    changed = [key for key in options if key in before and key in now and before[key] != now[key]]
    return " and ".join(f"'{getattr(config, key)}'" for key in changed)


def was_trained_on(folder: Path, data: str) -> bool:
    """Whether ``data`` names a file from which the run in ``folder`` took its training rows, under whatever name."""
    trained = (read_object(folder / FILES) or {}).get("data", [])
    return _is_path(data) and not set(trained).isdisjoint(digests(data))


def _digests(config: RunConfig) -> dict[str, list[str]]:
    given = {key: getattr(config, key) for key in DATA}
    files = {key: name for key, name in given.items() if name is not None and _is_path(name)}
    return {key: digests(name) for key, name in files.items()}
