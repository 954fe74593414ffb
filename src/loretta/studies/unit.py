"""A process that carries out units of a study, one after the other: a unit is one run, or runs trained together.

The process is ``python -m loretta.studies.unit ROOT``. Its standard input is a socket, from which it reads a unit a
line, and on which it answers a line when the unit has ended and the process is fit for another one. The folders of the
runs say how they ended. When the other end of the socket closes, because the starter has died, the process saves a
checkpoint and ends.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from loretta.studies.study import Frozen, Planned

GRACE = 60.0  # seconds that a run has to save a checkpoint when it is told to end
DONE = b"\n"
SPOILED = 75  # EX_TEMPFAIL of sysexits.h: the unit is to begin again, in a new process and without CUDA graphs
MOST_LEFT = 2**28  # bytes on a GPU behind a unit: more is what it failed to release, and the process ends


class Unit(Frozen):
    """What a process carries out at a time."""

    runs: tuple[Planned, ...]
    wait: float = 0.0  # seconds in which another process may still release the folders
    graphs: bool = True  # whether the steps of populations are recorded as CUDA graphs where they can be


class UnitProcess:
    """The process as its starter sees it; :meth:`start` gives it the units that follow the first.

    ``environment`` comes on top of that of this process, ``working`` is a working folder in place of its own.
    """

    def __init__(self, root: Path, unit: Unit, *, environment: Mapping[str, str], working: str | None = None) -> None:
        self.root, self.environment, self.working = root, environment, working
        self._begin(unit)

    def _begin(self, unit: Unit) -> None:
        from loretta.studies.execution import open_log

        self.socket, its_end = socket.socketpair()
        with open_log(self.root, unit.runs[0]) as log, its_end:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loretta.studies.unit", str(self.root)],
                stdin=its_end.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.working,
                start_new_session=True,  # an interrupt at the terminal reaches the runner alone, which ends the process
            )
        self.start(unit)

    def start(self, unit: Unit) -> None:
        """Have it carry out a unit. The one before must have ended, and left it :attr:`fit`."""
        from loretta.studies.execution import forget_failure

        self.unit, self.began, self.fit = unit, time.perf_counter(), False
        for run in unit.runs:
            forget_failure(self.root / run.folder)
        with suppress(OSError):  # it has died already: its status says so
            self.socket.sendall(unit.model_dump_json().encode() + b"\n")

    @property
    def ended(self) -> bool:
        """Whether the unit has ended, or its process. One that spoiled a recording is followed by a new one."""
        if not self.fit and select.select([self.socket], [], [], 0)[0]:
            with suppress(OSError):
                self.fit = self.socket.recv(len(DONE)) == DONE
        if self.unit.graphs and self.process.poll() == SPOILED:
            self.socket.close()
            self._begin(self.unit.model_copy(update={"graphs": False}))
        return self.fit or not self.alive

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def why_dead(self) -> str:
        """The reason by its exit status, with the last line that it wrote; "" where it ended as it should."""
        from loretta.studies.execution import last_line

        status = 0 if self.fit else self.process.wait()
        if status == 0:
            return ""
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}, as when the memory is used up"
        return f"its process ended with status {status}: {last_line(self.root, self.unit.runs[0])}"

    def end(self) -> None:
        """Ask the process to end after its next checkpoint."""
        with suppress(ProcessLookupError):
            self.process.terminate()

    def close(self, grace: float = GRACE) -> None:
        """Wait until it has ended; kill it after ``grace`` seconds, or at an interrupt."""
        try:
            self.process.wait(grace)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()
            self.process.wait()
        self.socket.close()


def _read_units(units: "SimpleQueue[bytes]") -> None:
    # a fork, such as a worker that loads data, closes sys.stdin, and would wait for ever for a thread that reads it
    rest = b""
    with suppress(ConnectionError):  # of a starter that died before it read the last answer
        while found := os.read(sys.stdin.fileno(), 2**16):
            *lines, rest = (rest + found).split(b"\n")
            for line in lines:
                units.put(line)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def main() -> None:
    """The process itself."""
    units: SimpleQueue[bytes] = SimpleQueue()
    # it reads before the imports, which take seconds: the starter waits while the socket is full
    threading.Thread(target=_read_units, args=(units,), daemon=True).start()
    line = units.get()
    from loretta.errors import NotRecorded, Stopped
    from loretta.memory import free_memory
    from loretta.studies.execution import carry_out_together, open_log

    root = Path(sys.argv[1])
    while True:
        unit = Unit.model_validate_json(line)
        with open_log(root, unit.runs[0]) as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        try:
            outcomes = carry_out_together(root, unit.runs, wait=unit.wait, graphs=unit.graphs)
        except NotRecorded as error:
            print(f"this process ends, and a new one goes on without CUDA graphs: {error}", flush=True)
            os._exit(SPOILED)  # what CUDA tears down of a spoiled recording could end the process by another status
        except Stopped as stopped:
            print(stopped, flush=True)
            sys.exit(stopped.exit_status)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # what made a run fail may still be in the process, and so may what a reporter opened: wandb has one run in it
        reports = any((run.config or {}).get("report_to") for run in unit.runs)
        if reports or any(outcome.state == "failed" for outcome in outcomes):
            return
        if (left := free_memory()) > MOST_LEFT:
            print(f"this process ends, because {left:,} bytes on the GPU were not released")
            return
        os.write(sys.stdin.fileno(), DONE)
        line = units.get()


if __name__ == "__main__":
    main()
