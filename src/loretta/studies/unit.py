"""A unit of a study in a process of its own: one run, or the runs that are trained together.

The process is ``python -m loretta.studies.unit ROOT``. It reads the unit as one line from its standard input, which
the starter keeps open: when the starter dies, the process saves a checkpoint and ends. The folders of the runs say how
they ended.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from loretta.studies.study import Frozen, Planned

GRACE = 60.0  # seconds that a run has to save a checkpoint when it is told to end


class Unit(Frozen):
    """What one process carries out."""

    runs: tuple[Planned, ...]
    wait: float = 0.0  # seconds in which another process may still release the folders
    fit: float | None = None  # share of the device's memory for the runs; None: all of them fit


class UnitProcess:
    """The process as its starter sees it.

    Args:
        root: the folder of all runs.
        environment: variables of the process, on top of those of this one.
        working: its working folder, if not that of this process: paths of data and models may be relative.
    """

    def __init__(self, root: Path, unit: Unit, *, environment: Mapping[str, str], working: str | None = None) -> None:
        from loretta.studies.execution import forget_failure, open_log

        self.root, self.unit, self.began = root, unit, time.perf_counter()
        for run in unit.runs:
            forget_failure(root / run.folder)
        with open_log(root, unit.runs[0]) as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loretta.studies.unit", str(root)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=working,
                start_new_session=True,  # an interrupt at the terminal reaches the runner alone, which ends the process
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died already: its status says so
            self.process.stdin.write(unit.model_dump_json().encode() + b"\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def why_dead(self) -> str:
        """The reason by its exit status, with the last line that it wrote; "" where it ended as it should."""
        from loretta.studies.execution import last_line

        status = self.process.wait()
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
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def _end_with_the_runner() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def main() -> None:
    """The process itself."""
    line = sys.stdin.readline()  # before the imports, which take seconds: the starter waits while the pipe is full
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    from loretta.errors import Stopped
    from loretta.studies.execution import carry_out_together

    try:
        unit = Unit.model_validate_json(line)
        carry_out_together(Path(sys.argv[1]), unit.runs, wait=unit.wait, fit=unit.fit)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.exit_status)


if __name__ == "__main__":
    main()
