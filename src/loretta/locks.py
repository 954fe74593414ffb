"""One owner per folder and per file: locks of the operating system, which a process that dies gives back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from loretta.errors import InputError
from loretta.folders import LIST, LOCK

READERS = 1.0  # seconds: a reader holds a lock for the moment in which it asks whether somebody else does


class Held(InputError):
    """A folder or a file in which another process works."""


@contextmanager
def hold(folder: Path, *, wait: float = READERS) -> Iterator[None]:
    """Keep every other process of LoRETTA out of a folder, which is made where there is none.

    Who holds it may hold it again. Raises Held where another process is in it, and InputError where it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output '{folder}' is a file: give a folder with --output")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / LOCK)
        lock.acquire(timeout=wait)
    except Timeout:
        raise Held(f"another process works in '{folder}': wait until it ends, or give another folder") from None
    except OSError as error:
        raise InputError(f"cannot write to '{folder}' ({error.strerror}): give another folder") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1 and folder.is_dir() and not (folder / LIST).is_file():  # nothing of ours came into it
            (folder / LOCK).unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        lock.release()


@contextmanager
def hold_file(file: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Keep every other process of LoRETTA from writing a file. Who holds it may hold it again.

    Raises Held where another process writes it, and OSError where its folder cannot be written to.
    """
    lock = _lock(file.with_name(f".{file.name}{LOCK}"))
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise Held(f"another process writes '{file}': wait until it ends, or give another file") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def refuse_held(folder: Path) -> None:
    """Raise InputError where another process writes to a folder that is to be read."""
    if is_held(folder, wait=READERS):
        raise InputError(f"another process writes to '{folder}': wait until it ends")


def is_held(folder: Path, *, wait: float = 0.0) -> bool:
    """Whether another process of LoRETTA works in a folder, also after so many seconds."""
    lock = folder / LOCK
    if not lock.is_file():
        return False
    try:
        with _lock(lock).acquire(timeout=wait):
            return False
    except Timeout:
        return True
    except OSError:  # it cannot be written to, by anybody who is not somebody else
        return False


def _lock(path: Path) -> FileLock:
    # one object for a path, which counts how often a thread holds it, and which another thread does not share
    return FileLock(Path(os.path.realpath(path.parent), path.name), is_singleton=True)
