"""Programs in processes that have imported torch and transformers, and neither PEFT nor anything of ours.

They are forks of a process that conftest.py forks before it imports more: a new one takes five seconds of a core.
"""

import contextlib
import os
import signal
import sys
import tempfile
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

_programs: Connection


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
    """Fork the process from which programs are forked."""
    global _programs
    import transformers.modeling_utils  # noqa: F401

    assert not {"loretta", "peft"} & sys.modules.keys()
    _programs, theirs = Pipe()
    if os.fork():
        theirs.close()
        return
    with ending(), contextlib.suppress(EOFError):  # at the end of the tests
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _programs.close()
        while True:
            theirs.send(_done(*theirs.recv()))


def run(program: str, *arguments: object) -> Done:
    """As ``python -c PROGRAM ARGUMENTS``."""
    _programs.send((program, [*map(str, arguments)]))
    assert _programs.poll(600), "the program takes more than ten minutes"
    return Done(*_programs.recv())


def _done(program: str, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            with ending():
                sys.stdout, sys.stderr, sys.argv = out, err, ["-c", *arguments]
                exec(program, {"__name__": "__main__"})
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return status, *texts
