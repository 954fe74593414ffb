"""The list of what LoRETTA wrote into a folder: what may be replaced or removed, and whether it is whole.

Each run, export and checkpoint has such a list in a file of its own, with the size and the SHA-256 of every file. A
file that is on no list, or has changed since, is somebody else's.
"""

import fnmatch
import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from pydantic import BaseModel, Field, ValidationError, field_validator

from loretta.errors import InputError
from loretta.files import read_plain, write_whole
from loretta.folders import LIST, is_temporary, sync, temporary_folder, what_helps, why_not_written
from loretta.locks import hold_file

WAIT = 60.0  # seconds, for another process that puts something on the list of the same folder
# folders of a run that have lists of their own: checkpoints, and the run that will replace it
NEXT = ".next"
PARTS = ("checkpoints", "checkpoints/*", NEXT, f"{NEXT}/checkpoints", f"{NEXT}/checkpoints/*")
# these grow as long as a run goes on, and no list can hold them
LOGS = ("tensorboard", "events.out.tfevents.")
# single files beside the parts of a run; what is on the list of a run, a checkpoint, an adapter, a model, a demo
PAGES = ("report.html", "table.md")
WHOLE = {"run.json", "config.json", "adapter_config.json", "trainer_state.json", "demo.json"}
MAX_NAMES = 8  # of files that an error message lists


class Written(BaseModel, frozen=True, extra="forbid"):
    """One file as it was when it was written."""

    bytes: int = Field(ge=0)
    sha256: str


# by its path in the folder; while a file is replaced, the new and the old one are on the list
Listed: TypeAlias = dict[str, tuple[Written, ...]]


class FileList(BaseModel, frozen=True, extra="forbid"):
    """The files of one folder, by their paths in it."""

    note: str = "Written by loretta: --overwrite removes the files listed here, as long as they are unchanged."
    files: Listed = {}

    @field_validator("files")
    @classmethod
    def _stays_in_the_folder(cls, files: Listed) -> Listed:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"{name!r} leads out of the folder")
        return files


def read_list(folder: Path) -> Listed:
    """What was written into a folder; nothing where it has no list, or one that cannot be read."""
    try:
        return FileList.model_validate_json(read_plain(folder / LIST)).files
    except (OSError, ValidationError):
        return {}


def write_list(folder: Path, files: Mapping[str, tuple[Written, ...]]) -> None:
    """Note what is written into a folder, now or next."""
    write_whole(folder / LIST, FileList(files=dict(sorted(files.items()))).model_dump_json(indent=1) + "\n")


def describe(folder: Path) -> Listed:
    """Every file below a folder as it is now, but for its list and temporaries."""
    return {path.relative_to(folder).as_posix(): (_read(path),) for path in _files(folder) if path != folder / LIST}


def is_whole(folder: Path) -> bool:
    """Whether a folder has a list and every file on it is as it was written."""
    listed = read_list(folder)
    return bool(listed) and all(_is(folder / name, versions) for name, versions in listed.items())


def find_foreign(folder: Path, *, inside: Sequence[str] = ()) -> list[str]:
    """The files below a folder that LoRETTA did not write, or that have changed since; links count as such.

    Of a file: its name, or nothing. ``inside`` are folders in it that have lists of their own.
    """
    if folder.is_file():
        return [] if folder in _ours(folder.parent) else [folder.name]
    ours = _ours(folder, inside)
    return [path.relative_to(folder).as_posix() for path in _files(folder) if path not in ours]


def remove_listed(folder: Path) -> None:
    """Remove what LoRETTA wrote below a folder, and the folders that this leaves empty, but for ``folder`` itself."""
    ours = _ours(folder)
    _remove(folder, [path for path in _files(folder) if path in ours])


def forget(file: Path) -> None:
    """Remove a file, and take it off the list of its folder; a list of nothing goes too."""
    with hold_file(file.parent / LIST, wait=WAIT):
        left = {name: written for name, written in read_list(file.parent).items() if name != file.name}
        file.unlink(missing_ok=True)
        if left:
            write_list(file.parent, left)
        else:
            (file.parent / LIST).unlink(missing_ok=True)


def refuse_to_replace(
    folder: Path,
    *,
    option: str,
    keep: Iterable[str | Path | None] = (),
    inside: Sequence[str] = (),
    kind: str | None = None,
) -> None:
    """Raise InputError unless all that a folder holds, or a file, was written by LoRETTA and may go.

    Never the working directory, one of ``keep`` (the model and the data, where they are paths), or a parent of these;
    and nothing of another kind: a file on the list must fit the pattern ``kind``.
    """
    for given in (Path.cwd(), *keep):
        if given is not None and _is_or_holds(folder, Path(given)):
            what = "the working directory" if given == Path.cwd() else f"'{given}'"
            raise InputError(f"'{folder}' is or holds {what}, and is not replaced: give {option}")
    if foreign := find_foreign(folder, inside=inside):
        more = f" and {len(foreign) - MAX_NAMES} more" if len(foreign) > MAX_NAMES else ""
        raise InputError(
            f"'{folder}' holds files that loretta did not write, or that have changed since "
            f"({', '.join(foreign[:MAX_NAMES])}{more}): move them away, or give {option}"
        )
    if kind is not None and folder.is_dir() and not fnmatch.filter(names := read_list(folder), kind):
        raise InputError(
            f"'{folder}' holds what another command wrote ({', '.join(list(names)[:MAX_NAMES])}): give {option}"
        )


def refuse_to_replace_file(file: Path, *, overwrite: bool) -> None:
    """Raise InputError where a file stands that LoRETTA did not write as one of its own, such as a part of a run.

    With ``overwrite`` it may have changed since.
    """
    if not os.path.lexists(file):
        return
    listed, another = read_list(file.parent), "give another file with --output"
    is_part = file.name not in PAGES and not WHOLE.isdisjoint(listed)
    if file.name not in listed or is_part or not file.is_file():
        raise InputError(f"'{file}' was not written by this command, and is not replaced: {another}")
    if not overwrite and find_foreign(file):
        raise InputError(f"'{file}' is not as loretta wrote it: {another}, or replace it with --overwrite")


@contextmanager
def building(folder: Path, *, last: Sequence[str], option: str, keep: bool = False) -> Iterator[Path]:
    """An empty folder to write to, whose files are then :func:`publish`\\ed in ``folder``; until then nothing changes.

    The last file is the first of ``last`` that was written. Raises InputError where the folder cannot be written to,
    and asks for ``option``.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as new:
            yield new
            publish(new, folder, last=next(name for name in last if (new / name).is_file()), keep=keep)
    except BaseException as error:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        if (reason := why_not_written(error)) is not None:
            raise InputError(f"cannot write to '{folder}' ({reason}): {what_helps(error)}, or give {option}") from None
        raise


def publish(new: Path, folder: Path, *, last: str, keep: bool = False) -> None:
    """Move the files of ``new``, which is whole, into ``folder`` and onto its list.

    A reader takes ``last`` for the sign that the folder is whole: it goes first and comes last. A call that fails
    leaves ``folder`` as it was. One that is killed leaves every file on the list, and goes on when it is called again.
    The other files of the list are removed, unless ``keep``.

    Raises InputError where a file that is not LoRETTA's is in the way.
    """
    with hold_file(folder / LIST, wait=WAIT):
        _move(new, folder, last=last, keep=keep)


def _move(new: Path, folder: Path, *, last: str, keep: bool) -> None:
    old, ours = read_list(folder), _ours(folder)
    # what a killed call has moved already is on the list of ``new`` alone
    found = {**read_list(new), **describe(new)}
    coming = [name for name in sorted(found, key=lambda name: (name == last, name)) if (new / name).exists()]
    for name in coming:
        if os.path.lexists(folder / name) and folder / name not in ours:
            raise InputError(f"'{folder / name}' is not as loretta wrote it, and stays: move it away")
    sync(new)
    write_list(new, found)
    usual = stat.S_IMODE((new / LIST).stat().st_mode)
    for path in map(new.joinpath, coming):
        if not path.is_symlink():
            with suppress(OSError):  # not every disk has rights
                path.chmod(stat.S_IMODE(path.stat().st_mode) | usual)  # safetensors lets the owner alone read its files
    write_list(folder, {**old, **{name: (*found[name], *old.get(name, ())) for name in found}})
    gone = [] if keep else [name for name in old if name not in found and folder / name in ours]
    with temporary_folder(folder) as aside:
        moves = [(folder / name, aside / name) for name in (*reversed(coming), *gone) if (folder / name).exists()]
        moves += [(new / name, folder / name) for name in coming]
        done = []
        try:
            for source, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                done.append((source, target))
            write_list(folder, {**(old if keep else {}), **found})
        except BaseException:
            for source, target in reversed(done):
                os.replace(target, source)
            with suppress(OSError):  # on a full disk the longer list stays, and is right too
                write_list(folder, old)
            raise
    _remove(folder, [folder / name for name in gone])  # the folders that they leave empty
    _remove(new.parent, [new / LIST, *(new / name for name in found)])


def is_free(folder: Path, *, but: Collection[str] = ()) -> bool:
    """Whether a folder holds nothing ``but`` some files; a list and what a kill left half-written are nothing."""
    return not folder.is_dir() or all(path in (folder / LIST, *map(folder.joinpath, but)) for path in _files(folder))


def write_listed(path: Path, content: str | bytes | Iterable[str], *, overwrite: bool = False) -> None:
    """Write a file whole and put it on the list of its folder.

    Raises InputError where a file that is not LoRETTA's has that name, unless it is to be overwritten.
    """
    if overwrite and find_foreign(path):
        with hold_file(path.parent / LIST, wait=WAIT):
            write_list(path.parent, {**read_list(path.parent), path.name: (_read(path),)})
    with temporary_folder(path.parent) as new:
        write_whole(new / path.name, content)
        publish(new, path.parent, last=path.name, keep=True)


def _is_or_holds(folder: Path, path: Path) -> bool:
    """As the system sees them: two spellings may lead to one folder, without a link where case does not count."""
    try:
        path = path.resolve(strict=True)
        return any(folder.samefile(each) for each in (path, *path.parents))
    except (OSError, ValueError):  # one of them is none, as a Hub id
        return False


def _files(folder: Path) -> Iterator[Path]:
    """Files and links below a folder in order, but for temporaries; no link is followed."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in links and not is_temporary(name))
        for name in sorted([*names, *links]):
            if not is_temporary(name):
                yield Path(root, name)


def _ours(folder: Path, inside: Sequence[str] = ()) -> set[Path]:
    """The unchanged files below a folder that are on its list, or on that of a folder in it."""
    runs = [folder, *(folder / name for name in inside)]
    logs = {path for run in runs for path in (run / LOGS[0]).glob(f"{LOGS[1]}*") if not path.is_symlink()}
    parts = [path for run in runs for part in PARTS for path in run.glob(part)]
    lists = {at: read_list(at) for at in (*runs, *parts)}
    same = cache(_is)
    found = {
        *logs,
        *(at / LIST for at, files in lists.items() if files),
        *(at / name for at, files in lists.items() for name, versions in files.items() if same(at / name, versions)),
    }
    # what lies behind a link lies elsewhere
    linked = cache(Path.is_symlink)
    return {path for path in found if not any(map(linked, path.parents[: len(path.relative_to(folder).parts) - 1]))}


def _is(path: Path, versions: tuple[Written, ...]) -> bool:
    """Whether a path is a plain file that is as one of its versions on a list."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size not in {written.bytes for written in versions}:
            return False
        return _read(path) in versions
    except OSError:
        return False


def _read(path: Path) -> Written:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Written(bytes=file.tell(), sha256=digest)


def _remove(folder: Path, paths: Iterable[Path]) -> None:
    emptied = set()
    for path in paths:
        path.unlink(missing_ok=True)
        emptied |= {parent for parent in path.parents if folder in parent.parents}
    for parent in sorted(emptied, key=lambda parent: -len(parent.parts)):
        try:
            parent.rmdir()
        except OSError:  # it holds other files
            continue
