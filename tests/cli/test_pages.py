"""Commands in the pages are those that there are; tests/test_code_of_pages.py runs their Python."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from loretta.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for folder in ("", "docs", "examples") for path in (ROOT / folder).glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of each block in one of these languages."""
    return [
        (page.name, text)
        for page in PAGES
        for language, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        if language in languages
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words behind `loretta`) of each line that calls it, by its name or as a module."""
    found = []
    for page, text in blocks("bash", "sh", "shell"):
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words[:1] == ["loretta"] or "-m loretta" in " ".join(words):
                    found.append((page, words[words.index("loretta") + 1 :]))
    return found


COMMANDS = commands()


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}-{' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_the_command_line_takes_every_command_of_a_page(page, words):
    command = get_command(cli.app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, page
        command, words = command.commands[words[0]], words[1:]
    command.make_context(page, list(words))  # a usage error where a flag or an argument is not taken


def test_the_pages_have_commands_of_each_verb():
    assert {"train", "eval", "predict", "plan", "export", "compare", "runs"} <= {words[0] for _, words in COMMANDS}
