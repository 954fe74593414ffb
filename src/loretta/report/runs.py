"""Training records -> one self-contained HTML page: a row per run, the curves, how to repeat it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loretta.errors import InputError
from loretta.plan import train_svg
from loretta.record import KINDS, RunRecord
from loretta.report import page, tables
from loretta.report.figures import Chart, Line, Look, drawable
from loretta.report.tables import Cell, Column, Row, Table
from loretta.tt import TTShape
from loretta.wording import MISSING, distinct, flat, grouped


def render(records: Sequence[RunRecord], *, title: str | None = None, notes: Sequence[str] = ()) -> str:
    """The page as HTML text, which needs no other file. The same records give the same text.

    ``title`` is by default the task, the model and the methods; ``notes`` are sentences for the reader. All text is
    shown literally: markup in it has no effect.
    """
    labels = labels_of(records)
    looks = [Look.of(index) for index in range(len(records))]
    return page.render(
        "runs.html.j2",
        title=title or title_of(records),
        facts=facts_of(records),
        notes=list(notes),
        table=table_of(records),
        figures=page.drawn(_charts(records, labels, looks), prefix="chart"),
        answers=answer_tables(records[0]) if len(records) == 1 else [],
        trains=_trains(records, labels),
        runs=[
            (label, record, json.dumps(record.config, indent=2, ensure_ascii=False, default=str))
            for label, record in zip(labels, records, strict=True)
        ],
    )


def title_of(records: Sequence[RunRecord]) -> str:
    """The task, the model and the methods."""
    facts = facts_of(records)
    return " · ".join(facts[name] for name in ("Task", "Model", "Method"))


def table_of(records: Sequence[RunRecord]) -> Table:
    """A row per run: scores, trained parameters, cost. Raises InputError for no records."""
    if not records:
        raise InputError("a report needs at least one run, got none: give the folder of a finished run")
    filled = _columns(records)
    return Table(
        title="Results",
        stubs=("Method",),
        columns=[column for column, _ in filled],
        rows=[
            Row(heads=(label,), cells=[cell(record) for _, cell in filled], look=Look.of(index))
            for index, (label, record) in enumerate(zip(labels_of(records), records, strict=True))
        ],
    )


def answer_tables(record: RunRecord) -> list[Table]:
    """Up to three tables on a run's answers: the rows of each class, the confusion matrix, the worst mistakes."""
    tables_of = []
    if record.label_counts:
        splits = list(record.label_counts)
        rows = [
            Row(heads=(name,), cells=[tables.count(record.label_counts[split][k]) for split in splits])
            for k, name in enumerate(record.label_names)
        ]
        columns = [Column("Rows", split) for split in splits]
        tables_of.append(Table(title="Classes", stubs=("Class",), columns=columns, rows=rows))
    answers = record.answers
    if answers is None:
        return tables_of
    if answers.confusion:
        largest = max(max(row) for row in answers.confusion) or 1
        rows = [
            Row(heads=(name,), cells=[Cell(f"{n:,}", shade=n / largest) for n in counts])
            for name, counts in zip(record.label_names, answers.confusion, strict=True)
        ]
        scores = ", ".join(f"{name} {value:.4f}" for name, value in answers.baseline.items())
        title, caption = f"Confusion matrix ({answers.split})", f"For comparison: {answers.constant} scores {scores}."
        columns = [Column("Answer", name) for name in record.label_names]
        tables_of.append(Table(title=title, stubs=("Class",), columns=columns, rows=rows, caption=caption))
    if answers.mistakes:
        size = {"regression": "distance", "token_classification": "share wrong"}.get(record.kind, "probability")
        words = [(each.text, each.gold, each.answer, f"{each.size:.4f}") for each in answers.mistakes]
        title = f"Worst mistakes ({answers.split})"
        tables_of.append(tables.words_table(title, "Text", ("right answer", "answer", size), words))
    return tables_of


def _trains(records: Sequence[RunRecord], labels: Sequence[str]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    places: dict[TTShape, list[str]] = {}
    for label, record in zip(labels, records, strict=True):
        for train in record.trains:
            places.setdefault(train.shape(), []).append(f"{label}: {train.count} × {train.at}")
    # train_svg escapes its title
    return [{"at": "; ".join(at), "svg": Markup(train_svg(shape, at[0]))} for shape, at in places.items()]


def _columns(records: Sequence[RunRecord]) -> list[tuple[Column, Callable[[RunRecord], Cell]]]:
    def score(split: str, name: str) -> Callable[[RunRecord], Cell]:
        return lambda record: _score(getattr(record, split) or {}, name)

    def parameters(kind: str) -> Callable[[RunRecord], Cell]:
        return lambda record: tables.count(getattr(record.parameters, kind))

    chosen = [record.metric for record in records]
    validation = _metric_names(chosen, (record.validation for record in records))
    test = _metric_names(chosen, (record.test or {} for record in records))
    return [
        *((Column("Validation at the best step", name), score("validation", name)) for name in validation),
        *((Column("Test", name), score("test", name)) for name in test),
        *((Column("Trainable parameters", kind, hint), parameters(kind)) for kind, hint in KINDS.items()),
        (Column("Trainable parameters", "total"), parameters("trainable")),
        (Column("Trainable parameters", "of model", "share of all parameters of the model"), _share),
        (Column("Cost", "adapter", "size of the saved adapter on disk"), lambda r: tables.size(r.adapter_bytes)),
        (Column("Cost", "time (s)", "seconds of training"), lambda r: tables.seconds(r.train_seconds)),
        # 0 means unknown: on a CPU the peak is the whole process's, and an earlier run of it took more
        (
            Column("Cost", "peak memory", "above the process's start"),
            lambda r: tables.size(r.peak_memory_bytes or None),
        ),
        (Column("Run", "best step", "the step whose adapter was kept"), lambda r: tables.count(r.best_step)),
        (Column("Run", "seed"), lambda r: Cell(str(r.seed))),
    ]


def _metric_names(chosen: Iterable[str], scores: Iterable[Mapping[str, float]]) -> list[str]:
    """The metrics that chose a checkpoint, then the others in order of appearance, then the loss."""
    names = dict.fromkeys(chosen) | dict.fromkeys(name for values in scores for name in values)
    return sorted(names, key=lambda name: name == "loss")


def _score(values: Mapping[str, float], name: str) -> Cell:
    return tables.number(values[name]) if name in values else Cell(MISSING)


def _share(record: RunRecord) -> Cell:
    counts = record.parameters
    if not counts.total:
        return Cell(MISSING)
    percent = 100 * counts.trainable / counts.total
    return Cell(f"{percent:.3g}%", exact=f"{counts.trainable:,} of {counts.total:,}")


def facts_of(records: Sequence[RunRecord]) -> dict[str, str]:
    """What was run on what, for the top of a page: heading -> words."""

    def direction(record: RunRecord) -> str:
        name = "loss" if record.selected_by == "loss" else record.metric
        higher = record.higher_is_better and name != "loss"
        return f"{name} on validation, {'higher' if higher else 'lower'} is better"

    def sizes(record: RunRecord) -> str:
        return " + ".join(f"{count:,} {split}" for split, count in record.sizes.items())

    return {
        "Task": distinct(record.task for record in records),
        "Model": distinct(record.model for record in records),
        "Method": distinct(record.method for record in records),
        "Data": distinct(sizes(record) for record in records) or MISSING,
        "Device": distinct(record.device for record in records),
        "Best step by": distinct(direction(record) for record in records),
    }


def labels_of(records: Sequence[RunRecord]) -> list[str]:
    """One name per run: the method, and those of its settings that tell it from other runs of that name."""
    parts = [[record.method] for record in records]
    for values in ([record.model for record in records], [record.task for record in records]):
        if len(set(values)) > 1:
            for part, value in zip(parts, values, strict=True):
                part.append(value)
    settings = [
        {key: str(value) for key, value in (flat(record.config) | {"seed": record.seed}).items()} for record in records
    ]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    # the folder comes last: it always differs and says the least
    for key in sorted(keys, key=lambda key: key == "output"):
        for namesakes in grouped(range(len(parts)), lambda index: " · ".join(parts[index])).values():
            if len({settings[index].get(key, MISSING) for index in namesakes}) > 1:
                for index in namesakes:
                    parts[index].append(f"{key.rpartition('.')[2]} {settings[index].get(key, MISSING)}")
    labels = [" · ".join(part) for part in parts]
    shared = Counter(labels)
    return [f"{label} · run {number}" if shared[label] > 1 else label for number, label in enumerate(labels, start=1)]


def _charts(records: Sequence[RunRecord], labels: Sequence[str], looks: Sequence[Look]) -> list[Chart]:
    alone = len(records) == 1

    def lines(split: str, name: str) -> list[Line]:
        if alone:  # there is no other run, so the label says which data the line is of
            label, look = ("training", Look.of(0)) if split == "train" else (split, Look.of(1))
            found = [_line(records[0], split, name, label, look)]
        else:
            runs = zip(records, labels, looks, strict=True)
            found = [_line(record, split, name, label, look) for record, label, look in runs]
        return [line for line in found if line.x]

    training, validation = lines("train", "loss"), lines("validation", "loss")
    if alone:  # both losses in one chart, where the distance between them shows
        charts = [Chart(title="Loss", y_label="loss", lines=training + validation)]
    else:
        charts = [
            Chart(title="Training loss", y_label="loss on training data", lines=training),
            Chart(title="Validation loss", y_label="loss on validation data", lines=validation),
        ]
    better = {r.metric: f"{'Higher' if r.higher_is_better else 'Lower'} is better." for r in records}
    logged = (point.values for r in records for point in r.history if point.split == "validation")
    for name in _metric_names((), logged):
        if name != "loss":
            drawn, note = lines("validation", name), better.get(name, "")
            charts.append(Chart(title=f"Validation {name}", y_label=name, lines=drawn, note=note))
    return [chart for chart in charts if chart.lines]


def _line(record: RunRecord, split: str, name: str, label: str, look: Look) -> Line:
    points = [point for point in record.history if point.split == split and name in point.values]
    return Line(
        label=label,
        look=look,
        x=[point.step for point in points],
        y=[drawable(point.values[name]) for point in points],
        ring_at=record.best_step if split == "validation" else None,
    )
