"""Write docs/cli.md: what ``--help`` says of every verb. ``python docs/cli.py``; a test compares the two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from loretta.cli.main import app

HEADER = """# The command line

What `--help` says, written by `python docs/cli.py` (`make tables`). Bad input is one line on standard error and exit
status 2; a study of which a run failed has status 1; an interrupted command has status 130.
"""


def page() -> str:
    """The page as Markdown."""
    return HEADER + "".join(
        f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in _helps(get_command(app), "loretta")
    )


def _helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    context = command.context_class(command, info_name=name, parent=parent, terminal_width=100)
    yield context.command_path, command.get_help(context)
    for verb, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _helps(below, verb, context)


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".md")
    target.write_text(page(), encoding="utf-8")
    print(f"wrote {target}")
