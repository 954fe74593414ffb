"""Training records -> one self-contained HTML page: a row per run, the curves, how to repeat it."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loretta.errors import InputError
from loretta.picture import train_svg
from loretta.training.record import RunRecord
from loretta.tt import TTShape

if TYPE_CHECKING:
    from markupsafe import Markup

MISSING = "–"
LONGEST_LEGEND_ENTRY = 30  # characters; what fits into FIGURE_WIDTH even when all of them are wide (Chinese)
FIGURE_WIDTH, AXES_HEIGHT, LEGEND_ROW = 4.6, 2.9, 0.19  # inches
UNDRAWABLE = 1e300  # as good as infinite: matplotlib's margins would overflow
MARKED_POINTS = 30  # a line of more points than this is drawn without markers

# Okabe and Ito's colour-blind safe palette without its yellow, which is too pale for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
# once the colours are used up: points drawn, points left out
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))


class Look(NamedTuple):
    """How one run is drawn, in its table row and in every chart."""

    colour: str
    dashes: tuple[float, ...]  # () is a solid line

    @classmethod
    def of(cls, index: int) -> "Look":
        return cls(COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)])


class Cell(NamedTuple):
    """A number as people read it, and in full for those who hover over it."""

    text: str
    exact: str = ""


class Column(NamedTuple):
    """One column of the table; neighbours of one group share a heading."""

    group: str
    name: str
    hint: str
    cell: Callable[[RunRecord], Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve. A NaN is a gap."""

    label: str
    look: Look
    steps: list[int]
    values: list[float]
    best_step: int | None = None  # where to put the ring; None for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    y_label: str
    lines: list[Line]
    note: str = ""


def render(records: Sequence[RunRecord], *, title: str | None = None, notes: Sequence[str] = ()) -> str:
    """The page as HTML text, without any outside resource. The same records give the same text.

    ``title`` is by default the task, the model and the methods; ``notes`` are sentences for the reader, one
    each. All text, theirs and the records', is shown literally: markup in it has no effect.

    Raises:
        InputError: no records.
    """
    if not records:
        raise InputError("a report needs at least one run, got none: give the folder of a finished run")
    from jinja2 import Environment, StrictUndefined

    labels = _labels(records)
    looks = [Look.of(index) for index in range(len(records))]
    columns, facts = _columns(records), _facts(records)
    charts = _charts(records, labels, looks)
    template = resources.files("loretta").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(template).render(
        title=title or " · ".join(facts[name] for name in ("Task", "Model", "Method")),
        facts=facts,
        notes=list(notes),
        columns=columns,
        groups=[(name, len(list(group))) for name, group in groupby(columns, key=lambda column: column.group)],
        rows=[
            {"label": label, "look": look, "cells": [column.cell(record) for column in columns]}
            for label, look, record in zip(labels, looks, records, strict=True)
        ],
        figures=[
            {"svg": _svg(chart, prefix=f"chart{number}-"), "note": _caption(chart)}
            for number, chart in enumerate(charts, start=1)
        ],
        trains=_trains(records, labels),
        runs=[
            (label, record, json.dumps(record.config, indent=2, ensure_ascii=False, default=str))
            for label, record in zip(labels, records, strict=True)
        ],
    )


def write(records: Sequence[RunRecord], path: Path, *, title: str | None = None, notes: Sequence[str] = ()) -> None:
    """Write :func:`render`'s page to ``path``, whole or not at all; an older file stays until it is replaced.

    Raises:
        InputError: no records.
        OSError: the folder does not exist or cannot be written to.
    """
    page = render(records, title=title, notes=notes)
    temporary = path.with_name(f".report-{os.getpid()}.tmp")
    try:
        # replace: half a surrogate pair in a config must not cost the user the page
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _trains(records: Sequence[RunRecord], labels: Sequence[str]) -> list[dict[str, Any]]:
    """A picture for each train of another shape, with the places that have it."""
    from markupsafe import Markup

    places: dict[TTShape, list[str]] = {}
    for label, record in zip(labels, records, strict=True):
        for train in record.trains:
            places.setdefault(train.shape(), []).append(f"{label}: {train.count} × {train.at}")
    # train_svg escapes what it is given
    return [{"at": "; ".join(at), "svg": Markup(train_svg(shape, at[0]))} for shape, at in places.items()]


def _columns(records: Sequence[RunRecord]) -> list[Column]:
    def score(split: str, name: str) -> Callable[[RunRecord], Cell]:
        return lambda record: _score(getattr(record, split) or {}, name)

    def count(kind: str) -> Callable[[RunRecord], Cell]:
        return lambda record: Cell(f"{getattr(record.parameters, kind):,}")

    chosen = [record.metric for record in records]
    validation = _metric_names(chosen, (record.validation for record in records))
    test = _metric_names(chosen, (record.test or {} for record in records))
    return [
        *(Column("Validation at the best step", name, "", score("validation", name)) for name in validation),
        *(Column("Test", name, "", score("test", name)) for name in test),
        *(
            Column("Trainable parameters", kind, hint, count(kind))
            for kind, hint in (
                ("cores", "entries of the tensor-train cores"),
                ("biases", ""),
                ("norms", "weights and biases of normalisation layers"),
                ("head", "the task's own output layer"),
                ("other", "what the method trains beside these"),
            )
        ),
        Column("Trainable parameters", "total", "", count("trainable")),
        Column("Trainable parameters", "of model", "share of all parameters of the model", _share),
        Column("Cost", "adapter", "size of the saved adapter on disk", lambda r: _size(r.adapter_bytes)),
        Column("Cost", "time (s)", "seconds of training", lambda r: _seconds(r.train_seconds)),
        Column("Cost", "peak memory", "above the process's start", lambda r: _size(r.peak_memory_bytes)),
        Column("Run", "best step", "the step whose adapter was kept", lambda r: Cell(f"{r.best_step:,}")),
        Column("Run", "seed", "", lambda r: Cell(str(r.seed))),
    ]


def _metric_names(chosen: Iterable[str], scores: Iterable[Mapping[str, float]]) -> list[str]:
    """The metrics that chose a checkpoint, then the others as they come, then the loss."""
    names = dict.fromkeys(chosen) | dict.fromkeys(name for values in scores for name in values)
    return sorted(names, key=lambda name: name == "loss")


def _score(values: Mapping[str, float], name: str) -> Cell:
    return _number(values[name]) if name in values else Cell(MISSING)


def _number(value: float | None) -> Cell:
    """Four decimals where these say enough. None, JSON's way to write NaN, is NaN."""
    if value is None or math.isnan(value):
        return Cell("NaN")
    if math.isinf(value):
        return Cell("∞" if value > 0 else "−∞")
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return Cell(f"{value:,.4f}" if plain else f"{value:.3e}", exact=repr(value))


def _seconds(value: float) -> Cell:
    return Cell(f"{value:,.1f}", exact=f"{value!r} s") if math.isfinite(value) else _number(value)


def _share(record: RunRecord) -> Cell:
    counts = record.parameters
    if not counts.total:
        return Cell(MISSING)
    percent = 100 * counts.trainable / counts.total
    return Cell(f"{percent:.3g}%", exact=f"{counts.trainable:,} of {counts.total:,}")


def _size(n_bytes: int) -> Cell:
    size, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(size, 1) < 1024:
            break
        size, unit = size / 1024, larger
    return Cell(f"{n_bytes} B" if unit == "B" else f"{size:.1f} {unit}", exact=f"{n_bytes:,} bytes")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _facts(records: Sequence[RunRecord]) -> dict[str, str]:
    def direction(record: RunRecord) -> str:
        return f"{record.metric} on validation, {'higher' if record.higher_is_better else 'lower'} is better"

    def sizes(record: RunRecord) -> str:
        return " + ".join(f"{count:,} {split}" for split, count in record.sizes.items())

    return {
        "Task": _listed(record.task for record in records),
        "Model": _listed(record.model for record in records),
        "Method": _listed(record.method for record in records),
        "Data": _listed(sizes(record) for record in records) or MISSING,
        "Device": _listed(record.device for record in records),
        "Best step by": _listed(direction(record) for record in records),
    }


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """One name per run: the method, and of all else only what tells this run from its namesakes."""
    parts = [[record.method] for record in records]
    for values in ([record.model for record in records], [record.task for record in records]):
        if len(set(values)) > 1:
            for part, value in zip(parts, values, strict=True):
                part.append(value)
    settings = [_flat(record.config) | {"seed": str(record.seed)} for record in records]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    # the folder last: it always differs, and tells the least
    for key in sorted(keys, key=lambda key: key == "output"):
        by_label: dict[str, list[int]] = {}
        for index, part in enumerate(parts):
            by_label.setdefault(" · ".join(part), []).append(index)
        for namesakes in by_label.values():
            if len({settings[index].get(key, MISSING) for index in namesakes}) > 1:
                for index in namesakes:
                    parts[index].append(f"{key.rpartition('.')[2]} {settings[index].get(key, MISSING)}")
    labels = [" · ".join(part) for part in parts]
    shared = Counter(labels)
    return [f"{label} · run {number}" if shared[label] > 1 else label for number, label in enumerate(labels, start=1)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, as text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def _charts(records: Sequence[RunRecord], labels: Sequence[str], looks: Sequence[Look]) -> list[Chart]:
    alone = len(records) == 1

    def lines(split: str, name: str) -> list[Line]:
        if alone:  # nothing to tell the run from, so the line says which data it is of
            label, look = ("training", Look.of(0)) if split == "train" else (split, Look.of(1))
            found = [_line(records[0], split, name, label, look)]
        else:
            runs = zip(records, labels, looks, strict=True)
            found = [_line(record, split, name, label, look) for record, label, look in runs]
        return [line for line in found if line.steps]

    training, validation = lines("train", "loss"), lines("validation", "loss")
    if alone:  # both losses in one picture: their distance is the message
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
    logged: list[float | None] = [point.values[name] for point in points]
    return Line(
        label=label,
        look=look,
        steps=[point.step for point in points],
        values=[math.nan if value is None or not abs(value) < UNDRAWABLE else value for value in logged],
        best_step=record.best_step if split == "validation" else None,
    )


def _caption(chart: Chart) -> str:
    points = [
        (step == line.best_step, not math.isnan(value))
        for line in chart.lines
        for step, value in zip(line.steps, line.values, strict=True)
    ]
    drawn = [is_drawn for _, is_drawn in points]
    sentences = [chart.note] if chart.note else []
    if (True, True) in points:
        sentences.append("Ring: the best step.")
    if not all(drawn):
        sentences.append(f"Not drawn: {drawn.count(False):,} of {len(drawn):,} values, NaN or infinite.")
    return " ".join(sentences)


def _short(name: str) -> str:
    """One printable line of at most LONGEST_LEGEND_ENTRY characters; the middle gives way."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(line) <= LONGEST_LEGEND_ENTRY:
        return line
    half = (LONGEST_LEGEND_ENTRY - 1) // 2
    return f"{line[:half]}…{line[-half:]}"


def _svg(chart: Chart, *, prefix: str) -> "Markup":
    """The chart as an inline SVG element whose ids all begin with ``prefix``."""
    import io
    import warnings

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    with matplotlib.rc_context(), warnings.catch_warnings():
        # the browser has the letters that matplotlib's own font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font|Matplotlib currently does not")
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "loretta",
                "text.parse_math": False,
                "font.size": 10,
                "axes.formatter.useoffset": False,
                "axes.edgecolor": "#777777",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "grid.color": "#e4e4e4",
            }
        )
        figure = Figure(figsize=(FIGURE_WIDTH, AXES_HEIGHT + LEGEND_ROW * len(chart.lines)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid()
        handles = [_draw(axes, line) for line in chart.lines]
        axes.set_title(_short(chart.title), loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("training step")
        axes.set_ylabel(_short(chart.y_label))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if all(math.isnan(value) for line in chart.lines for value in line.values):
            axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center")
            axes.set(xticks=[], yticks=[])
        legend = figure.legend(
            handles,
            ["run"] * len(handles),
            loc="outside lower left",
            frameon=False,
            fontsize=9.5,
            labelspacing=0.3,
            handlelength=2.6,
        )
        # set afterwards: as arguments, names with a leading underscore would be left out
        for text, line in zip(legend.get_texts(), chart.lines, strict=True):
            text.set_text(_short(line.label))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), prefix=prefix, name=f"{chart.title} by training step")


def _draw(axes: Any, line: Line) -> Any:
    (drawn,) = axes.plot(
        line.steps,
        line.values,
        color=line.look.colour,
        linestyle=(0, line.look.dashes) if line.look.dashes else "-",
        linewidth=1.5,
        marker="o",
        markersize=3.5,
        markevery=_marked(line.values),
    )
    if line.best_step in line.steps:
        value = line.values[line.steps.index(line.best_step)]
        axes.plot(line.best_step, value, "o", markersize=9, color=line.look.colour, fillstyle="none")
    return drawn


def _marked(values: Sequence[float]) -> list[int]:
    """The points that need a marker: all of a short line, else those that stand alone between gaps."""
    if len(values) <= MARKED_POINTS:
        return list(range(len(values)))
    gap = [True, *(math.isnan(value) for value in values), True]
    return [i for i in range(len(values)) if gap[i] and not gap[i + 1] and gap[i + 2]]


def _inline(document: bytes, *, prefix: str, name: str) -> "Markup":
    """An SVG file as an element of a page: ids are shared with the other figures, namespaces unknown."""
    from xml.etree import ElementTree

    from markupsafe import Markup

    svg = ElementTree.fromstring(document)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            value = prefix + value if key == "id" else value.replace("url(#", f"url(#{prefix}")
            if key.endswith("href"):
                value = value.replace("#", f"#{prefix}")
            element.set(key.rpartition("}")[2], value)
    for metadata in svg.findall("metadata"):
        svg.remove(metadata)
    del svg.attrib["width"], svg.attrib["height"]  # the page's style sheet decides
    svg.attrib |= {"role": "img", "aria-label": name}
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
