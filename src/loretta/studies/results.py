"""Run folders -> the numbers of a study: means and intervals over seeds, and what is missing."""

import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from scipy import stats

from loretta.errors import InputError
from loretta.files import read_json
from loretta.record import RunRecord
from loretta.studies.state import COST, COUNT, State, evaluations, measured, state_of
from loretta.studies.study import Planned, Row, Study
from loretta.tasks.metrics import LOWER_IS_BETTER
from loretta.training.baseline import beats_baseline, chance_of
from loretta.wording import grouped

STUDY = "study.json"
CONFIDENCE = 0.95
AVERAGE = "average"


class Score(BaseModel, frozen=True):
    """One seed's number, and where it comes from."""

    seed: int
    value: float  # of the cell's metric, as the record has it (a fraction, not percent)
    values: dict[str, float] = {}  # every metric of the split
    folder: str = ""  # below the folder of all runs; "" in an average, as all that follows
    learning_rate: float | None = None
    seconds: float | None = None
    command: str = ""  # as it was typed
    repeat: str = ""  # the command that runs this one again
    baseline: float | None = None  # the score of an answer that needs no text (loretta.record.Answers)
    chance: float | None = None  # the probability that such an answer is as good (loretta.training.baseline)


class Missing(BaseModel, frozen=True):
    """A seed without a number."""

    seed: int
    folder: str
    state: State
    reason: str


class Cell(BaseModel, frozen=True):
    """One number of a table: a method on a task, over seeds.

    ``mean``, ``low`` and ``high`` are in the record's unit; times the study's ``scale`` they compare with ``printed``.
    The interval is Student's t at 95%, None for fewer than two seeds.
    """

    model: str
    task: str  # a task of the study, "average", or a quantity ("memcpy_us", "flops", "bytes")
    row: str
    label: str
    method: str
    order: tuple[str, ...] = ()  # of a sequence
    stage: int | None = None  # of a sequence: after how many tasks the score was taken
    metric: str
    split: str  # "validation" or "test"; "" for a quantity
    higher_is_better: bool
    asked: int
    scores: tuple[Score, ...]
    missing: tuple[Missing, ...]
    mean: float | None
    low: float | None
    high: float | None
    parameters: int | None  # trained
    adapter_bytes: int | None
    printed: float | None  # as the paper prints it, in percent where ours is a fraction
    printed_model: str | None  # the paper's model that the printed number belongs to
    printed_parameters: str | None
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> int:
        return len(self.scores)

    @property
    def seeds(self) -> str:
        """As "3 of 5 seeds" where some are missing, else "5 seeds"."""
        count = f"{self.finished} of {self.asked}" if self.finished < self.asked else str(self.asked)
        return f"{count} seed{'s' if self.asked != 1 else ''}"


class Results(BaseModel, frozen=True):
    """Everything that was run for one study."""

    study: Study
    options: dict[str, Any]  # of the command: models, tasks, seeds, limit, ...
    commands: tuple[str, ...]  # as they were typed
    planned: tuple[Planned, ...]
    cells: tuple[Cell, ...]

    def final(self) -> tuple[Cell, ...]:
        """The cells of the table: in a sequence those after its last task."""
        return tuple(cell for cell in self.cells if _is_final(cell))


def _is_final(cell: Cell) -> bool:
    # a sequence may have been narrowed to some of the study's tasks
    return cell.stage is None or cell.stage == len(cell.order)


def interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean of a sample, and the ends of Student's t interval for it at 95%.

    Without values all three are None; a single value has no ends. Where a value is not finite, as of a run that
    diverged, the mean is NaN and there are no ends.
    """
    if not values:
        return None, None, None
    if not all(map(math.isfinite, values)):
        return math.nan, None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def collect_all(root: Path) -> list[Results]:
    """The results of every study in a folder of runs. Raises InputError when it holds none."""
    files = sorted(root.glob("study*.json"))
    if not files:
        raise InputError(f"'{root}' holds no study: give the --output of `loretta reproduce` or `loretta compare`")
    return [_collect(root, file) for file in files]


def collect(root: Path, name: str | None = None) -> Results:
    """The results of the study ``name``, or of the only one in the folder.

    Raises InputError when the folder holds no study of that name, or several and no name is given.
    """
    found = collect_all(root)
    if name is not None:
        found = [results for results in found if results.study.name == name]
        if not found:
            raise InputError(f"'{root}' holds no study {name!r}: `loretta runs ls '{root}'` shows what there is")
    if len(found) > 1:
        names = ", ".join(results.study.name for results in found)
        raise InputError(f"'{root}' holds several studies ({names}): name one")
    return found[0]


def _collect(root: Path, file: Path) -> Results:
    try:
        content = read_json(file)
        study = Study.model_validate(content["study"])
        planned = tuple(Planned.model_validate(run) for run in content["planned"])
        options, commands = content.get("options", {}), tuple(content.get("commands", ()))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"'{file}' is damaged or of another version ({reason}): run the study again") from None
    groups = grouped((run for run in planned if not run.candidate), lambda run: run.cell)
    cells = [cell for runs in groups.values() for cell in _cells(root, study, runs)]
    return Results(
        study=study, options=options, commands=commands, planned=planned, cells=(*cells, *_averages(study, cells))
    )


def _cells(root: Path, study: Study, runs: list[Planned]) -> list[Cell]:
    """The cells of the seeds of one (model, task, method): several where a run gives several numbers."""
    first = runs[0]
    if first.kind == "cost":
        return [_measured(root, study, runs, COST, name) for name in ("memcpy_us", "flops")]
    if first.kind == "count":
        return [_measured(root, study, runs, COUNT, name) for name in ("parameters", "bytes")]
    if first.order:
        stage = len(first.task.split("-"))
        return [_trained(root, study, runs, task=task, stage=stage) for task in first.order]
    return [_trained(root, study, runs, task=first.task)]


def _numbers(
    root: Path, runs: Sequence[Planned], score_of: Callable[[Planned], Score | str]
) -> tuple[list[Score], list[Missing]]:
    """The scores of runs, and the runs without one. Of a finished run ``score_of`` may say in words why it has none."""
    scores, missing = list[Score](), list[Missing]()
    for run in runs:
        state, reason = state_of(root, run)
        try:
            found = score_of(run) if state == "finished" else reason
        except InputError as error:
            state, found = "failed", str(error)
        if isinstance(found, Score):
            scores.append(found)
        else:
            missing.append(Missing(seed=run.seed, folder=run.folder, state=state, reason=found))
    return scores, missing


def _trained(root: Path, study: Study, runs: list[Planned], *, task: str, stage: int | None = None) -> Cell:
    records: list[RunRecord] = []
    metric = study.metrics.get(task)

    def score_of(run: Planned) -> Score | str:
        nonlocal metric
        record = RunRecord.load(root / run.folder / "run.json")
        if stage is None:
            values, default = record.scores, record.metric
        else:
            values = evaluations(root / run.folder)[task]
            default = next(iter(values))
        metric = metric or default
        if metric not in values:
            return f"its record has no {metric}, only {', '.join(values)}"
        records.append(record)
        score = _score(root, run, values[metric], values, record)
        if not record.answers or stage is not None:
            return score
        chance = 1.0 if beats_baseline(record) is False else chance_of(record)
        return score.model_copy(update={"baseline": record.answers.baseline.get(metric), "chance": chance})

    scores, missing = _numbers(root, runs, score_of)
    last = records[-1] if records else None
    return _cell(
        study,
        runs[0],
        task=task,
        stage=stage,
        metric=metric or "",
        split="" if last is None else "validation" if stage is not None or last.test is None else "test",
        higher_is_better=metric not in ("loss", *LOWER_IS_BETTER),
        parameters=last.parameters.trainable if last else None,
        adapter_bytes=last.adapter_bytes if last else None,
        notes=tuple(dict.fromkeys(note for record in records for note in record.notes)),
        asked=len(runs),
        scores=scores,
        missing=missing,
    )


def _measured(root: Path, study: Study, runs: list[Planned], file: str, name: str) -> Cell:
    content: dict[str, Any] = {"notes": ()}

    def score_of(run: Planned) -> Score | str:
        nonlocal content
        content = measured(root / run.folder / file)
        if content[name] is None:
            return str(content["notes"][0])
        numbers = {key: value for key, value in content.items() if isinstance(value, int | float)}
        return _score(root, run, content[name], numbers, None)

    scores, missing = _numbers(root, runs, score_of)
    return _cell(
        study,
        runs[0],
        task=name,
        metric=name,
        split="",
        higher_is_better=False,
        parameters=content.get("parameters"),
        adapter_bytes=content.get("bytes"),
        notes=tuple(content["notes"]),
        asked=len(runs),
        scores=scores,
        missing=missing,
    )


def _score(root: Path, run: Planned, value: float, values: dict[str, float], record: RunRecord | None) -> Score:
    score = Score(seed=run.seed, value=value, values=values, folder=run.folder, learning_rate=run.learning_rate)
    if record is None:
        return score
    folder = root / run.folder
    again = ["loretta", "train", "--config", str(folder / "config.json"), "--output", f"{folder}-again"]
    of_record = {"seconds": record.train_seconds, "command": record.command, "repeat": shlex.join(again)}
    return score.model_copy(update={"learning_rate": run.learning_rate or record.learning_rate, **of_record})


def _cell(study: Study, run: Planned | Cell, *, task: str, scores: Sequence[Score], **known: Any) -> Cell:
    """The cell of some scores. ``run`` is one of its runs, or a cell of the same runs."""
    mean, low, high = interval([score.value for score in scores])
    row = find_row(study, run.row, run.model)
    return Cell(
        model=run.model,
        task=task,
        row=run.row,
        label=run.label,
        method=run.method,
        order=run.order,
        scores=tuple(scores),
        mean=mean,
        low=low,
        high=high,
        # another order is another experiment than the printed one
        printed=row.printed.get(task) if row and run.order in ((), study.tasks) else None,
        printed_model=row.model if row else None,
        printed_parameters=row.parameters if row else None,
        **known,
    )


def find_row(study: Study, name: str, model: str) -> Row | None:
    """The row of that name for a model, else the first row of that name; None for a user's own method."""
    rows = [row for row in study.rows if row.name == name]
    return next((row for row in rows if row.model == model), rows[0] if rows else None)


def _averages(study: Study, cells: Iterable[Cell]) -> list[Cell]:
    """The mean over all tasks of a study with several tasks, for each seed that has a score on all of them."""
    of_tasks = (cell for cell in cells if cell.task in study.tasks and _is_final(cell))
    groups = grouped(of_tasks, lambda cell: (cell.model, cell.row, cell.order))
    averages = []
    for group in groups.values():
        if len(study.tasks) < 2 or len(group) < len(study.tasks):
            continue
        by_seed = [{score.seed: score.value for score in cell.scores} for cell in group]
        common = sorted(set.intersection(*map(set, by_seed)))
        first = group[0]
        averages.append(
            _cell(
                study,
                first,
                task=AVERAGE,
                metric=AVERAGE,
                scores=[Score(seed=seed, value=statistics.fmean(each[seed] for each in by_seed)) for seed in common],
                missing=tuple(missing for cell in group for missing in cell.missing),
                asked=max(cell.asked for cell in group),
                **{name: getattr(first, name) for name in ("stage", "split", "higher_is_better")},
                **{name: getattr(first, name) for name in ("parameters", "adapter_bytes")},
            )
        )
    return averages
