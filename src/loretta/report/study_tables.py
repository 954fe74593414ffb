"""The results of a study -> its tables: measured numbers beside those printed in the paper."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.report.figures import Look
from loretta.report.tables import Cell, Column, Row, Table, number, seconds, size, words_table
from loretta.studies.results import AVERAGE, Results, find_row, interval
from loretta.studies.results import Cell as Measured
from loretta.studies.show import figure, printed_models, with_half
from loretta.studies.study import Planned
from loretta.tuners.config import LorettaConfig
from loretta.wording import MISSING, grouped

Anchors = Mapping[tuple, str]  # key_of a cell -> the id of the place with its runs
STRONGEST_SHADE = 0.4
HEADS = {"tensorized": "tensorised", "tensorized_only": "tensorised, final layer frozen"}
QUANTITIES = {"memcpy_us": "memory copies (µs)", "flops": "FLOPs"}


def key_of(cell: Measured) -> tuple:
    return (cell.model, cell.row, cell.task, cell.order, cell.stage)


def tables_of(results: Results, root: Path, anchors: Anchors, looks: Mapping[str, Look]) -> list[Table]:
    """Every table of the study's view, the main ones first."""
    view = results.study.view
    main: Callable[..., Table] = {"cost": _costs, "bytes": _counts}.get(view, _scores)
    models = list(dict.fromkeys(cell.model for cell in results.cells))
    tables = [main(results, model, anchors, looks) for model in models]
    if view == "sequence":
        tables += [_forgetting(results, model, anchors) for model in models]
    if view == "norms":
        tables += [_factors(results, model, anchors) for model in models]
    if view == "shapes":
        tables += [_trains(results, model, root) for model in models]
    tables.append(_tried(results, root))
    return [table for table in tables if table.rows]


def record_of(root: Path, run: Planned) -> RunRecord | None:
    """The record of a run; None where it is missing or damaged: the study's results then say so."""
    try:
        return RunRecord.load(root / run.folder / "run.json")
    except InputError:
        return None


def by_row(cells: Iterable[Measured]) -> dict[tuple[str, tuple[str, ...]], dict[str, Measured]]:
    """(row, order of a sequence) -> its cells by task."""
    rows: dict[tuple[str, tuple[str, ...]], dict[str, Measured]] = {}
    for cell in cells:
        rows.setdefault((cell.row, cell.order), {})[cell.task] = cell
    return rows


def measured(cell: Measured | None, scale: float, anchors: Anchors) -> Cell:
    """Mean ± half of the interval in the paper's unit, with the paper's number and how many seeds are missing."""
    if cell is None:
        return Cell("")
    return Cell(
        with_half(cell.mean, cell.high, scale),
        exact=_in_full(cell),
        paper="" if cell.printed is None else figure(cell.printed, scale),
        note=cell.seeds if cell.finished < cell.asked else "",
        anchor=anchors.get(key_of(cell), ""),
    )


def _in_full(cell: Measured) -> str:
    if cell.mean is None:
        return "; ".join(f"seed {missing.seed}: {missing.state}, {missing.reason}" for missing in cell.missing)
    ends = "" if cell.low is None else f", 95% interval {cell.low:.6g} to {cell.high:.6g}"
    seeds = ", ".join(f"{score.value:.6g} (seed {score.seed})" for score in cell.scores)
    return f"{cell.metric}: mean {cell.mean:.6g}{ends}; {seeds}"


def _parameters(cells: Iterable[Measured]) -> Cell:
    """The count of trained parameters that most tasks share: heads differ with the number of labels."""
    counts = {cell.task: cell.parameters for cell in cells if cell.parameters is not None}
    if not counts:
        return Cell(MISSING)
    differ = len(set(counts.values())) > 1
    return Cell(
        f"{statistics.mode(counts.values()):,}",
        exact=", ".join(f"{task}: {n:,}" for task, n in counts.items() if task != AVERAGE) if differ else "",
    )


def _scores(results: Results, model: str, anchors: Anchors, looks: Mapping[str, Look]) -> Table:
    study = results.study
    cells = [cell for cell in results.final() if cell.model == model]
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    splits = sorted({cell.split for cell in cells if cell.split})
    unit = " × 100" if study.scale == 100 else ""
    scored = f"Score on {' and '.join(splits)}{unit}" if splits else f"Score{unit}"
    metrics = {cell.task: cell.metric for cell in cells if cell.metric and cell.metric != AVERAGE}
    from_paper = any(cell.printed_parameters for cell in cells)
    columns = [
        Column("Trained parameters", "measured"),
        *([Column("Trained parameters", "paper")] if from_paper else []),
        *(Column(scored, task, detail=metrics.get(task, "")) for task in tasks),
        Column("Cost", "adapter", "size of the saved adapter on disk"),
        Column("Cost", "time (s)", "seconds of training, the mean of all runs of the row"),
    ]
    rows = []
    for (row, order), of_task in by_row(cells).items():
        known = list(of_task.values())
        times = [score.seconds for cell in known for score in cell.scores if score.seconds is not None]
        rows.append(
            Row(
                heads=(known[0].label, *([" → ".join(order)] if study.sequence else [])),
                cells=[
                    _parameters(known),
                    *([Cell(known[0].printed_parameters or MISSING)] if from_paper else []),
                    *(measured(of_task.get(task), study.scale, anchors) for task in tasks),
                    size(next((cell.adapter_bytes for cell in known if cell.adapter_bytes is not None), None)),
                    seconds(statistics.fmean(times)) if times else Cell(MISSING),
                ],
                look=looks.get(row),
            )
        )
    return Table(
        title=f"Scores with {model}",
        stubs=("Method", *(["Trained in the order"] if study.sequence else [])),
        columns=columns,
        rows=rows,
        caption=_caption(cells),
    )


def _caption(cells: Sequence[Measured]) -> str:
    sentences = []
    if any(cell.low is not None for cell in cells):
        sentences.append("Mean over seeds ± half of Student's 95% interval.")
    if any(cell.mean is not None and cell.low is None for cell in cells):
        sentences.append("A number without ± is of one seed.")
    if models := printed_models(cells):
        sentences.append(f"With each number the one that the paper prints, for {' and '.join(models)}.")
    return " ".join(sentences)


def _forgetting(results: Results, model: str, anchors: Anchors) -> Table:
    """A row for each step of a sequence and a column for each task, then a row of what each task lost by the end."""
    study = results.study
    cells = [cell for cell in results.cells if cell.model == model and cell.stage is not None and cell.task != AVERAGE]
    of_row: dict[tuple[str, tuple[str, ...]], dict[tuple[int, str], Measured]] = {}
    for cell in cells:
        of_row.setdefault((cell.row, cell.order), {})[cell.stage or 0, cell.task] = cell
    trained = {task for _, order in of_row for task in order}
    tasks = [task for task in study.tasks if task in trained]  # a sequence may be cut to some of them
    rows = []
    for (_, order), found in of_row.items():
        label = next(iter(found.values())).label
        for stage in range(1, len(order) + 1):
            shown = [_shaded(found.get((stage, task)), study.scale, anchors) for task in tasks]
            rows.append(Row(heads=(label, f"after {' → '.join(order[:stage])}"), cells=shown))
        lost = [_lost(found, task, order, study.scale) for task in tasks]
        rows.append(Row(heads=(label, "forgotten"), cells=lost))
    return Table(
        title=f"What is forgotten, {model}",
        stubs=("Method", "State"),
        columns=[Column("", task) for task in tasks],
        rows=rows,
        caption="Validation scores after each task of the sequence, a stronger colour for higher ones. Forgotten: the "
        "score right after a task's own training less the score at the end, seed by seed.",
    )


def _shaded(cell: Measured | None, scale: float, anchors: Anchors) -> Cell:
    shown = measured(cell, scale, anchors)._replace(paper="")
    if cell is None or cell.mean is None or not math.isfinite(cell.mean):
        return shown
    return shown._replace(shade=STRONGEST_SHADE * min(1.0, max(0.0, cell.mean)))


def _lost(found: Mapping[tuple[int, str], Measured], task: str, order: tuple[str, ...], scale: float) -> Cell:
    if task not in order[:-1]:
        return Cell(MISSING)
    own, last = found.get((order.index(task) + 1, task)), found.get((len(order), task))
    if own is None or last is None:
        return Cell(MISSING)
    before, after = ({score.seed: score.value for score in cell.scores} for cell in (own, last))
    lost = [before[seed] - after[seed] for seed in sorted(before.keys() & after.keys())]
    mean, _, high = interval(lost)
    return Cell(with_half(mean, high, scale), note=own.seeds if len(lost) < own.asked else "")


def _factors(results: Results, model: str, anchors: Anchors) -> Table:
    """The two factors of Table 11: a row for each state of the classifier, columns for frozen and trained norms."""
    study = results.study
    tasks = [task for task in study.tasks if any(cell.task == task for cell in results.cells)]
    found: dict[tuple[str, str], dict[tuple[str, bool], Measured]] = {}
    for cell in results.final():
        row = find_row(study, cell.row, model)
        if cell.model != model or row is None or not cell.method.startswith("loretta"):
            continue
        options = row.all_options
        head = options.get("train_head", LorettaConfig.train_head)
        norms = options.get("train_norms", LorettaConfig.train_norms)
        name = cell.label.partition(",")[0]
        found.setdefault((name, HEADS.get(head, head)), {})[cell.task, norms] = cell
    states = [(task, norms) for task in tasks for norms in (False, True)]
    return Table(
        title=f"Norms × classifier, {model}",
        stubs=("Method", "Classifier"),
        columns=[Column(task, "norms trained" if norms else "norms frozen") for task, norms in states],
        rows=[
            Row(heads=heads, cells=[measured(of.get(at), study.scale, anchors) for at in states])
            for heads, of in found.items()
        ],
    )


def _trains(results: Results, model: str, root: Path) -> Table:
    rows = []
    seen = set()
    for cell in results.final():
        if cell.model != model or cell.row in seen or not cell.scores or not cell.scores[0].folder:
            continue
        seen.add(cell.row)
        for train in RunRecord.load(root / cell.scores[0].folder / "run.json").trains:
            modes, ranks = (" × ".join(map(str, numbers)) for numbers in (train.modes, train.ranks))
            sizes = f"{train.in_features} × {train.out_features}"
            at, entries = f"{train.count} × {train.at}", f"{train.shape().n_params:,}"
            rows.append((cell.label, at, sizes, modes, ranks.replace(" × ", ", "), entries))
    names = ("where", "matrix", "modes", "ranks", "entries of one")
    return words_table(f"Tensor trains, {model}", "Method", names, rows)


def _tried(results: Results, root: Path) -> Table:
    is_scored = any(cell.split == "validation" for cell in results.cells)
    meaning = ": scores of that split favour what was chosen" if is_scored else "; the test split was not looked at"
    caption = f"Chosen on the validation split with one seed{meaning}."
    rows = []
    for (label, model, task), runs in grouped(results.planned, lambda run: (run.label, run.model, run.task)).items():
        if any(run.candidate for run in runs):
            first = runs[0].seed
            tried = [_one_try(results, root, run) for run in runs if run.seed == first]
            rows.append((label, model, task, "; ".join(tried)))
    names = ("model", "task", "learning rate and batch size: validation score")
    return words_table("Settings tried", "Method", names, rows, caption)


def _one_try(results: Results, root: Path, run: Planned) -> str:
    config = run.config or {}
    settings = f"{config.get('learning_rate')} and {config.get('batch_size')}"
    record = record_of(root, run)
    if record is None:
        return f"{settings}: " + (f"stopped, {run.stopped}" if run.stopped else "not finished")
    name = results.study.metrics.get(run.task, record.metric)
    # answers are generated for the test split alone, so the loss decides between settings
    name = name if name in record.validation else "loss"
    chosen = "" if run.candidate else ", chosen"
    return f"{settings}: {name} {number(record.validation.get(name)).text}{chosen}"


def _costs(results: Results, model: str, anchors: Anchors, looks: Mapping[str, Look]) -> Table:
    """Each quantity as measured and as printed, with its ratio to the first row: only ratios compare across steps."""
    study = results.study
    rows = by_row(cell for cell in results.cells if cell.model == model)
    quantities = [name for name in QUANTITIES if any(name in cells for cells in rows.values())]
    first = next(iter(rows.values()), {})
    base = next((cell.label for cell in first.values()), "")
    shown = []
    for (row, _), cells in rows.items():
        values = []
        for name in quantities:
            cell, reference = cells.get(name), first.get(name)
            printed = cell.printed if cell else None
            values += [
                measured(cell, study.scale, anchors)._replace(paper=""),
                _ratio(cell.mean if cell else None, reference.mean if reference else None),
                Cell(MISSING if printed is None else figure(printed)),
                _ratio(printed, reference.printed if reference else None),
            ]
        known = list(cells.values())
        shown.append(Row(heads=(known[0].label,), cells=[_parameters(known), *values], look=looks.get(row)))
    ratio = f"÷ that of {base}"
    models = printed_models(cell for cells in rows.values() for cell in cells.values())
    return Table(
        title=f"Cost of one training step, {model}",
        stubs=("Method",),
        columns=[
            Column("Trained", "parameters"),
            *(
                Column(QUANTITIES[name], column, hint)
                for name in quantities
                for column, hint in (("measured", ""), ("ratio", ratio), ("paper", ""), ("paper, ratio", ratio))
            ),
        ],
        rows=shown,
        caption=f"Ratios are to {base}." + (f" The paper's numbers are for {' and '.join(models)}." if models else ""),
    )


def _ratio(value: float | None, reference: float | None) -> Cell:
    return Cell(f"{value / reference:.3f}") if value is not None and reference else Cell(MISSING)


def _counts(results: Results, model: str, anchors: Anchors, looks: Mapping[str, Look]) -> Table:
    rows = by_row(cell for cell in results.cells if cell.model == model)
    values = {key: cells["bytes"].mean for key, cells in rows.items() if "bytes" in cells}
    smallest = min((value for value in values.values() if value), default=None)
    return Table(
        title=f"Bytes of the trained parameters, {model}",
        stubs=("Method",),
        columns=[
            Column("", "parameters"),
            Column("", "bytes", "as float32"),
            Column("", "size"),
            Column("", "÷ smallest"),
        ],
        rows=[
            Row(
                heads=(next(iter(cells.values())).label,),
                cells=[
                    *(_whole(cells.get(name), anchors) for name in ("parameters", "bytes")),
                    size(None if (value := values.get(key)) is None else round(value)),
                    _ratio(value, smallest),
                ],
                look=looks.get(key[0]),
            )
            for key, cells in rows.items()
        ],
    )


def _whole(cell: Measured | None, anchors: Anchors) -> Cell:
    if cell is None or cell.mean is None:
        return Cell(MISSING)
    return Cell(f"{cell.mean:,.0f}", anchor=anchors.get(key_of(cell), ""))
