"""Carry out all runs of a study, several at once, each from the state in which its folder is."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from loretta.errors import InputError
from loretta.files import read_object, write_json
from loretta.folders import set_aside
from loretta.pretrained import NotLoaded, from_pretrained
from loretta.studies import halving
from loretta.studies.configs import Options
from loretta.studies.execution import Outcome
from loretta.studies.expansion import Expansion, differences, expand
from loretta.studies.results import STUDY
from loretta.studies.state import state_of
from loretta.studies.study import Planned, Study
from loretta.studies.together import MOST_TOGETHER, units, words_before
from loretta.studies.unit import Unit
from loretta.studies.workers import Here, Processes, Workers, visible_gpus
from loretta.training.arguments import check_options
from loretta.training.data import NAMED_TASKS, check_named_task
from loretta.training.sources import differing
from loretta.training.stop import stopping_at_signals
from loretta.wording import one_line

STOPPED = "before the end of the study", "the same command"  # what a stopped study says: where, and how to go on
Watch = Callable[[str, Outcome | None, int, int], None]  # folder, how it ended, runs that ended, runs in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a study stands after the runner: every run that was asked for, by its state."""

    expansion: Expansion
    outcomes: tuple[Outcome, ...]

    def of(self, state: str) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.state == state)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.expansion.notes

    @property
    def complete(self) -> bool:
        return len(self.of("finished")) + len(self.of("stopped")) == len(self.outcomes)


def run_study(
    study: Study,
    options: Options,
    root: Path,
    *,
    jobs: int = 1,
    population: int | None = None,
    ray: str | None = None,
    ray_gpus: float | None = None,
    command: str = "",
    watch: Watch = lambda folder, outcome, ended, total: None,
    say: Callable[[str], None] = lambda words: None,
) -> Summary:
    """Run what is not finished yet, at most ``jobs`` at once, each in a process; 0 jobs: in this process.

    Processes take the visible GPUs in turn and share the CPU's threads. With ``ray`` ("auto" or an address) they run
    on a Ray cluster, each on ``ray_gpus`` of a GPU. Runs that differ in seeds and rates alone are trained together, at
    most ``population`` of them (None: on a GPU as many as its memory holds, on a CPU one), see
    :mod:`loretta.population`; each has its folder as if it were alone. A run that fails is noted as failed, and the
    others go on. A run that waits for others (a sweep, the step before in a sequence) starts when they end.
    ``watch`` is told of each run that starts or ends, ``say`` of what the user should know before the first one.

    Raises InputError before anything starts: for bad options, for weights that cannot be loaded, and for a folder that
    holds a run with other options. SIGTERM and SIGINT end the processes after their next checkpoint and raise Stopped;
    the next call goes on from there.
    """
    expansion = expand(study, options, root)
    refuse_other_options(root, expansion.runs)
    check_runs(expansion.runs)
    _refuse_missing_weights(root, study, expansion)
    if root.exists() and not root.is_dir():
        raise InputError(f"the output '{root}' is a file: give a folder with --output")
    root.mkdir(parents=True, exist_ok=True)
    tried: dict[str, Outcome] = {}
    size = (MOST_TOGETHER if visible_gpus() else 1) if population is None else population
    if (words := words_before(root, expansion.runs, size)) is not None:
        say(words)
    with stopping_at_signals(*STOPPED), closing(find_workers(root, jobs, ray, ray_gpus)) as workers:
        while True:
            expansion = expand(study, options, root)
            runs = {run.folder: run for run in expansion.runs}
            write_study(root, study, options, expansion.runs, command)
            _stop(root, expansion.runs)
            taken = {run.folder for unit in workers.busy for run in unit.runs} | tried.keys()
            ready = [run for run in runs.values() if run.folder not in taken and _ready(root, run, runs)]
            for group in units(ready, size, workers.size):
                if workers.full:
                    break
                ended = _ended(root, runs, tried)
                for run in group:
                    watch(run.folder, None, ended, len(runs))
                workers.start(Unit(runs=tuple(group)))
            if not workers.busy:
                break
            outcomes = workers.wait()
            for outcome in outcomes:
                if runs[outcome.folder].until is None or outcome.state != "finished":  # a paused run may go on
                    tried[outcome.folder] = outcome
            ended = _ended(root, runs, tried)
            for outcome in outcomes:
                watch(outcome.folder, outcome, ended, len(runs))
    return Summary(expansion=expansion, outcomes=tuple(_outcome(root, run, tried, runs) for run in runs.values()))


def check_runs(runs: Sequence[Planned]) -> None:
    """Raise InputError for options that a run would refuse, before its weights and its data are there."""
    # once for the seeds and rates of a method on a task
    alike = {(run.sizes, run.task, run.method, bool(run.after)): run for run in runs if run.config is not None}
    for run in alike.values():
        config = run.run_config()
        check_options(config)
        if run.kind == "train" and config.data in NAMED_TASKS:
            check_named_task(config.model_copy(update={"model": run.sizes}))


def find_workers(root: Path, jobs: int, ray: str | None = None, ray_gpus: float | None = None) -> Workers:
    """Workers for ``jobs`` units at once, or those of the Ray cluster at an address.

    Raises InputError where :func:`check_workers` does, and for a cluster that cannot be reached.
    """
    check_workers(jobs, ray, ray_gpus)
    if ray is not None:
        from loretta.studies.cluster import RayWorkers

        return RayWorkers(root, ray, gpus=ray_gpus)
    return Processes(root, jobs) if jobs else Here(root)


def check_workers(jobs: int, ray: str | None, ray_gpus: float | None) -> None:
    """Raise InputError for a number of jobs below 0 or beside a cluster, and for a cluster's GPUs without one."""
    if jobs < 0:
        raise InputError(f"--jobs {jobs} must be 0 or more: the number of runs at once")
    if ray is not None and jobs != 1:
        raise InputError(f"--jobs {jobs} is for this machine, and a cluster runs what it has room for: leave it out")
    if ray is None and ray_gpus is not None:
        raise InputError(f"--ray-gpus {ray_gpus:g} is for a cluster: give --ray auto, or leave it out")


def _ready(root: Path, run: Planned, runs: dict[str, Planned]) -> bool:
    return (
        run.config is not None
        # of a run that another process has, its lock will tell: the note of a holder may outlive the holder
        and state_of(root, run)[0] not in ("finished", "stopped")
        and all(state_of(root, runs[folder])[0] == "finished" for folder in run.after)
    )


def _ended(root: Path, runs: dict[str, Planned], tried: dict[str, Outcome]) -> int:
    ended = ("finished", "stopped")
    return sum(folder in tried or state_of(root, run)[0] in ended for folder, run in runs.items())


def _stop(root: Path, runs: Sequence[Planned]) -> None:
    """Note in the folders of stopped candidates why they were stopped, and remove their checkpoints."""
    from loretta.population.checkpoints import remove_files
    from loretta.training.checkpoints import remove_checkpoints
    from loretta.training.folder import CHECKPOINTS

    for run in runs:
        if run.stopped and (root / run.folder / CHECKPOINTS).is_dir():
            remove_files(root / run.folder)
            remove_checkpoints(root / run.folder / CHECKPOINTS)
        if run.stopped:
            halving.stop(root / run.folder, run.stopped)


def _outcome(root: Path, run: Planned, tried: dict[str, Outcome], runs: dict[str, Planned]) -> Outcome:
    """The state of a run, with the reason where it could not start."""
    if run.folder in tried and tried[run.folder].state != "running":
        return tried[run.folder]
    state, reason = state_of(root, run)
    if state == "stopped":
        return Outcome(folder=run.folder, state=state, reason=reason)
    needed = [folder for folder in run.after if state_of(root, runs[folder])[0] != "finished"]
    if state != "finished" and needed:
        reason = f"it needs '{needed[0]}', which is not finished"
    return Outcome(folder=run.folder, state=state, reason=reason)


def refuse_other_options(root: Path, runs: Sequence[Planned]) -> None:
    """Raises InputError for a folder that holds a run with other options than the planned one."""
    for run in runs:
        if changed := differences(root, run):
            raise InputError(
                f"'{root / run.folder}' holds a run with other options ({'; '.join(changed)}): give the same ones, "
                "another --output, or remove that folder"
            )


def _refuse_missing_weights(root: Path, study: Study, expansion: Expansion) -> None:
    """Ask for each model's configuration where its weights are: without it every run would fail a minute later."""
    if study.kind != "train":
        return
    unfinished = {run.model for run in expansion.runs if state_of(root, run)[0] != "finished"}
    for base in expansion.bases:
        if base.folder in unfinished:
            try:
                from_pretrained(AutoConfig, base.weights)
            except NotLoaded as error:
                reason = one_line(error, 160)
                raise InputError(
                    f"the model '{base.weights}' cannot be loaded ({reason}): give --model a Hub id that can be "
                    "reached or a model's folder, or --dry-run to see the plan"
                ) from None


def write_study(root: Path, study: Study, options: Options, runs: Sequence[Planned], command: str) -> None:
    """Note in the folder of runs what was asked for. Cells of earlier commands stay, unless this one plans them.

    A comparison is of one model, and of runs with the same options: other cells leave it, and their runs stay.
    """
    file = study_file(root, study.name)
    before = read_object(file) or {}
    if file.is_file() and not {"study", "planned"} <= before.keys():
        before = {}
        print(f"'{file}' is no study that can be read: set aside as '{set_aside(file).name}'", file=sys.stderr)
    cells = {(run.model, run.task, run.row, "-".join(run.order)) for run in runs}
    kept = [
        run
        for run in before.get("planned", [])
        if (run["model"], run["task"], run["row"], "-".join(run["order"])) not in cells
        and (study.view != "compare" or run["model"] in {cell[0] for cell in cells})
    ]
    now = {"study": study.model_dump(mode="json"), "options": options.model_dump(mode="json")}
    leave = study.view == "compare"
    mixed = [run for run in kept if leave or (run["model"], run["task"]) in {cell[:2] for cell in cells}]
    if mixed and (changed := _changed(before, now)):
        words = f"note: {', '.join(dict.fromkeys(run['row'] for run in mixed))} of earlier commands had other options"
        now_where = (
            "leave the comparison; their runs stay" if leave else "stay in its tables, unless --output is another"
        )
        print(f"{words} ({changed}) and {now_where}", file=sys.stderr)
        kept = [] if leave else kept
    content = {
        **now,
        "commands": list(dict.fromkeys([*before.get("commands", []), *([command] if command else [])])),
        "planned": [*kept, *(run.model_dump(mode="json") for run in runs)],
    }
    if content != before:
        write_json(file, content)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two commands give to all of their runs alike, and otherwise; a word for each."""

    def given(command: Mapping[str, Any]) -> dict[str, Any]:
        options = command.get("options", {})
        sets = {key: value for key, value in options.get("sets", {}).items() if "." not in key}
        whole = {key: options.get(key) for key in ("limit", "data_dir", "cpu")}
        return {**whole, **command["study"].get("protocol", {}), **sets}

    old, new = given(before), given(now)
    nothing = dict.fromkeys({*old, *new})
    return "; ".join(differing({**nothing, **old}, {**nothing, **new}))


def study_file(root: Path, name: str) -> Path:
    """The file of a study: study.json, or one with the study's name where another study has that."""
    study = (read_object(root / STUDY) or {}).get("study")
    taken = isinstance(study, dict) and study.get("name", name) != name
    return root / (f"study-{name}.json" if taken else STUDY)
