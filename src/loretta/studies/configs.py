"""The configuration of one run: what study, model, row and user ask for, fitted to the length of its data."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from loretta.errors import InputError
from loretta.plan import default_task_type, find_config, meta_model
from loretta.studies.study import OF_EACH_RUN, Frozen, PaperModel, Row, Study
from loretta.tasks import load_task
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED, Sample
from loretta.tasks.prompted.sampling import validation_rows
from loretta.tasks.read import text_of
from loretta.tasks.sources import names_files
from loretta.training.config import OF_A_TABLE, RunConfig, read_config
from loretta.training.methods import refuse_unknown_options, virtual_tokens
from loretta.tt.modes import most_balanced
from loretta.wording import nearest

OF_A_FILE = ("text", "text_pair", "label", "kind", "separator", "split")
FEWEST_EVALUATIONS = 3  # of a run: with fewer there is no choice of checkpoints


def full_name(method: str) -> str:
    """The name by which studies have a method: "loretta_rep" for "rep"."""
    return f"loretta_{method}" if method in ("adp", "rep", "shared") else method


class Options(Frozen):
    """What the user changes in a study."""

    models: tuple[str, ...] = ()  # keys of the study's models, Hub ids, folders; () for all of the study's
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()  # names of rows, methods of rows, or any other method
    seeds: int | None = None
    limit: int | None = None
    data_dir: str | None = None
    sweep: bool = False
    rates: tuple[float, ...] = ()  # to sweep over, in place of the study's grids
    batches: bool = False  # whether to sweep over the grids' batch sizes too
    # run option, or "METHOD.option" -> the values to sweep over
    tries: dict[str, tuple[Any, ...]] = Field(default={})
    search: Literal["grid", "halving"] = "grid"  # how a sweep finds the best candidate
    orders: bool = False  # whether to train a sequence in every order
    cpu: bool = False
    sets: dict[str, Any] = Field(default={}, description='options of every run, or "METHOD.option" of one method')


class Base(Frozen):
    """A model to run on."""

    folder: str
    weights: str  # what RunConfig.model takes
    key: str | None  # of the study's models; None for any other
    sizes: str  # what loretta.plan.base_models.find_config takes
    paper: PaperModel | None


def config_of(
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
        "method_args": _method_args(options, base, row) | settings.get("method_args", {}),
        "seed": seed,
        "limit": options.limit,
        "data_dir": options.data_dir,
        "start_from": start_from,
        "cpu": options.cpu,
        **sets,
    }
    read_config(None, raw)  # refuses bad values before they are computed with
    if base.paper is None and (positions := _positions(base.sizes)) is not None:
        room = positions - virtual_tokens(row.method, raw["method_args"])
        raw["max_length"] = min(raw.get("max_length", 128), room)
    if study.kind == "train":
        _fit(raw, sets, notes)
    return raw


@cache
def _positions(sizes: str) -> int | None:
    from loretta.training.model import positions_of

    found = find_config(sizes)
    return positions_of(meta_model(found, default_task_type(found)))


def refuse_wrong_sets(study: Study, options: Options, rows: Sequence[Row]) -> None:
    """Refuse --set and --try for unknown options, for those that tell runs apart, and for methods that are not run."""
    given = [("--set", key, value) for key, value in options.sets.items()]
    given += [("--try", key, ",".join(map(str, values))) for key, values in options.tries.items()]
    names = dict.fromkeys(name for row in rows for name in (row.name, row.method))
    for flag, key, value in given:
        method, dot, option = key.partition(".")
        if dot:
            found = full_name(method)
            if found not in names:
                raise InputError(
                    f"{flag} {key}={value}: {study.name} runs no method {method!r}{nearest(found, tuple(names))}: "
                    f"it runs {', '.join(names)}"
                )
            for name in dict.fromkeys(row.method for row in rows if found in (row.name, row.method)):
                refuse_unknown_options(name, {option})
        elif key in OF_EACH_RUN:
            raise InputError(f"{flag} {key}={value}: the study gives each run its own {key}: leave it out")
        elif key in OF_A_TABLE and study.view != "compare":
            raise InputError(f"{flag} {key}={value}: the tasks of {study.name} have their own rows: leave it out")
        elif key not in RunConfig.model_fields:
            raise InputError(f"{flag} {key}={value}: no option of a run; one of a method is METHOD.{key}")


# options of a run that a study without training reads
_READ = {"cost": ("batch_size", "max_length", "dtype", "prompted", "head_policy"), "count": ("prompted", "head_policy")}
_FLAGS = {"batches": "--sweep-batches", "tries": "--try"}  # of the fields of Options that are not named after theirs


def refuse_idle(study: Study, options: Options, rows: Sequence[Row]) -> None:
    """Raise InputError for options that would do nothing in this study, and nothing said."""
    if study.kind != "train":
        given = [key for key in options.sets if "." not in key and key not in (*_READ[study.kind], "cpu")]
        given += [
            name for name in ("limit", "data_dir", "sweep", "rates", "batches", "tries") if getattr(options, name)
        ]
        given += ["seeds"] if (options.seeds or 1) > 1 else []
        if given:
            flags = (_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in given)
            does = "measures single steps on random tokens" if study.kind == "cost" else "counts parameters"
            raise InputError(f"{', '.join(flags)}: {study.name} {does} and trains nothing: leave that out")
    if options.orders and not study.sequence:
        raise InputError(f"--orders is for tasks in a sequence (table4), and {study.name} has none: leave it out")
    searched = (options.sweep or options.batches) and not options.rates
    if searched and not any(full_name(row.method) in study.grids for row in rows):
        methods = ", ".join(dict.fromkeys(row.method for row in rows))
        raise InputError(f"{study.name} has no grid of learning rates to sweep for {methods}: give --rates")


def _method_args(options: Options, base: Base, row: Row) -> dict[str, Any]:
    args = dict(row.all_options)
    if base.key is None and row.modes is not None:
        args["shapes"] = shapes(find_config(base.sizes).hidden_size, args.get("bottleneck_size", 64), row.modes)
    if options.sets.get("head_policy", "method") != "method":
        args.pop("train_head", None)  # the command's policy is for all rows
    return args | {key.partition(".")[2]: value for key, value in options.sets.items() if _is_of_method(key, row)}


def _is_of_method(key: str, row: Row) -> bool:
    """Whether ``key`` is METHOD.option, and METHOD the name or the method of a row."""
    method, dot, _ = key.partition(".")
    return bool(dot) and full_name(method) in (row.name, row.method)


def shapes(width: int, bottleneck: int, count: int) -> dict[str, list[int]]:
    """``count`` modes for each of an adapter's two trains, as in Table 7: the larger half on the wide side."""
    n_out = count // 2
    # ascending, as equal as possible; 1 where there are too few factors
    factors = most_balanced(width, count - n_out, least=1), most_balanced(bottleneck, n_out, least=1)
    wide, narrow = (list(each or ()) for each in factors)
    return {f"{width}x{bottleneck}": wide[::-1] + narrow, f"{bottleneck}x{width}": narrow[::-1] + wide}


def _fit(raw: dict[str, Any], sets: Mapping[str, Any], notes: dict[str, None]) -> None:
    """Drop a warm-up and evaluation steps that were meant for longer training."""
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
    """Optimiser steps of a run; None where nobody knows the size of its data before it is loaded."""
    if raw.get("max_steps"):
        return raw["max_steps"]
    sample = tuple(sorted(raw.get("sample", {}).items()))
    rows = train_rows(raw["data"], raw.get("data_dir"), sample)
    if rows is None and names_files(raw["data"]):
        options = tuple((key, raw.get(key)) for key in (*OF_A_FILE, "validation"))
        rows = file_rows(raw["data"], options, raw["model"], raw.get("max_length", 128), raw.get("limit"))
    elif rows is not None:
        rows = min(rows, raw.get("limit") or rows)
    if rows is None:
        return None
    updates = math.ceil(math.ceil(rows / raw.get("batch_size", 16)) / raw.get("accumulate", 1))
    return math.ceil(updates * raw.get("epochs", 3))


@cache
def file_rows(
    data: str, options: tuple[tuple[str, str | None], ...], model: str, max_length: int, limit: int | None
) -> int | None:
    """Training rows (or blocks of tokens) of a user's file; None for plain text where there is no tokenizer.

    ``limit`` is that of rows, which of plain text are documents.

    Raises InputError for a file that cannot be read.
    """
    from loretta.training.forms.text import blocks
    from loretta.training.model import load_tokenizer

    given: dict[str, Any] = dict(options)
    task = load_task(data, **given)
    task = task if limit is None else task.limited(limit)
    if task.kind != "language_modeling":
        return len(task.train)
    try:
        return len(blocks(task.train, task.name, load_tokenizer(model), max_length))
    except InputError:
        return None


@cache
def train_rows(data: str, data_dir: str | None, sample: tuple[tuple[str, int], ...]) -> int | None:
    """Training rows of a named task: those of its file, or the official ones; of a prompted task those it draws."""
    file = Path(data_dir) / data / "train.jsonl.gz" if data_dir else None
    rows = None
    if file is not None and file.is_file():
        rows = sum(1 for line in text_of(file).split("\n") if line.strip())
    if data in GLUE:
        return GLUE[data].train_rows if rows is None else rows
    if data not in PROMPTED:
        return None
    spec, asked = PROMPTED[data], Sample(**dict(sample))
    rows = spec.train_rows if rows is None else rows
    return min(asked.train, rows - validation_rows(spec, rows, asked))


def tried_by(options: Options, row: Row) -> dict[str, tuple[Any, ...]]:
    """The values of ``--try`` for a row."""
    return {key: values for key, values in options.tries.items() if "." not in key or _is_of_method(key, row)}


def tries_suffix(options: Options, row: Row, config: Mapping[str, Any]) -> str:
    """The tried options, for the name of a run's folder."""
    words = ""
    for key in tried_by(options, row):
        method, _, name = key.rpartition(".")
        value = (config.get("method_args", {}) if method else config).get(name)
        words += "" if value is None else f"-{name}{value}"
    return words


def rate_suffix(study: Study, base: Base, row: Row, config: Mapping[str, Any]) -> str:
    """The learning rate and the batch size for the name of a run's folder, where the study has others."""
    own = {**study.protocol, **(base.paper.settings if base.paper else {}), **row.settings}
    rate, batch = config.get("learning_rate"), config.get("batch_size")
    words = f"-lr{rate:g}" if rate is not None and rate != own.get("learning_rate") else ""
    return words + (f"-b{batch}" if batch is not None and batch != own.get("batch_size") else "")
