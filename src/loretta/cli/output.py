"""What the verbs print: tables, progress, and with ``--json`` one document."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from loretta import wording
from loretta.errors import InputError
from loretta.folders import no_folder
from loretta.wording import as_json

if TYPE_CHECKING:
    from rich.console import Console

# the real standard output while --json sends what is printed to standard error
_answers: TextIO | None = None


def answer_json(ctx: typer.Context, as_json: bool) -> bool:
    """Callback of ``--json``: from now on, what libraries print goes to standard error."""
    if as_json and not ctx.resilient_parsing:
        ctx.with_resource(_answers_alone())
    return as_json


@contextmanager
def _answers_alone() -> Iterator[None]:
    global _answers
    _answers = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _answers = None


def print_json(content: Any) -> None:
    """Print the one document. NaN and infinity, for which JSON has no word, become null."""
    answer(as_json(content))


def answer(text: str) -> None:
    """Print on standard output, also while ``--json`` redirects what is printed."""
    print(text, end="", file=_answers)


def quiet_libraries() -> None:
    """Filter warnings of libraries that are not for a user, in this process."""
    # deprecations within the libraries concern their authors, and PEFT warns of layers that it then handles
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="Unsupported layer type", module="peft")
    # the place in the code says nothing to a user
    warnings.formatwarning = lambda message, *place, **more: f"note: {message}\n"


def scores(values: Mapping[str, float]) -> str:
    """As "accuracy 0.9123, f1 0.9001"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def console() -> "Console":
    """Standard output for tables, which in a file or a pipe are not cut to 80 columns."""
    terminal = wording.console(highlight=False)
    return terminal if terminal.is_terminal else wording.console(highlight=False, width=200)


def say(text: object, *, err: bool = False) -> None:
    """Print lines. Control characters are spelled out, so that names and words of others cannot steer a terminal."""
    typer.echo(wording.spelled(text), err=err)


@contextmanager
def writing_output(given: Path) -> Iterator[None]:
    """Raise InputError in place of the error that says why ``--output`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--output '{given}' cannot be written ({error.strerror or error}): give another") from None


def existing(folder: Path) -> Path:
    """The folder itself. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{no_folder(folder)}: give the --output of a study, or a run in it")
    return folder
