"""Files that are whole at any moment, whatever happens to the process that writes them."""

import contextlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loretta.errors import InputError

TEMPORARY = ".tmp"  # ending of what a kill may leave beside the file


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step: after a crash the old one or the new one is there, never half of it.

    Text is written in UTF-8. A link goes on leading to the file, and the file keeps its permissions.

    Raises OSError when the folder does not exist or cannot be written to; ``path`` is then as it was.
    """
    path = Path(os.path.realpath(path))
    data = content.encode("utf-8") if isinstance(content, str) else content
    # exclusive and random: two processes may write the same file, on two machines even
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as a whole file of JSON."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A path for a new file or folder, which takes the place of ``out`` at the end of the block, whole or not at all.

    A link goes on leading to what was replaced. Raises InputError when ``out`` cannot be written or replaced.
    """
    if out.is_symlink():
        out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise InputError(f"cannot write to '{out.parent}' ({error.strerror}): give another place") from None
    with temporary as place:
        new, old = Path(place, "new"), Path(place, "old")
        yield new
        if out.exists():
            try:
                out.rename(old)
            except OSError as error:  # the folder that one stands in, or where a disk is mounted
                raise InputError(
                    f"cannot replace '{out}' ({error.strerror}): give a new folder, such as one in it"
                ) from None
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
