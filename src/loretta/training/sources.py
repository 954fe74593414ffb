"""Where a run's data come from: tasks with splits of their own, or the user's files, and whether these have changed."""

from collections.abc import Collection
from pathlib import Path

from loretta.files import read_object, write_json
from loretta.tasks import STDLIB
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED
from loretta.tasks.sources import digests, names_files
from loretta.training.config import RunConfig

NAMED = {*GLUE, *PROMPTED, STDLIB}  # tasks with splits of their own
FILES = "data.json"  # in the folder of a run: the SHA-256 of the user's files when it began, by option


def write_digests(folder: Path, config: RunConfig) -> None:
    """Note in the folder of a run what the files are that it reads."""
    write_json(folder / FILES, _digests(config))


def changed_files(folder: Path, config: RunConfig, options: Collection[str] = ("data", "validation", "test")) -> str:
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
    return data not in NAMED and names_files(data) and not set(trained).isdisjoint(digests(data))


def _digests(config: RunConfig) -> dict[str, list[str]]:
    given = {key: getattr(config, key) for key in ("data", "validation", "test")}
    files = {key: name for key, name in given.items() if name is not None and name not in NAMED and names_files(name)}
    return {key: digests(name) for key, name in files.items()}
