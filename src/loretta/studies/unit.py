"""A unit of a study in a process of its own: one run, or the runs that are trained together.

The process is ``python -m loretta.studies.unit ROOT``. The unit comes as one line on its standard input, which stays
open as long as its starter lives: where that dies, the process saves a checkpoint and ends. The folders of the runs say
how they ended.
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
    wait: float = 0.0  # seconds for another process to leave the folders
    fit: float | None = None  # the share of the device's memory that the runs have to fit into; None: they do


class UnitProcess:
    """The process as its starter sees it.

    Args:
        root: the folder of all runs.
        environment: variables that the process has beside those of this one.
        working: the folder that it works in, if not that of this one: paths of data and models may be relative.
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
                start_new_session=True,  # an interrupt at the terminal is for the runner, which then tells it
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died already, which its status tells
            self.process.stdin.write(unit.model_dump_json().encode() + b"\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def why_dead(self) -> str:
        """The reason that its status gives, with the last line that it wrote; nothing where it ended as it should."""
        from loretta.studies.execution import last_line

        status = self.process.wait()
        if status == 0:
            return ""
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}, as when the memory is used up"
        return f"its process ended with status {status}: {last_line(self.root, self.unit.runs[0])}"

    def end(self) -> None:
        """Ask the process to end behind its next checkpoint."""
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
    line = sys.stdin.readline()  # before the imports, which take seconds, and the starter waits for a full pipe
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
