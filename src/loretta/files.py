"""Files that are whole at any moment, whatever happens to the process that writes them."""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
