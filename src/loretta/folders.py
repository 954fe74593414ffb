"""Folders that are built under a temporary name, and what a kill leaves of them."""

import errno
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loretta.errors import Stopped
from loretta.files import TEMPORARY
from loretta.wording import nearest, one_line

LIST = ".loretta.json"  # of what we wrote into a folder
# a process locks this file in the folder it works in; unlocked, it means nothing. Names of locks of files end so too
LOCK = ".loretta.lock"


def no_folder(path: Path) -> str:
    """What to say of a path that is no folder, with the name beside it that was perhaps meant."""
    if path.exists():
        return f"'{path}' is a file and no folder"
    beside = [each.name for each in os.scandir(path.parent) if each.is_dir()] if path.parent.is_dir() else []
    return f"there is no folder '{path}'{nearest(path.name, beside)}"


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` to build something in; what is still in it at the end goes with it.

    Raises OSError when it cannot be made.
    """
    folder = parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    folder.mkdir()  # raises where something has that name, a link too
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_temporary(name: str) -> bool:
    """Whether a name is one that this module or :mod:`loretta.files` makes up, or ends as that of a lock."""
    return name.endswith(LOCK) or re.fullmatch(rf"\.[0-9a-f]{{16}}{re.escape(TEMPORARY)}", name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that is ours alone now."""
    for path in folder.iterdir():
        if not is_temporary(path.name) or path.name.endswith(LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Give what is damaged another name, which is returned: nothing is lost, and the name is free."""
    names = (path.with_name(f"broken-{path.name}{f'-{k}' if k else ''}") for k in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    return aside


def why_not_written(error: BaseException) -> str | None:
    """The reason of an error that means that a disk did not take what was written; None for any other error."""
    words = one_line(error)
    if isinstance(error, OSError):
        return error.strerror or words
    if isinstance(error, SafetensorError):
        return words
    if type(error) is Exception and "(os error " in words:  # tokenizers'
        return words
    # torch.save, which tells no more
    of_torch = ("PytorchStreamWriter", "inline_container", "iostream error")
    is_torchs = isinstance(error, RuntimeError) and any(name in words for name in of_torch)
    return "the disk did not take all of it" if is_torchs else None


def what_helps(error: BaseException) -> str:
    """What to do about an error of :func:`why_not_written`, of which safetensors and tokenizers tell the number."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable"
    return "put it back" if number in (errno.ENOENT, errno.ESTALE) else "make room"


@contextmanager
def stopping_if_not_written(what: str, mend: str) -> Iterator[None]:
    """Raise Stopped, which ends in ``mend``, in place of an error that means that a disk did not take ``what``."""
    try:
        yield
    except Exception as error:
        if (reason := why_not_written(error)) is None:
            raise
        words = f"cannot write {what} ({reason}): {what_helps(error)}, and {mend}"
        raise Stopped(words, exit_status=74) from None  # EX_IOERR of sysexits.h


def sync(folder: Path) -> None:
    """Have the disk keep all files of a folder, so that a rename that follows cannot outlive their content."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
