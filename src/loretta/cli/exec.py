"""``loretta exec``: another program, in whose processes PEFT knows the methods."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

from loretta.errors import InputError

# what follows the program is the program's
AS_GIVEN = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def execute(
    program: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROGRAM [ARGUMENTS]...", help="A console script, and what to call it with.", show_default=False
        ),
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in `python -m`.")] = False,
) -> None:
    """Run another program with the methods registered, as in `loretta exec lm_eval --model hf ...`.

    It takes the place of this process: its output, signals and exit status are its own. The Python processes that it
    starts know the methods too, so it may be `accelerate launch`, `torchrun` or `trl sft`.
    """
    if not program:
        raise InputError(
            "loretta exec needs a program: name a console script, as in `loretta exec lm_eval`, or a module after -m"
        )
    command = [sys.executable, "-m", *program] if module else [_found(program[0]), *program[1:]]
    # every Python process runs the sitecustomize.py there when it starts
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent / "children"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    if os.name == "nt":  # there a process cannot be replaced, and the shell would not wait
        sys.exit(subprocess.call(command, env=environment))
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def _found(program: str) -> str:
    """The path of a program: of this Python's installation first. Raises InputError where there is none."""
    beside = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    found = shutil.which(program, path=os.pathsep.join([*beside, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise InputError(
            f"there is no program '{program}' in {beside[0]} or on the PATH: install it, or name a module after -m"
        )
    return found
