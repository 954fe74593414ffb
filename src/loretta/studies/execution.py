"""Carry out planned runs in their folders, under a lock and from the last checkpoint. A failure is noted there."""

import os
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from loretta import locks
from loretta.errors import NotRecorded, OutOfMemory, Stopped
from loretta.files import write_json
from loretta.memory import free_memory
from loretta.studies import halving
from loretta.studies.state import EVALUATIONS, HOLDER, LOG, State, beside, evaluations, folder_state, held_by, is_done
from loretta.studies.study import Planned
from loretta.training.config import RunConfig
from loretta.training.folder import by_signal, forget_failure, reason_of, record_failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: "finished", "failed", or "running" where another process has it."""

    folder: str
    state: State
    reason: str = ""
    seconds: float = 0.0


@contextmanager
def hold(folder: Path, wait: float = 0.0) -> Iterator[bool]:
    """Lock a run until the block ends. Gives whether this process got the lock within ``wait`` seconds.

    A file beside the run's folder says who holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.hold(folder, wait=max(wait, locks.READERS)))
        except locks.Held:
            yield False
            return
        holder = beside(folder, HOLDER)
        stack.callback(holder.unlink, missing_ok=True)
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield True


def carry_out(root: Path, run: Planned, wait: float = 0.0, graphs: bool | None = None) -> Outcome:
    """Finish a run from the state in which its folder is. An error of the run itself is noted there, not raised.

    But for NotRecorded where ``graphs`` is True, which is as for :func:`loretta.population.training.train_together`.
    """
    folder, start = root / run.folder, time.perf_counter()
    with hold(folder, wait) as mine:
        if not mine:
            holder = held_by(folder)
            where = f"in process {holder.pid} on {holder.host}" if holder else "in another process"
            return Outcome(folder=run.folder, state="running", reason=where)
        if is_done(root, run):
            return Outcome(folder=run.folder, state="finished")
        try:
            _DO[run.kind](folder, run, graphs)
        except (Exception, Stopped) as error:
            if _ends_the_process(error, graphs):
                raise
            reason = reason_of(error)
            record_failure(folder, reason, traceback.format_exc())
            return Outcome(folder=run.folder, state="failed", reason=reason, seconds=time.perf_counter() - start)
        forget_failure(folder)
    return Outcome(folder=run.folder, state="finished", seconds=time.perf_counter() - start)


def _ends_the_process(error: BaseException, graphs: bool | None) -> bool:
    """Whether it is no error of a run: a signal ends all of them, and a spoiled recording may have spoiled CUDA."""
    return by_signal(error) or (bool(graphs) and isinstance(error, NotRecorded))


def carry_out_together(
    root: Path, runs: Sequence[Planned], wait: float = 0.0, graphs: bool | None = None
) -> list[Outcome]:
    """Train several runs at once, as one population, and finish each of them.

    Runs that cannot be trained together, or fail together, are carried out one by one; runs that do not fit into
    memory in halves. ``wait`` are seconds in which another process may still release a run, ``graphs`` as for
    :func:`carry_out`.
    """
    if len(runs) == 1:
        return [carry_out(root, runs[0], wait, graphs)]
    from loretta.population.training import train_together
    from loretta.training.pause import Paused

    start, too_large, trained = time.perf_counter(), False, set()
    with ExitStack() as stack:
        mine = [run for run in runs if stack.enter_context(hold(root / run.folder, wait))]
        # what is left to train: a trained run may lack its evaluations
        mine = [run for run in mine if folder_state(root / run.folder)[0] != "finished" and not is_done(root, run)]
        try:
            if len(mine) > 1:
                configs = [run.run_config() for run in mine]
                ended = train_together(configs, resume=True, until=mine[0].until, graphs=graphs)
                trained = {run.folder for run in mine}
                for run, end in zip(mine, ended, strict=True):
                    if isinstance(end, Paused):
                        halving.note(root / run.folder, run.until or 1.0, end)
        except OutOfMemory as error:
            print(error, flush=True)
            too_large = True
        except (Exception, Stopped) as error:
            if _ends_the_process(error, graphs):
                raise
            print(f"{len(mine)} runs cannot be trained together, and go on one by one: {error}", flush=True)
    if too_large:
        # outside of the except block, whose exception keeps the tensors of the failed step alive
        free_memory()
        half = len(runs) // 2
        print(f"{half} of {len(runs)} runs at once", flush=True)
        halves = runs[:half], runs[half:]
        return [outcome for some in halves for outcome in carry_out_together(root, some, wait, graphs)]
    share = (time.perf_counter() - start) / max(1, len(trained))
    outcomes = [carry_out(root, run, graphs=graphs) for run in runs]
    return [replace(outcome, seconds=share) if outcome.folder in trained else outcome for outcome in outcomes]


def open_log(root: Path, run: Planned) -> TextIO:
    """The file beside a run's folder into which the run and its libraries print."""
    path = beside(root / run.folder, LOG)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


def last_line(root: Path, run: Planned) -> str:
    """The last words in the log of a run."""
    path = beside(root / run.folder, LOG)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"'{path}' says nothing")


def _train(folder: Path, run: Planned, graphs: bool | None) -> None:
    from loretta.population.checkpoints import has_checkpoint
    from loretta.population.training import train_together
    from loretta.training.checkpoints import remove_checkpoints
    from loretta.training.folder import CHECKPOINTS, RECORD
    from loretta.training.pause import Paused
    from loretta.training.run import train, train_until

    config = run.run_config()
    if folder_state(folder)[0] != "finished":
        if (folder / RECORD).is_file():
            os.replace(folder / RECORD, folder / f"broken-{RECORD}")
        forget_failure(folder)
        if has_checkpoint(folder):  # it began as a member of a population
            (ended,) = train_together([config], resume=True, until=run.until, graphs=graphs)
        else:
            ended = train(config, resume=True) if run.until is None else train_until(config, run.until)
        if isinstance(ended, Paused):
            halving.note(folder, run.until or 1.0, ended)
            return
        # the adapter is saved, and checkpoints of hundreds of runs fill a disk
        remove_checkpoints(folder / CHECKPOINTS)
    missing = [task for task in run.evaluate if task not in evaluations(folder)]
    if missing:
        _evaluate(folder, config, missing)


def _evaluate(folder: Path, config: RunConfig, tasks: list[str]) -> None:
    from loretta.training.data import load_config_task
    from loretta.training.predict import evaluate, load_run

    loaded = load_run(folder, cpu=config.cpu)
    scores = evaluations(folder)
    for name in tasks:
        task = load_config_task(config.model_copy(update={"data": name}))
        # one head serves all tasks of a sequence: what counts are the class ids, not their names
        scores[name] = evaluate(loaded, replace(task, label_names=tuple(loaded.record.label_names)), "validation")
    write_json(folder / EVALUATIONS, scores)


def _measure(folder: Path, run: Planned, graphs: bool | None) -> None:
    from loretta.studies import cost, sizes

    (cost.measure if run.kind == "cost" else sizes.count)(run.run_config(), folder, run.sizes)


_DO = {"train": _train, "cost": _measure, "count": _measure}
