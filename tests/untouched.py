"""Programs in processes that have imported torch, or also transformers, and neither PEFT nor anything of ours.

They are forks of processes that conftest.py forks before it imports more: a new one takes up to nine seconds of a core.
"""

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

_programs: dict[str, Connection] = {}  # by what the process has imported


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class ending:
    """The rest of a fork: without the signal handlers of the process before it, and it ends with a status."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __exit__(self, kind, error, where) -> None:
        status = 0
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(error)
            status = 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def prepare() -> None:
    """Fork the processes from which programs are forked."""
    for name in ("_dynamo", "_inductor.compile_fx", "distributed.tensor"):  # which transformers and bitsandbytes import
        importlib.import_module(f"torch.{name}")
    _fork("torch")
    importlib.import_module("transformers.modeling_utils")
    with contextlib.suppress(ImportError):  # half of the time that PEFT takes
        importlib.import_module("bitsandbytes")
    _fork("transformers")


def _fork(imported: str) -> None:
    assert not {"loretta", "peft"} & sys.modules.keys()
    _programs[imported], theirs = Pipe()
    if os.fork():
        theirs.close()
        return
    with ending(), contextlib.suppress(EOFError):  # at the end of the tests
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for ours in _programs.values():
            ours.close()
        while True:
            theirs.send(_done(*theirs.recv()))


def run(program: str, *arguments: object, imported: str = "transformers") -> Done:
    """As ``python -c PROGRAM ARGUMENTS``, where "torch" alone or also "transformers" is ``imported``."""
    _programs[imported].send((program, [*map(str, arguments)]))
    assert _programs[imported].poll(600), "the program takes more than ten minutes"
    return Done(*_programs[imported].recv())


def _done(program: str, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            with ending():
                sys.stdout, sys.stderr, sys.argv = out, err, ["-c", *arguments]
                exec(program, {"__name__": "__main__"})
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return status, *texts
