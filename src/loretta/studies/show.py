"""Studies, estimates and run folders as tables for a terminal."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loretta.errors import InputError
from loretta.files import read_object
from loretta.record import RunRecord, is_started
from loretta.studies.state import State
from loretta.wording import MISSING, duration, flat, grouped, size_words, table_of

if TYPE_CHECKING:  # they import torch and SciPy, which a listing of runs does not need
    from rich.table import Table

    from loretta.studies.paired import Difference
    from loretta.studies.results import Cell, Results
    from loretta.studies.sizes import Estimate

# metric -> what a table calls the answer that needs no text, where it is not the majority class
WITHOUT_TEXT = {
    **dict.fromkeys(("mse", "spearman", "pearson"), "mean of train"),
    **dict.fromkeys(("perplexity", "loss", "rewards/accuracies"), "before training"),
    "micro_f1": "best one answer",
    "entity_f1": "commonest tag",
}


def _table(left: Sequence[str], right: Sequence[str], *, fold: bool = False, **options: Any) -> "Table":
    return table_of((*left, *right), left, fold=fold, caption_justify="left", **options)


def results_table(results: "Results") -> "Table":
    """A row for each model and method (and order of a sequence), a column for each number."""
    study = results.study
    cells = results.final()
    columns = list(dict.fromkeys(cell.task for cell in cells))
    left = ("model", "method", *(["order"] if study.sequence else []))
    table = _table(left, ("parameters", "bytes", *columns), title=study.title, caption=_caption(results))
    rows: dict[tuple, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.model, cell.row, cell.order), {})[cell.task] = cell
    for (model, _, order), by_task in rows.items():
        first = next(iter(by_task.values()))
        table.add_row(
            model,
            first.label,
            *([" > ".join(order)] if study.sequence else []),
            number(_known(by_task, "parameters")),
            number(_known(by_task, "adapter_bytes")),
            *(_score(by_task.get(name), study.scale) for name in columns),
        )
    return table


def compared_table(results: "Results") -> "Table":
    """A comparison: the answer that needs no text, then each method with its rate, its score per seed and the mean."""
    from loretta.studies.compare import baseline_of, ends_of

    cells = [cell for cell in results.final() if cell.task in results.study.tasks]
    seeds = sorted({score.seed for cell in cells for score in cell.scores})
    metric = next((cell.metric for cell in cells if cell.metric), "score")
    right = ("parameters", "bytes", "learning rate", *(f"seed {seed}" for seed in seeds), metric, "95% over seeds")
    table = _table(("method",), right, title=results.study.title, caption=_caption(results))
    baseline = baseline_of(results)
    if baseline is not None:
        name = WITHOUT_TEXT.get(metric, "majority class")
        table.add_row(name, "0", "", "", *([""] * len(seeds)), figure(baseline), "")
    for cell in cells:
        by_seed = {score.seed: score for score in cell.scores}
        rates = dict.fromkeys(f"{score.learning_rate:g}" for score in cell.scores if score.learning_rate is not None)
        table.add_row(
            cell.label,
            number(cell.parameters),
            number(cell.adapter_bytes),
            ", ".join(rates) or MISSING,
            *(figure(by_seed[seed].value) if seed in by_seed else MISSING for seed in seeds),
            MISSING if cell.mean is None else figure(cell.mean),
            ends_of(cell),
        )
    return table


def differences_table(pairs: Sequence["Difference"], labels: Mapping[str, str]) -> "Table":
    """The best method against each of the others, on the same rows."""
    right = ("difference", "95% interval", "better on", "rows")
    table = _table(("best", "minus"), right, title="Differences on the same rows")
    for pair in pairs:
        table.add_row(
            labels.get(pair.best, pair.best),
            labels.get(pair.other, pair.other),
            f"{pair.mean:+.4f}",
            f"{pair.low:+.4f} to {pair.high:+.4f}",
            f"{pair.better} of {pair.seeds} seeds",
            f"{pair.rows:,}",
        )
    return table


def _known(cells: Mapping[str, "Cell"], name: str) -> int | None:
    return next((value for cell in cells.values() if (value := getattr(cell, name)) is not None), None)


def _caption(results: "Results") -> str:
    splits = sorted({cell.split for cell in results.cells if cell.split})
    words = [f"scores are of the {' or '.join(splits)} split"] if splits else []
    if any(cell.low is not None for cell in results.cells) and results.study.view != "compare":
        words.append("± is half of Student's 95% interval over seeds")
    if models := printed_models(results.cells):
        words.append(f"in brackets what the paper prints for {' and '.join(models)}")
    return "; ".join(words)


def printed_models(cells: Iterable["Cell"]) -> list[str]:
    """The models that the printed numbers of these cells belong to."""
    return sorted({str(cell.printed_model) for cell in cells if cell.printed is not None})


def _score(cell: "Cell | None", scale: float) -> str:
    """Mean ± half of the interval, how many seeds it has where some are missing, and the printed number."""
    if cell is None:
        return ""
    words = with_half(cell.mean, cell.high, scale)
    if cell.finished < cell.asked:
        words += f" ({cell.seeds})"
    return words if cell.printed is None else f"{words} [{figure(cell.printed, scale)}]"


def with_half(mean: float | None, high: float | None, scale: float) -> str:
    """As "93.10 ± 0.42", or "93.10" where there is no interval."""
    if mean is None:
        return MISSING
    if not math.isfinite(mean):
        return "NaN"
    half = "" if high is None else f" ± {figure((high - mean) * scale, scale)}"
    return figure(mean * scale, scale) + half


def figure(value: float, scale: float = 1) -> str:
    """A score in percent with two decimals and a fraction with four; a large quantity in four figures."""
    if abs(value) > 100:
        return f"{value:.4g}" if abs(value) >= 1e9 else f"{value:,.0f}"
    return f"{value:.2f}" if scale == 100 else f"{value:.4f}"


def number(value: int | None) -> str:
    """An integer with separators."""
    return MISSING if value is None else f"{value:,}"


def estimate_table(
    estimates: Sequence["Estimate"], printed: Mapping[tuple[str, str], str | None], title: str
) -> "Table":
    """A row for each model and method of a dry run. ``printed`` is the paper's count by (model, row)."""
    right = ("runs", "parameters", "paper", "steps", "time", "memory")
    table = _table(("model", "method", "tasks"), right, title=title)
    for key, group in grouped(estimates, lambda estimate: (estimate.run.model, estimate.run.row)).items():
        sizes = sorted({estimate.size.trained for estimate in group if estimate.size})
        reason = next((estimate.reason for estimate in group if estimate.reason), "")
        counts = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "") if sizes else MISSING
        table.add_row(
            key[0],
            group[0].run.label + (f"\ncannot run: {reason}" if reason else ""),
            ", ".join(dict.fromkeys(estimate.run.task for estimate in group)),
            str(len(group)),
            counts,
            printed.get(key) or "",
            number(total(estimate.steps for estimate in group)),
            duration(total(estimate.seconds for estimate in group)),
            size_words(max((estimate.memory_bytes or 0 for estimate in group), default=0) or None),
        )
    return table


def total(values: Iterable[Any]) -> Any:
    """The sum of the values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def run_row(root: Path, folder: Path, state: State, reason: str) -> dict[str, Any]:
    """One run of a listing as plain data."""
    row: dict[str, Any] = {"run": str(folder.relative_to(root)), "state": state, "reason": reason}
    if state == "finished" and (folder / "run.json").is_file():
        try:
            record = RunRecord.load(folder / "run.json")
        except InputError as error:
            return row | {"state": "failed", "reason": str(error)}
        row |= {
            "method": record.method,
            "seed": record.seed,
            "learning_rate": record.learning_rate or record.config.get("learning_rate"),
            "metric": record.metric,
            "score": record.scores.get(record.metric),
            "parameters": record.parameters.trainable,
            "seconds": record.train_seconds,
        }
    return row


def next_command(root: Path, folder: Path, state: State) -> str | None:
    """The command that goes on with a run: that of the study that planned it, else its own.

    None while it runs, and where a search has stopped it.
    """
    if state in ("running", "stopped"):
        return None
    if state == "finished":
        kept = (folder / "run.json").is_file()
        return shlex.join(["loretta", "predict", str(folder)]) + " FILE" if kept else None
    for above in (root, *folder.parents):
        commands = [command for file in sorted(above.glob("study*.json")) for command in _commands(file, above, folder)]
        if commands:
            return commands[-1]
    if is_started(folder):
        return shlex.join(["loretta", "train", "--resume", str(folder)])
    return None


def _commands(file: Path, root: Path, folder: Path) -> list[str]:
    """The commands of the study in ``file``, as they were typed, where it planned the run."""
    content = read_object(file) or {}
    try:
        planned = {root / run["folder"] for run in content["planned"]}
        return list(content["commands"]) if folder in planned else []
    except (KeyError, TypeError):
        return []


def runs_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """A listing of runs."""
    table = _table(("run", "state"), ("score", "parameters", "seconds", "learning rate"), fold=True)
    for row in rows:
        score = f"{row['metric']} {row['score']:.4f}" if row.get("score") is not None else row["reason"] or MISSING
        rate = row.get("learning_rate")
        table.add_row(
            row["run"],
            row["state"],
            score,
            number(row.get("parameters")),
            f"{row['seconds']:.0f}" if "seconds" in row else MISSING,
            f"{rate:g}" if rate is not None else MISSING,
        )
    return table


def comparison_rows(records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """The options that differ between runs, then their results: a row for each, run -> value."""
    configs = {name: flat(record.config) for name, record in records.items()}
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    rows = []
    for key in keys:
        values = {name: config.get(key) for name, config in configs.items()}
        if key != "output" and any(value != next(iter(values.values())) for value in values.values()):
            rows.append({"what": key, **values})
    rows.append({"what": "trained parameters", **{n: record.parameters.trainable for n, record in records.items()}})
    rows.append({"what": "adapter bytes", **{n: record.adapter_bytes for n, record in records.items()}})
    rows.append({"what": "seconds", **{n: round(record.train_seconds, 1) for n, record in records.items()}})
    for split in ("validation", "test"):
        scores = {name: getattr(record, split) or {} for name, record in records.items()}
        metrics = dict.fromkeys(metric for values in scores.values() for metric in values)
        rows += [{"what": f"{split} {metric}", **{n: scores[n].get(metric) for n in scores}} for metric in metrics]
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "Table":
    """Runs side by side."""
    table = _table(("", *names), ())
    for row in rows:
        table.add_row(row["what"], *(_words(row[name]) for name in names))
    return table


def _words(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
