"""A study and the user's options -> every run, each with its whole configuration and its folder."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.files import read_json
from loretta.plan import FAMILIES, default_task_type, find_config
from loretta.record import RunRecord
from loretta.studies import halving
from loretta.studies.configs import (
    Base,
    Options,
    config_of,
    full_name,
    rate_suffix,
    refuse_idle,
    refuse_wrong_sets,
    total_steps,
    tried_by,
    tries_suffix,
)
from loretta.studies.state import folder_state
from loretta.studies.study import Frozen, Planned, Row, Study
from loretta.training.config import RunConfig, read_config
from loretta.training.methods import find_method
from loretta.training.sources import changed_places, differing
from loretta.wording import nearest


class Expansion(Frozen):
    """All runs of a study on its models, and a sentence on each change that fits runs to short data."""

    runs: tuple[Planned, ...]
    notes: tuple[str, ...]
    bases: tuple[Base, ...]


def expand(study: Study, options: Options, root: Path) -> Expansion:
    """Every run of the study as narrowed by ``options``, below ``root``.

    In a sweep the first seed runs a candidate for each learning rate. Once all candidates are finished in ``root``,
    the best on validation counts as the run of that seed, and the other seeds take its rate. Until then those have no
    config.

    Raises InputError for unknown models, tasks, methods and options.
    """
    if options.data_dir is not None and not Path(options.data_dir).expanduser().is_dir():
        raise InputError(f"--data-dir '{options.data_dir}' is no folder: give the one with a folder for each task")
    if options.seeds is not None and options.seeds > 1000:  # all runs are planned before the first one begins
        raise InputError(f"--seeds {options.seeds}: give 1000 at most")
    bases = _bases(study, options)
    rows = {base.folder: _rows(study, options, base) for base in bases}
    every = [row for found in rows.values() for row in found]
    refuse_wrong_sets(study, options, every)
    refuse_idle(study, options, every)
    notes: dict[str, None] = {}
    runs = [
        run
        for base in bases
        for row in rows[base.folder]
        for run in _RowOnModel(study, options, root, base, row, notes).runs()
    ]
    if not runs:
        raise InputError(f"nothing of {study.name} is left to run: give fewer of --tasks, --methods and --model")
    return Expansion(runs=tuple(runs), notes=tuple(notes), bases=bases)


def _bases(study: Study, options: Options) -> tuple[Base, ...]:
    bases: dict[str, Base] = {}
    hubs = {model.hub: key for key, model in study.models.items()}
    for given in options.models or study.models:
        key = given if given in study.models else hubs.get(given)
        if key is not None:
            paper = study.models[key]
            known = key if key in FAMILIES else paper.hub
            base = Base(folder=key, weights=paper.hub, key=key, sizes=known, paper=paper)
        else:
            try:
                find_config(given)
            except InputError as error:
                raise InputError(f"--model '{given}': {error}") from None
            # a folder such as "." gets the name of the folder it leads to
            name = Path(given).resolve().name if Path(given).is_dir() else Path(given).name
            base = Base(folder=name, weights=given, key=None, sizes=given, paper=None)
        other = bases.setdefault(base.folder, base)
        if other.weights != base.weights:
            raise InputError(
                f"--model '{other.weights}' and --model '{base.weights}' would share the folder '{base.folder}': "
                "run them one by one, each with an --output of its own"
            )
    return tuple(bases.values())


def _rows(study: Study, options: Options, base: Base) -> list[Row]:
    """The study's rows for a model, narrowed to the methods that were asked for.

    A model of the user's takes the rows of the study's models of its kind (encoder or decoder), or of all models where
    there are none of its kind. Of two rows with one name it takes the first.
    """
    models = {base.key}
    if base.key is None:
        kinds = {key: default_task_type(find_config(key)) for key in study.models}
        kind = default_task_type(find_config(base.sizes))
        models = {key for key in kinds if kinds[key] == kind} or set(kinds)
    rows: dict[str, Row] = {}
    for row in study.rows:
        if row.model is None or row.model in models:
            rows.setdefault(row.name, row)
    if not options.methods:
        return list(rows.values())
    chosen: dict[str, Row] = {}
    for word in options.methods:
        named = full_name(word)
        exact = [rows[named]] if named in rows else []
        for row in exact or [row for row in rows.values() if row.method == named] or [_other(named, study)]:
            chosen[row.name] = row
    return list(chosen.values())


def _other(method: str, study: Study) -> Row:
    """A row for a method that the study does not have."""
    try:
        find_method(method)
    except InputError as error:
        rows = ", ".join(dict.fromkeys(row.name for row in study.rows))
        raise InputError(f"--methods {method}: {error}; the rows of {study.name} are {rows}") from None
    return Row(name=method.replace(":", "-"), label=method, method=method)


def _tasks(study: Study, options: Options, base: Base) -> tuple[str, ...]:
    for task in options.tasks:
        if task not in study.tasks:
            guess = nearest(task, study.tasks)
            raise InputError(f"--tasks {task!r}{guess} is not in {study.name}: it has {', '.join(study.tasks)}")
    own = base.paper.tasks if base.paper and base.paper.tasks else study.tasks
    return tuple(task for task in dict.fromkeys(options.tasks or study.tasks) if task in own)


@dataclass(frozen=True, slots=True)
class _RowOnModel:
    """A row of a study on one model: plans the runs of all its tasks and seeds."""

    study: Study
    options: Options
    root: Path
    base: Base
    row: Row
    notes: dict[str, None]  # filled with what was changed to fit the runs to their data

    @property
    def seeds(self) -> range:
        return range(self.options.seeds or self.study.seeds)

    def runs(self) -> Iterator[Planned]:
        tasks = _tasks(self.study, self.options, self.base)
        if self.study.kind != "train":
            for task in tasks:
                yield self.plan(task, 0, {})
        elif self.study.sequence:
            for order in itertools.permutations(tasks) if self.options.orders else [tasks]:
                yield from self._sequence(order)
        else:
            candidates = self.candidates()
            for task in tasks:
                yield from self._swept(task, candidates)

    def candidates(self) -> list[dict[str, Any]]:
        """The settings that a sweep tries; a single empty one when there is nothing to choose."""
        options, tries = self.options, tried_by(self.options, self.row)
        grid = self.study.grids.get(full_name(self.row.method))
        rates = options.rates or (grid.learning_rate if grid and (options.sweep or options.batches) else ())
        axes: dict[str, Sequence[Any]] = {}
        if rates and "learning_rate" not in options.sets:
            axes["learning_rate"] = tuple(dict.fromkeys(rates))
        if options.batches and grid and grid.batch_size and "batch_size" not in options.sets:
            axes["batch_size"] = grid.batch_size
        axes |= tries
        found: list[dict[str, Any]] = []
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            of_method = {key.partition(".")[2]: chosen.pop(key) for key in axes if "." in key}
            found.append(chosen | ({"method_args": of_method} if of_method else {}))
        return found

    def _swept(self, task: str, candidates: Sequence[dict[str, Any]], order: tuple[str, ...] = ()) -> Iterator[Planned]:
        """The candidates with the first seed, then the chosen one with the other seeds."""
        if len(candidates) == 1:
            for seed in self.seeds:
                yield self.plan(task, seed, candidates[0], order)
            return
        first, *others = self.seeds
        tried = [self.plan(task, first, settings, order) for settings in candidates]
        if self.options.search == "halving":
            tried, best = self._halved(task, tried)
        else:
            best = choose(self.root, tried, metric=self.study.metrics.get(task))
        for k, run in enumerate(tried):
            yield run if k == best else run.model_copy(update={"candidate": True})
        for seed in others if best is not None else self.seeds:
            yield self.plan(task, seed, None if best is None else candidates[best], order)

    def _halved(self, task: str, tried: Sequence[Planned]) -> tuple[list[Planned], int | None]:
        """The candidates, each with how far successive halving trains it, and the index of the winner."""
        metric, count = self.study.metrics.get(task), len(tried)
        warmup = max(map(_warmup, tried))
        steps = ", ".join(f"{rung.candidates} to {rung.share:.3g}" for rung in halving.rungs(count, warmup))
        self.notes[
            f"a search of {count} candidates trains {steps} of their steps and 1 to the end: "
            f"{halving.cost(count, warmup) / count:.0%} of the steps of them all"
        ] = None
        folders = [self.root / run.folder for run in tried]
        stands = halving.search(
            folders,
            [folder_state(folder)[0] == "failed" for folder in folders],
            # the loss first: long before scores differ by more than chance, losses do
            lambda at: (
                _gain(at["validation"]),
                _score(at["validation"], metric, at["metric"], at["higher_is_better"]),
            ),
            warmup,
        )
        planned = [
            run.model_copy(update={"until": stand.until, "stopped": stand.stopped})
            for run, stand in zip(tried, stands, strict=True)
        ]
        last = [k for k, run in enumerate(planned) if run.until is None]
        best = choose(self.root, [planned[k] for k in last], metric=metric) if last else None
        return planned, None if best is None else last[best]

    def _sequence(self, order: tuple[str, ...]) -> Iterator[Planned]:
        """One task after the other, each from the adapter of the one before. The first task's sweep serves them all."""
        candidates = self.candidates()
        first = list(self._swept(order[0], candidates, order))
        yield from first
        for run in first:
            if run.candidate:
                continue
            before = run
            chosen = None if run.config is None else {key: run.config[key] for key in candidates[0]}
            for task in order[1:]:
                before = self.plan(task, run.seed, chosen, order, before)
                yield before

    def plan(
        self,
        task: str,
        seed: int,
        settings: Mapping[str, Any] | None,
        order: tuple[str, ...] = (),
        before: Planned | None = None,
    ) -> Planned:
        """One run, with the ``settings`` that the sweep chose; None while it has not.

        ``order`` are the tasks of the sequence that it belongs to, ``before`` the run whose adapter it goes on with.
        """
        study, base, row = self.study, self.base, self.row
        name = "-".join(order[: order.index(task) + 1]) if order else task
        start_from = None if before is None else str(self.root / before.folder)
        config = config_of(study, self.options, base, row, task, seed, settings or {}, start_from, self.notes)
        words = rate_suffix(study, base, row, config) + tries_suffix(self.options, row, config)
        run = f"s{seed}{words}" if study.kind == "train" else study.kind
        folder = "/".join((base.folder, name, row.name, run))
        if settings is None:
            folder, dumped = f"{folder}-not-chosen", None
        else:
            dumped = read_config(None, {**config, "output": str(self.root / folder)}).model_dump()
        return Planned(
            folder=folder,
            kind=study.kind,
            model=base.folder,
            sizes=base.sizes,
            task=name,
            row=row.name,
            label=row.label,
            method=row.method,
            seed=seed,
            learning_rate=None if dumped is None else dumped["learning_rate"],
            config=dumped,
            after=() if before is None else (before.folder,),
            evaluate=order,
            order=order,
        )


def choose(root: Path, candidates: Sequence[Planned], *, metric: str | None = None) -> int | None:
    """The index of the finished candidate with the best *validation* score; None while one may still finish.

    The test split is never looked at. ``metric`` is by default the task's first. Where validation does not have it
    (answers are generated for the test alone) the loss decides, as it does between equal scores; then the earlier
    candidate wins.
    """
    states = [folder_state(root / run.folder)[0] for run in candidates]
    if not all(state in ("finished", "failed") for state in states) or "finished" not in states:
        return None

    def merit(k: int) -> tuple[float, float, int]:
        record = RunRecord.load(root / candidates[k].folder / "run.json")
        score = _score(record.validation, metric, record.metric, record.higher_is_better)
        return score, _gain(record.validation), -k

    return max((k for k, state in enumerate(states) if state == "finished"), key=merit)


def _score(validation: Mapping[str, float], metric: str | None, default: str, higher_is_better: bool) -> float:
    """A number that is larger for the better candidate, by its metric. A diverged candidate never wins."""
    name = metric if metric is not None and metric in validation else default
    if name not in validation:
        return _gain(validation)
    value = validation[name] if higher_is_better else -validation[name]
    return value if math.isfinite(value) else -math.inf


def _gain(validation: Mapping[str, float]) -> float:
    """The same by the loss."""
    loss = validation.get("loss", math.nan)
    return -loss if math.isfinite(loss) else -math.inf


def differences(root: Path, run: Planned) -> list[str]:
    """A phrase for each option in which a planned run differs from the run that its folder holds."""
    file = root / run.folder / "config.json"
    if run.config is None or not file.is_file():
        return []
    try:
        before = RunConfig(**read_json(file)).model_dump()
    except (OSError, ValueError, TypeError):
        return [f"'{file}' is damaged or of another version"]
    changed = changed_places(file.parent, run.run_config())
    return [
        *differing(before, {key: value for key, value in run.config.items() if key != "output"}),
        *([f"{changed} is not what it began with"] if changed else []),
    ]


def _warmup(run: Planned) -> float:
    """The share of its steps in which the rate of a run rises; where nobody knows its steps yet, ``warmup``."""
    config = run.run_config()
    if config.warmup_steps is not None and (steps := total_steps(config.model_dump())):
        return config.warmup_steps / steps
    return config.warmup
