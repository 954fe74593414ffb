"""A study and the user's options -> every run, each with its whole configuration and its folder."""

import gzip
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from loretta.errors import InputError
from loretta.plan import FAMILIES, default_task_type, find_config
from loretta.record import RunRecord
from loretta.studies.state import folder_state
from loretta.studies.study import OF_EACH_RUN, Frozen, PaperModel, Planned, Row, Study
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED, Sample
from loretta.tasks.prompted.sampling import validation_rows
from loretta.training.config import RunConfig, read_config
from loretta.training.methods import find_method, refuse_unknown_options, virtual_tokens
from loretta.tt.modes import most_balanced
from loretta.wording import nearest

ALIASES = {"adp": "loretta_adp", "rep": "loretta_rep"}
FEWEST_EVALUATIONS = 3  # of a run; with fewer there is nothing to choose the best checkpoint from


class Options(Frozen):
    """What the user changes of a study."""

    models: tuple[str, ...] = ()  # keys of the study's models, Hub ids, folders; () for all of the study's
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()  # names of rows, methods of rows, or any other method
    seeds: int | None = None
    limit: int | None = None
    data_dir: str | None = None
    sweep: bool = False
    rates: tuple[float, ...] = ()  # to sweep over, in place of the study's grids
    batches: bool = False  # sweep over the grids' batch sizes too
    orders: bool = False  # a sequence in every order
    cpu: bool = False
    sets: dict[str, Any] = Field(default={}, description='run options for all, or "METHOD.option" for a method\'s')


class Base(Frozen):
    """A model to run on."""

    folder: str
    weights: str  # what RunConfig.model takes
    key: str | None  # of the study's models; None for any other
    sizes: str  # what loretta.plan.base_models.find_config takes
    paper: PaperModel | None


class Expansion(Frozen):
    """All runs, and what was changed to fit them to short data, a sentence each."""

    runs: tuple[Planned, ...]
    notes: tuple[str, ...]
    bases: tuple[Base, ...]


def expand(study: Study, options: Options, root: Path) -> Expansion:
    """Every run of the study as narrowed by ``options``, below ``root``.

    Under a sweep the first seed has a candidate for each rate; once all of them are finished in ``root``, the best on
    validation is the run of that seed and gives the other seeds their rate. Until then those have no config.

    Raises InputError for models, tasks, methods and options that there are not.
    """
    if options.data_dir is not None and not Path(options.data_dir).expanduser().is_dir():
        raise InputError(f"--data-dir '{options.data_dir}' is no folder: give the one with a folder for each task")
    bases = _bases(study, options)
    rows = {base.folder: _rows(study, options, base) for base in bases}
    _refuse_wrong_sets(study, options, [row for found in rows.values() for row in found])
    notes: dict[str, None] = {}
    runs = [
        run for base in bases for row in rows[base.folder] for run in _row_runs(study, options, root, base, row, notes)
    ]
    if not runs:
        raise InputError(f"nothing of {study.name} is left to run: give fewer of --tasks, --methods and --model")
    return Expansion(runs=tuple(runs), notes=tuple(notes), bases=bases)


def _bases(study: Study, options: Options) -> tuple[Base, ...]:
    """The models, each once."""
    bases: dict[str, Base] = {}
    for base in _given_bases(study, options):
        other = bases.setdefault(base.folder, base)
        if other.weights != base.weights:
            raise InputError(
                f"--model '{other.weights}' and --model '{base.weights}' would share the folder '{base.folder}': "
                "run them one by one, each with an --output of its own"
            )
    return tuple(bases.values())


def _given_bases(study: Study, options: Options) -> Iterator[Base]:
    hubs = {model.hub: key for key, model in study.models.items()}
    for given in options.models or study.models:
        key = given if given in study.models else hubs.get(given)
        if key is not None:
            paper = study.models[key]
            known = key if key in FAMILIES else paper.hub
            yield Base(folder=key, weights=paper.hub, key=key, sizes=known, paper=paper)
        else:
            try:
                find_config(given)
            except InputError as error:
                raise InputError(f"--model '{given}': {error}") from None
            # "." is a model's folder too
            name = Path(given).resolve().name if Path(given).is_dir() else Path(given).name
            yield Base(folder=name, weights=given, key=None, sizes=given, paper=None)


def _rows(study: Study, options: Options, base: Base) -> list[Row]:
    """The study's rows for a model, cut to the methods.

    A model that is not one of the study's takes the rows of those of its kind (encoder or decoder), where there are
    any; of two rows of one name the first.
    """
    models = {base.key} if base.key is not None else _alike(study, base)
    rows: dict[str, Row] = {}
    for row in study.rows:
        if row.model is None or row.model in models:
            rows.setdefault(row.name, row)
    if not options.methods:
        return list(rows.values())
    chosen: dict[str, Row] = {}
    for word in options.methods:
        named = ALIASES.get(word, word)
        exact = [rows[named]] if named in rows else []
        for row in exact or [row for row in rows.values() if row.method == named] or [_other(named, study)]:
            chosen[row.name] = row
    return list(chosen.values())


def _alike(study: Study, base: Base) -> set[str]:
    kind = default_task_type(find_config(base.sizes))
    models = {key for key in study.models if default_task_type(find_config(key)) == kind}
    return models or set(study.models)


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
            close = get_close_matches(task, study.tasks, 1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"--tasks {task!r} is not in {study.name}: {guess}it has {', '.join(study.tasks)}")
    own = base.paper.tasks if base.paper and base.paper.tasks else study.tasks
    return tuple(task for task in dict.fromkeys(options.tasks or study.tasks) if task in own)


def _row_runs(
    study: Study, options: Options, root: Path, base: Base, row: Row, notes: dict[str, None]
) -> Iterator[Planned]:
    tasks = _tasks(study, options, base)
    seeds = range(options.seeds or study.seeds)

    def plan(task: str, seed: int, settings: Mapping[str, Any] | None, **more: Any) -> Planned:
        name = "-".join(more["order"][: more["order"].index(task) + 1]) if more.get("order") else task
        config = _config(study, options, base, row, task, seed, settings or {}, more.pop("start_from", None), notes)
        suffix = _suffix(study, base, row, config)
        run = study.kind if study.kind != "train" else f"s{seed}{suffix}"
        folder = "/".join((base.folder, name, row.name, run))
        if settings is None:  # the sweep has not chosen yet
            folder, dumped = f"{folder}-not-chosen", None
        else:
            dumped = read_config(None, {**config, "output": str(root / folder)}).model_dump()
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
            **more,
        )

    if study.kind != "train":
        yield from (plan(task, 0, {}) for task in tasks)
        return
    candidates = _candidates(study, options, row)
    if not study.sequence:
        for task in tasks:
            yield from _swept(study, root, seeds, candidates, task, lambda seed, s, task=task: plan(task, seed, s))
        return
    for order in itertools.permutations(tasks) if options.orders else [tasks]:
        first = list(
            _swept(
                study, root, seeds, candidates, order[0],
                lambda seed, s, order=order: plan(order[0], seed, s, order=order, evaluate=order),
            )
        )  # fmt: skip
        yield from first
        # the rate that the sweep chose on the first task serves the whole sequence
        for run in first:
            if run.candidate:
                continue
            before = run
            for task in order[1:]:
                settings = None
                if run.config is not None:
                    settings = {key: run.config[key] for key in candidates[0]}
                before = plan(
                    task, run.seed, settings, order=order, evaluate=order,
                    after=(before.folder,), start_from=str(root / before.folder),
                )  # fmt: skip
                yield before


def _candidates(study: Study, options: Options, row: Row) -> list[dict[str, Any]]:
    """The settings that a sweep tries for a row; one without a setting when there is nothing to choose."""
    if not (options.sweep or options.rates or options.batches):
        return [{}]
    grid = study.grids.get(ALIASES.get(row.method, row.method))
    rates = options.rates or (grid.learning_rate if grid else ())
    axes: dict[str, Sequence[Any]] = {}
    if rates and "learning_rate" not in options.sets:
        axes["learning_rate"] = tuple(dict.fromkeys(rates))
    if options.batches and grid and grid.batch_size and "batch_size" not in options.sets:
        axes["batch_size"] = grid.batch_size
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _swept(study, root, seeds, candidates, task, plan) -> Iterator[Planned]:
    """The runs of one cell: candidates of the first seed while more than one is left, then all seeds."""
    if len(candidates) == 1:
        yield from (plan(seed, candidates[0]) for seed in seeds)
        return
    tried = [plan(seeds[0], settings) for settings in candidates]
    best = choose(root, tried, metric=study.metrics.get(task))
    for k, run in enumerate(tried):
        yield run if k == best else run.model_copy(update={"candidate": True})
    yield from (
        plan(seed, None if best is None else candidates[best]) for seed in seeds[1 if best is not None else 0 :]
    )


def choose(root: Path, candidates: Sequence[Planned], *, metric: str | None = None) -> int | None:
    """The index of the finished candidate that is best on *validation*; None while one may still finish.

    The test split is never looked at. ``metric`` is by default the task's first; where the validation has none (answers
    are generated for the test alone), the loss decides, as it does between equals. Then the earlier candidate wins.
    """
    states = [folder_state(root / run.folder)[0] for run in candidates]
    if not all(state in ("finished", "failed") for state in states) or "finished" not in states:
        return None

    def merit(k: int) -> tuple[float, float, int]:
        record = RunRecord.load(root / candidates[k].folder / "run.json")
        name = metric if metric in record.validation else record.metric
        loss = record.validation.get("loss", math.nan)
        value = record.validation.get(name, -loss)
        if name in record.validation and not record.higher_is_better:
            value = -value
        # a diverged run never wins
        return (value if math.isfinite(value) else -math.inf, -loss if math.isfinite(loss) else -math.inf, -k)

    return max((k for k, state in enumerate(states) if state == "finished"), key=merit)


def _config(
    study: Study,
    options: Options,
    base: Base,
    row: Row,
    task: str,
    seed: int,
    settings: Mapping[str, Any],
    start_from: str | None,
    notes: dict[str, None],
) -> dict[str, Any]:
    """The options of one run, fitted to the length of its data."""
    sets = {key: value for key, value in options.sets.items() if "." not in key}
    raw = {
        "data": task,
        **study.protocol,
        **(base.paper.settings if base.paper else {}),
        **row.settings,
        **settings,
        "model": base.weights,
        "method": row.method,
        "method_args": _method_args(options, base, row),
        "seed": seed,
        "limit": options.limit,
        "data_dir": options.data_dir,
        "start_from": start_from,
        "cpu": options.cpu,
        **sets,
    }
    read_config(None, raw)  # refuses bad values before they are computed with
    if base.paper is None and (longest := getattr(find_config(base.sizes), "max_position_embeddings", None)):
        room = longest - virtual_tokens(row.method, raw["method_args"])
        raw["max_length"] = min(raw.get("max_length", 128), room)
    if study.kind == "train":
        _fit(raw, sets, notes)
    return raw


def _refuse_wrong_sets(study: Study, options: Options, rows: Sequence[Row]) -> None:
    """Refuse --set of what is no option, of what makes one run differ from another, or of a method that is not run."""
    names = dict.fromkeys(name for row in rows for name in (row.name, row.method))
    for key, value in options.sets.items():
        method, dot, option = key.partition(".")
        if dot:
            found = ALIASES.get(method, method)
            if found not in names:
                raise InputError(
                    f"--set {key}={value}: {study.name} runs no method {method!r}{nearest(found, tuple(names))}: "
                    f"it runs {', '.join(names)}"
                )
            for name in dict.fromkeys(row.method for row in rows if found in (row.name, row.method)):
                refuse_unknown_options(name, {option})
        elif key in OF_EACH_RUN:
            raise InputError(f"--set {key}={value}: the study gives each run its own {key}: leave it out")
        elif key not in RunConfig.model_fields:
            raise InputError(f"--set {key}={value}: no option of a run; one of a method is METHOD.{key}")


def _method_args(options: Options, base: Base, row: Row) -> dict[str, Any]:
    args = dict(row.all_options)
    if base.key is None and row.modes is not None:
        args["shapes"] = shapes(find_config(base.sizes).hidden_size, args.get("bottleneck_size", 64), row.modes)
    if options.sets.get("head_policy", "method") != "method":
        args.pop("train_head", None)  # the command's policy is for all rows
    for key, value in options.sets.items():
        method, dot, option = key.partition(".")
        if dot and ALIASES.get(method, method) in (row.name, row.method):
            args[option] = value
    return args


def shapes(width: int, bottleneck: int, count: int) -> dict[str, list[int]]:
    """Modes of an adapter's two trains, ``count`` each, as Table 7 splits them: the larger half on the wide side."""
    n_out = count // 2
    wide, narrow = _factors(width, count - n_out), _factors(bottleneck, n_out)
    return {f"{width}x{bottleneck}": wide[::-1] + narrow, f"{bottleneck}x{width}": narrow[::-1] + wide}


def _factors(size: int, count: int) -> list[int]:
    """``count`` ascending factors with the product ``size``, as equal as they can be; 1 where there are too few."""
    return list(most_balanced(size, count, least=1) or ())


def _fit(raw: dict[str, Any], sets: Mapping[str, Any], notes: dict[str, None]) -> None:
    """Leave out a warm-up and evaluation steps that were meant for longer training."""
    steps = total_steps(raw)
    if steps is None:
        return
    warmup, every = raw.get("warmup_steps"), raw.get("eval_steps")
    if warmup and 2 * warmup > steps and "warmup_steps" not in sets:
        raw["warmup_steps"] = None
        notes[f"a warm-up of {warmup} steps is more than half of a short run: it is 6% of the steps there"] = None
    if every and FEWEST_EVALUATIONS * every > steps and "eval_steps" not in sets:
        raw["eval_steps"] = None
        notes[f"a run too short to evaluate {FEWEST_EVALUATIONS} times every {every} steps does so each epoch"] = None


def total_steps(raw: Mapping[str, Any]) -> int | None:
    """Optimiser steps of a run; None where the size of its data is not known before it is loaded."""
    if raw.get("max_steps"):
        return raw["max_steps"]
    sample = tuple(sorted(raw.get("sample", {}).items()))
    rows = train_rows(raw["data"], raw.get("data_dir"), sample)
    if rows is None:
        return None
    rows = min(rows, raw["limit"]) if raw.get("limit") else rows
    return math.ceil(math.ceil(rows / raw.get("batch_size", 16)) * raw.get("epochs", 3))


@cache
def train_rows(data: str, data_dir: str | None, sample: tuple[tuple[str, int], ...]) -> int | None:
    """Training rows of a task by its name: those of its file or the official ones, or what a prompted task draws."""
    file = Path(data_dir) / data / "train.jsonl.gz" if data_dir else None
    rows = None
    if file is not None and file.is_file():
        with gzip.open(file, "rb") as lines:
            rows = sum(1 for line in lines if line.strip())
    if data in GLUE:
        return GLUE[data].train_rows if rows is None else rows
    if data not in PROMPTED:
        return None
    spec, asked = PROMPTED[data], Sample(**dict(sample))
    rows = spec.train_rows if rows is None else rows
    return min(asked.train, rows - validation_rows(spec, rows, asked))


def _suffix(study: Study, base: Base, row: Row, config: Mapping[str, Any]) -> str:
    """The rate and the batch size in a folder's name, where they are not those of the study."""
    own = {**study.protocol, **(base.paper.settings if base.paper else {}), **row.settings}
    rate, batch = config.get("learning_rate"), config.get("batch_size")
    words = f"-lr{rate:g}" if rate is not None and rate != own.get("learning_rate") else ""
    return words + (f"-b{batch}" if batch is not None and batch != own.get("batch_size") else "")


def differences(root: Path, run: Planned) -> list[str]:
    """What differs between a planned run and the one that its folder already holds, a phrase each."""
    file = root / run.folder / "config.json"
    if run.config is None or not file.is_file():
        return []
    try:
        before = RunConfig(**json.loads(file.read_text(encoding="utf-8"))).model_dump()
    except (ValueError, TypeError):
        return [f"'{file}' is damaged or of another version"]
    now = run.config
    return [
        f"{key} was {before[key]!r} and is {now[key]!r}" for key in now if key != "output" and before[key] != now[key]
    ]
