"""Processes that begin as a copy of this one: a new one takes eight seconds of a core to import torch and PEFT."""

import contextlib
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from untouched import ending

from loretta.studies import unit

# a fork has none of the threads that OpenMP knows of, and ends with SIGSEGV where it calls them
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class ForkedPopen(subprocess.Popen):
    """``python -m MODULE ARGUMENTS`` in a fork of this process. Pipes, signals and statuses are Popen's own."""

    def _execute_child(  # type: ignore[override]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more,
    ):  # fmt: skip
        python, flag, *command = args
        assert (python, flag) == (sys.executable, "-m")
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
            return
        with ending():
            os.setsid()
            for target, source in enumerate((p2cread, c2pwrite, errwrite)):
                if source != -1:
                    os.dup2(source, target)
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate("rww")
            )
            for number in map(int, os.listdir("/proc/self/fd")):  # as exec does, which closes its pipes to others
                with contextlib.suppress(OSError):
                    if not os.get_inheritable(number):
                        os.close(number)
            os.environ.update(env or {})
            os.chdir(cwd or ".")
            sys.argv = command
            warnings.resetwarnings()  # pytest makes errors of them
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def status_of(work: Callable[[], object]) -> int:
    """Do some work in a fork. Returns its exit status, -9 where SIGKILL ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with ending():
        work()
    raise AssertionError("a fork has ended")


def fork_units(monkeypatch) -> None:
    """Have the runner of studies fork this process for each unit."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "TimeoutExpired")}
    monkeypatch.setattr(unit, "subprocess", SimpleNamespace(Popen=ForkedPopen, **names))
