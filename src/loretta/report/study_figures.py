"""The results of a study -> its charts."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from loretta.report.figures import QUIET, Bar, Bars, Chart, Line, Look, drawable
from loretta.report.study_tables import QUANTITIES, by_row, record_of
from loretta.report.tables import size
from loretta.studies.results import AVERAGE, Cell, Results
from loretta.studies.show import figure
from loretta.tasks.metrics import metric_range
from loretta.tuners.config import LorettaConfig
from loretta.wording import grouped

SMOOTHED = 20  # evaluations in a smoothing window, as in the paper's Figure 4
PARAMETERS = "trained parameters"
HOLLOW = "Hollow: the paper."
FRONT_NAME = "Pareto front"
FRONT = "Dashed: the Pareto front of what was measured; nothing smaller than a point of it scores as well."


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Charts under one heading, ``opened`` or to be unfolded."""

    title: str
    charts: Sequence[Chart | Bars]
    opened: bool = True


def figures_of(results: Results, root: Path, looks: Mapping[str, Look]) -> list[Group]:
    """Every figure of the study's view, the main ones first."""
    view = results.study.view
    groups = []
    if view in ("scores", "pareto", "norms", "compare"):
        groups += _against_parameters(results, looks)
    elif view == "ranks":
        groups.append(Group(title="Score against the tensor rank", charts=_ranks(results)))
    elif view == "shapes":
        groups.append(Group(title="Score against the shape", charts=_shapes(results)))
    elif view == "sequence":
        groups.append(Group(title="What is forgotten, step by step", charts=_steps(results, looks)))
    elif view == "cost":
        groups.append(Group(title="Cost of one training step", charts=_bars(results, looks, QUANTITIES)))
    elif view == "bytes":
        charts = _bars(results, looks, {"bytes": "bytes as float32"})
        groups.append(Group(title="Bytes of the trained parameters", charts=charts))
    if results.study.kind == "train":
        title = "Validation loss during training"
        groups.append(Group(title=title, charts=_curves(results, root, looks), opened=view == "curves"))
    return [group for group in groups if group.charts]


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(cell.model for cell in results.cells))


def _titled(results: Results, model: str, words: str) -> str:
    return f"{words}, {model}" if len(_models(results)) > 1 else words


def _against_parameters(results: Results, looks: Mapping[str, Look]) -> list[Group]:
    tasks = list(dict.fromkeys(cell.task for cell in results.final() if cell.mean is not None))
    tasks.sort(key=lambda task: task != AVERAGE)
    title = "Score against trained parameters"
    # the average says most of it, unless these charts are what the study is about
    first = len(tasks) if results.study.view == "pareto" or AVERAGE not in tasks else 1
    return [
        Group(title=title, charts=_scatters(results, tasks[:first], looks)),
        Group(title=f"{title}, each task", charts=_scatters(results, tasks[first:], looks), opened=False),
    ]


def _scatters(results: Results, tasks: Iterable[str], looks: Mapping[str, Look]) -> list[Chart]:
    charts = []
    for task, cells in _of_tasks(results, tasks):
        if lines := _scatter(cells, results.study.scale, looks):
            better = all(cell.higher_is_better for cell in cells if cell.mean is not None)
            notes = ["" if better else "Lower is better.", FRONT if lines[-1].label == FRONT_NAME else ""]
            charts.append(_chart(results, task, cells, lines, *notes, x_label=PARAMETERS, x_scale="log"))
    return charts


def _chart(results: Results, words: str, cells: Sequence[Cell], lines: Sequence[Line], *notes: str, **x: Any) -> Chart:
    """A chart of scores, all of one model and metric. ``x`` are the options of its x axis."""
    metric = next((cell.metric for cell in cells if cell.mean is not None), "")
    scale = results.study.scale
    return Chart(
        title=_titled(results, cells[0].model, words),
        y_label=f"{metric} × {scale:g}" if scale != 1 else metric,
        lines=lines,
        note=" ".join(filter(None, [_note(cells, lines), *notes])),
        **x,
    )


def _scatter(cells: Sequence[Cell], scale: float, looks: Mapping[str, Look]) -> list[Line]:
    """A point with its interval for each method, the paper's points of the same model, and the front."""
    points = [cell for cell in cells if cell.parameters and cell.mean is not None and math.isfinite(cell.mean)]
    if not points:
        return []
    lines = [_line(cell.label, looks[cell.row], [(float(cell.parameters or 0), cell)], scale) for cell in points]
    for cell in cells:
        counted = count_of(cell.printed_parameters)
        if counted is not None:
            # a row without a point of ours is in the legend by its printed one
            lines += _printed(f"{cell.label}, paper", looks[cell.row], [(counted, cell)], in_legend=cell not in points)
    on_front = pareto([(cell.parameters or 0, cell.mean or 0.0) for cell in points], higher=points[0].higher_is_better)
    if len(on_front) > 1:
        corners = [points[k] for k in on_front]
        x = [float(cell.parameters or 0) for cell in corners]
        y = [scale * (cell.mean or 0.0) for cell in corners]
        lines.append(Line(label=FRONT_NAME, look=QUIET, x=x, y=y, marked=False))
    return lines


def pareto(points: Sequence[tuple[float, float]], *, higher: bool = True) -> list[int]:
    """Indices of the (cost, score) points that score better than every cheaper or equally cheap one, by rising cost."""
    sign = 1 if higher else -1
    front: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: (points[k][0], -sign * points[k][1])):
        if not front or sign * points[k][1] > sign * points[front[-1]][1]:
            front.append(k)
    return front


def count_of(printed: str | None) -> float | None:
    """The paper's "0.10M" as a number; None for words that are no such count."""
    try:
        return None if not printed else float(printed[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[printed[-1]]
    except (KeyError, ValueError):
        return None


def _line(label: str, look: Look, points: Sequence[tuple[float, Cell]], scale: float, *, joined: bool = False) -> Line:
    def scaled(values: Iterable[float | None]) -> list[float]:
        return [math.nan if value is None else drawable(scale * value) for value in values]

    cells = [cell for _, cell in points]
    ends = [_drawn_interval(cell) for cell in cells]
    return Line(
        label=label,
        look=look,
        x=[x for x, _ in points],
        y=scaled(cell.mean for cell in cells),
        low=scaled(low for low, _ in ends),
        high=scaled(high for _, high in ends),
        joined=joined,
    )


def _drawn_interval(cell: Cell) -> tuple[float | None, float | None]:
    """The interval within the metric's range: Student's of two seeds reaches far beyond and would flatten the chart."""
    least, most = (-1.0, 1.0) if cell.metric == AVERAGE else metric_range(cell.metric)
    return None if cell.low is None else max(cell.low, least), None if cell.high is None else min(cell.high, most)


def _printed(
    label: str, look: Look, points: Sequence[tuple[float, Cell]], *, joined: bool = False, in_legend: bool = False
) -> list[Line]:
    """The line of what the paper prints for cells of its own model, at their x; none where it prints nothing."""
    known = [(x, cell.printed) for x, cell in points if cell.printed is not None and cell.printed_model == cell.model]
    if not known:
        return []
    x, y = zip(*known, strict=True)
    return [Line(label=label, look=look, x=x, y=y, joined=joined, hollow=True, in_legend=in_legend)]


def _of_tasks(results: Results, tasks: Iterable[str]) -> Iterable[tuple[str, list[Cell]]]:
    """Each task with its cells, once for each model that has scores of it."""
    for model in _models(results):
        for task in tasks:
            cells = [cell for cell in results.final() if (cell.model, cell.task) == (model, task)]
            if any(cell.mean is not None for cell in cells):
                yield task, cells


def _note(cells: Iterable[Cell], lines: Iterable[Line]) -> str:
    known = [cell for cell in cells if cell.low is not None]
    bars = "Bars: 95% interval over seeds" if known else "One seed each, so no intervals"
    if any(_drawn_interval(cell) != (cell.low, cell.high) for cell in known):
        bars += ", cut off where no score can be"
    return f"{bars}. {HOLLOW}" if any(line.hollow for line in lines) else f"{bars}."


def _ranks(results: Results) -> list[Chart]:
    ranks = _rank_of_rows(results)
    charts = []
    for task, cells in _of_tasks(results, results.study.tasks):
        methods = grouped((cell for cell in cells if cell.row in ranks), lambda cell: cell.method)
        lines = []
        for k, of_method in enumerate(methods.values()):
            points = sorted(((float(ranks[cell.row]), cell) for cell in of_method), key=lambda point: point[0])
            name = points[0][1].label.partition(",")[0]
            lines.append(_line(name, Look.of(k), points, results.study.scale, joined=True))
            lines += _printed(f"{name}, paper", Look.of(k), points, joined=True)
        if lines:
            ticks = {float(rank): str(rank) for rank in sorted(set(ranks.values()))}
            charts.append(_chart(results, task, cells, lines, x_label="tensor rank", x_scale="log", ticks=ticks))
    return charts


def _rank_of_rows(results: Results) -> dict[str, int]:
    ranks = {}
    for run in results.planned:
        options = (run.config or {}).get("method_args", {})
        default = LorettaConfig.tensor_rank if run.method.startswith("loretta") else options.get("r")
        if run.config is not None and (rank := options.get("tensor_rank", default)) is not None:
            ranks[run.row] = int(rank)
    return ranks


def _shapes(results: Results) -> list[Chart]:
    charts = []
    for task, cells in _of_tasks(results, results.study.tasks):
        labels = [cell.label for cell in cells]
        # the part that tells "LoRETTA adp, 5 modes" from "LoRETTA adp, 3 modes"
        tails = {label.rpartition(", ")[2] for label in labels}
        short = [label.rpartition(", ")[2] if len(tails) == len(labels) else label for label in labels]
        places = {float(k): label for k, label in enumerate(short)}
        points = list(zip(places, cells, strict=True))
        measured = _line("measured", Look.of(0), points, results.study.scale)
        lines = [measured, *_printed("paper", Look.of(0), points)]
        charts.append(_chart(results, task, cells, lines, x_label="shape", ticks=places))
    return charts


def _steps(results: Results, looks: Mapping[str, Look]) -> list[Chart]:
    found: dict[tuple[str, tuple[str, ...], str], dict[str, list[tuple[float, Cell]]]] = {}
    for cell in results.cells:
        if cell.stage is not None and cell.mean is not None and cell.task != AVERAGE:
            rows = found.setdefault((cell.model, cell.order, cell.task), {})
            rows.setdefault(cell.row, []).append((float(cell.stage), cell))
    orders = {order for _, order, _ in found}
    charts = []
    for (_, order, task), rows in found.items():
        lines = []
        for row, points in rows.items():
            points.sort(key=lambda point: point[0])
            lines.append(_line(points[0][1].label, looks[row], points, results.study.scale, joined=True))
        cells = [cell for points in rows.values() for _, cell in points]
        words = f"{task} in {' → '.join(order)}" if len(orders) > 1 else task
        ticks = {float(k): name for k, name in enumerate(order, start=1)}
        charts.append(_chart(results, words, cells, lines, x_label="last task trained", ticks=ticks))
    return charts


def _bars(results: Results, looks: Mapping[str, Look], quantities: Mapping[str, str]) -> list[Bars]:
    charts = []
    for model in _models(results):
        rows = by_row(cell for cell in results.cells if cell.model == model)
        for name, words in quantities.items():
            bars = [
                Bar(cells[name].label, looks[row], value, size(round(value)).text if name == "bytes" else figure(value))
                for (row, _), cells in rows.items()
                if name in cells and (value := cells[name].mean) is not None
            ]
            if bars:
                charts.append(Bars(title=_titled(results, model, words), bars=bars))
    return charts


def _curves(results: Results, root: Path, looks: Mapping[str, Look]) -> list[Chart]:
    found: dict[tuple[str, str], dict[str, list[list[tuple[int, float]]]]] = {}
    labels = {}
    for run in results.planned:
        record = record_of(root, run) if run.kind == "train" and not run.candidate else None
        if record is not None:
            points = [p for p in record.history if p.split == "validation" and "loss" in p.values]
            losses = [(p.step, drawable(p.values["loss"])) for p in points]
            rows = found.setdefault((run.model, run.task), {})
            rows.setdefault(run.row, []).append([(step, loss) for step, loss in losses if not math.isnan(loss)])
            labels[run.row] = run.label
    charts = []
    for (model, task), rows in found.items():
        curves = {row: smooth(seeds) for row, seeds in rows.items()}
        lines = [
            Line(
                label=labels[row],
                look=looks[row],
                x=[step for step, _, _ in curve],
                y=[mean for _, mean, _ in curve],
                low=[mean - spread for _, mean, spread in curve],
                high=[mean + spread for _, mean, spread in curve],
                band=True,
            )
            for row, (curve, _) in curves.items()
            if curve
        ]
        windows = {window for _, window in curves.values()}
        if lines:
            note = f"Line and band: mean and standard deviation of all seeds over {_span(windows)}."
            charts.append(Chart(title=_titled(results, model, task), y_label="validation loss", lines=lines, note=note))
    return charts


def _span(windows: set[int]) -> str:
    if windows == {1}:
        return "each evaluation, too few to smooth"
    return f"{' to '.join(map(str, sorted({min(windows), max(windows)})))} neighbouring evaluations"


def smooth(seeds: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[tuple[int, float, float]], int]:
    """Average the curves of all seeds, (step, value), in a window around each step.

    The window holds 20 evaluations, or a tenth of them where there are fewer than 200, so that a short curve keeps its
    shape. Returns (step, mean, standard deviation) for each step, and the width of the window.
    """
    by_step = grouped(chain(*seeds), lambda point: point[0])
    steps = sorted(by_step)
    window = min(SMOOTHED, max(1, math.ceil(len(steps) / 10)))
    smoothed = []
    for k, step in enumerate(steps):
        around = steps[max(0, k - window // 2) : k + (window + 1) // 2]
        values = [value for near in around for _, value in by_step[near]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        smoothed.append((step, statistics.fmean(values), spread))
    return smoothed, window
