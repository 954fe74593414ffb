"""The progress of a study on standard error: a bar on a terminal, a line now and then elsewhere."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loretta import wording

if TYPE_CHECKING:
    from loretta.studies.execution import Outcome

# a line of progress in a run's log, as loretta.training.lines and loretta.population.loop print it
STEP = re.compile(r"^.*\bstep [\d,]+(?: of |/)[\d,]+.*$", re.MULTILINE)
ON_A_TERMINAL, ELSEWHERE = 1.0, 15.0  # seconds between two looks at the logs
TAIL = 4096  # bytes of a log that are read


@contextmanager
def following(root: Path, *, jobs: int) -> Iterator[Any]:
    """Gives the ``watch`` for the runner. While the block runs, it also shows how far the logs of the runs are."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = wording.console(stderr=True, soft_wrap=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("starting", total=None)
    running: dict[str, None] = {}
    counts = {"ended": 0, "total": 0}
    spent: list[float] = []
    lock = threading.Lock()

    def left() -> str:
        if not spent or counts["ended"] == counts["total"]:
            return ""
        seconds = sum(spent) / len(spent) * (counts["total"] - counts["ended"]) / max(1, jobs)
        return f", about {wording.duration(seconds)} for all that is left"

    def watch(folder: str, outcome: "Outcome | None", ended: int, total: int) -> None:
        with lock:
            counts.update(ended=ended, total=total)
            bar.update(task, completed=ended, total=total, description=folder)
            if outcome is None:
                running[folder] = None
                return
            running.pop(folder, None)
            if outcome.state == "finished" and outcome.seconds:
                spent.append(outcome.seconds)
            words = f"[{ended}/{total}] {folder}: {outcome.state}"
            words += f", {outcome.seconds:.0f} s{left()}" if outcome.state == "finished" else f": {outcome.reason}"
            bar.console.print(words, markup=False)

    def look() -> None:
        with lock:
            said = {folder: words for folder in running if (words := last_step(root, folder))}
            if console.is_terminal:
                for folder, words in list(said.items())[:1]:
                    bar.update(task, description=f"{folder}: {words}")
                return
            for folder, words in said.items():
                console.print(f"[{counts['ended']}/{counts['total']}] {folder}: {words}", markup=False)

    with bar, _now_and_then(look, ON_A_TERMINAL if console.is_terminal else ELSEWHERE):
        yield watch


def last_step(root: Path, folder: str) -> str | None:
    """The last line of progress in a run's log; None where there is none."""
    path = root / f"{folder}.log"
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - TAIL))
            found = STEP.findall(log.read().decode("utf-8", errors="replace"))
    except OSError:
        return None
    return found[-1].strip() if found else None


@contextmanager
def _now_and_then(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call ``look`` from a thread until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            look()

    thread = threading.Thread(target=repeat, name="following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
