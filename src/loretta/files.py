"""Files that are whole at any moment, even if the writing process dies, and checks of files before they are read."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"  # ending of what a kill may leave beside the file
LARGEST = 1 << 26  # bytes of a file of JSON or YAML: the log of a run with 300,000 lines has fewer


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file in one step: after a crash the old one or the new one is there, never half of it.

    Text, which may come in parts, is written in UTF-8. A link goes on leading to the file, and the file keeps its
    permissions. Where it cannot be written, OSError is raised and ``path`` stays as it was.
    """
    path = Path(os.path.realpath(path))
    parts = [content] if isinstance(content, str | bytes) else content
    # exclusive and random: two processes may write the same file, on two machines even
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part.encode("utf-8") if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file, and others the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as a whole file of JSON."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_plain(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a plain file. Raises OSError for none, for pipes and devices, and for more than ``most`` bytes."""
    at_once = getattr(os, "O_NONBLOCK", 0)  # without waiting for somebody to write to a pipe
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
        return file.read(most)


def read_json(path: Path) -> Any:
    """What a plain file of JSON holds. Raises OSError as :func:`read_plain` does, and ValueError for anything else."""
    try:
        return json.loads(read_plain(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """The object of JSON in a file; None where there is none, or it holds anything else."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
