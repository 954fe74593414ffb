"""Where a run's data and model come from, and whether what lies there has moved or changed."""

import glob
from collections.abc import Collection, Mapping
from operator import eq
from pathlib import Path
from typing import Any

from loretta.files import write_json
from loretta.fingerprint import NOTES, fingerprint, is_same, read_notes
from loretta.owned import read_list
from loretta.tasks import STDLIB
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED
from loretta.tasks.sources import digests, names_files
from loretta.training.config import RunConfig

NAMED = {*GLUE, *PROMPTED, STDLIB}  # tasks with splits of their own
DATA = ("data", "validation", "test")
PLACES = (*DATA, "model", "data_dir", "start_from")  # options of a run that may be paths
NOTED = (*DATA, "model", "start_from")  # those of which a run notes what lies there


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options of ``now`` that were others ``before``, a few words each; a path that leads to the same is none."""
    return [
        f"{key} was {before[key]!r} and is {now[key]!r}"
        for key in sorted(now)
        if before[key] != now[key] and not (key in PLACES and has_moved(key, before[key], now[key]))
    ]


def has_moved(option: str, before: str | None, now: str | None) -> bool:
    """Whether a path leads to what another one led to: the same file, or one of its name where that is gone.

    What lies there is compared elsewhere (:func:`changed_places`).
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


def write_notes(folder: Path, config: RunConfig) -> None:
    """Note in the folder of a run what the files of data are that it reads, and the weights that it begins with."""
    write_json(folder / NOTES, _notes(config, NOTED))


def changed_places(folder: Path, config: RunConfig, options: Collection[str] = NOTED) -> str:
    """Where something else lies than when the run in ``folder`` began, of what ``options`` name, in words.

    "" where all is the same, and where the notes are lost.
    """
    before = read_notes(folder)
    now = _notes(config, [key for key in options if key in before])
    changed = [key for key in now if not (is_same if key == "model" else eq)(before[key], now[key])]
    return " and ".join(f"'{getattr(config, key)}'" for key in changed)


def is_data_of(folder: Path, data: str) -> bool:
    """Whether ``data`` names the very files from which the run in ``folder`` took its training rows."""
    return _is_path(data) and read_notes(folder).get("data", []) == digests(data)


def was_trained_on(folder: Path, data: str) -> bool:
    """Whether one of them is among the files that ``data`` names."""
    return _is_path(data) and not set(read_notes(folder).get("data", [])).isdisjoint(digests(data))


def _notes(config: RunConfig, options: Collection[str]) -> dict[str, Any]:
    given = {key: getattr(config, key) for key in options}
    notes: dict[str, Any] = {
        key: digests(name) for key, name in given.items() if key in DATA and name is not None and _is_path(name)
    }
    if "model" in given and (found := fingerprint(config.model)) is not None:
        notes["model"] = found
    if given.get("start_from") is not None:
        listed = read_list(Path(given["start_from"])).items()
        if weights := {n: [each.sha256 for each in versions] for n, versions in listed if n.endswith(".safetensors")}:
            notes["start_from"] = weights
    return notes
