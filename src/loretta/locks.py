"""One owner per folder: a lock of the operating system, which a process that dies gives back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from loretta.errors import InputError
from loretta.folders import LOCK
from loretta.owned import LIST


@contextmanager
def hold(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Keep every other process of LoRETTA out of a folder, which is made where there is none.

    Raises InputError where another process is in it, or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output '{folder}' is a file: give a folder with --output")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, thread_local=False)
        lock.acquire(timeout=wait)
    except Timeout:
        raise InputError(f"another process works in '{folder}': wait until it ends, or give another folder") from None
    except OSError as error:
        raise InputError(f"cannot write to '{folder}' ({error.strerror}): give another folder") from None
    try:
        yield
    finally:
        if folder.is_dir() and not (folder / LIST).is_file():  # nothing of ours came into it
            (folder / LOCK).unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
        lock.release()


def refuse_held(folder: Path) -> None:
    """Raise InputError where another process writes to a folder that is to be read."""
    lock = folder / LOCK
    if lock.is_file():
        try:
            with FileLock(lock, thread_local=False).acquire(timeout=2):  # another reader holds it for a moment
                return
        except Timeout:
            raise InputError(f"another process writes to '{folder}': wait until it ends") from None
        except OSError:  # it cannot be written to, by anybody who is not somebody else
            return
