"""Commands of studies: ``loretta reproduce``, ``compare`` and ``runs``. Parse, call the library, print."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loretta.errors import InputError
from loretta.options import parse_option

if TYPE_CHECKING:
    from loretta.studies.execution import Outcome
    from loretta.studies.expansion import Options
    from loretta.studies.runner import Summary
    from loretta.studies.study import Study

app = typer.Typer(rich_markup_mode=None)
runs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the runs in a folder, at any time.")
app.add_typer(runs, name="runs")

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="Hub id, folder, or a model of the study. Repeatable.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="How many seeds, from 0 on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many rows of each split.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with the tasks' files, one folder a task.")]
Jobs = Annotated[
    int, typer.Option(min=0, help="Runs at once, each in a process, on the GPUs in turn; 0: in this process.")
]
Sweep = Annotated[
    bool,
    typer.Option("--sweep", help="Choose each method's learning rate on validation, with seed 0, from its grid."),
]
Rates = Annotated[str | None, typer.Option(help="Learning rates to sweep over in place of the grid: 1e-4,5e-4.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the runs with parameters, time and memory, and stop.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even where there is an accelerator.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value: an option of every run, or METHOD.key=value of a method. Repeatable."),
]


@app.command()
def reproduce(
    target: Annotated[str | None, typer.Argument(help="table1, figure4, ...; without it they are listed.")] = None,
    model: Models = None,
    tasks: Annotated[str | None, typer.Option(help="Some of the study's tasks: mrpc,rte.")] = None,
    methods: Annotated[str | None, typer.Option(help="Rows of the study or any method: loretta_adp,lora.")] = None,
    seeds: Seeds = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the runs; default: runs.")] = None,
    jobs: Jobs = 1,
    sweep: Sweep = False,
    batches: Annotated[bool, typer.Option("--sweep-batches", help="Sweep over the grid's batch sizes too.")] = False,
    rates: Rates = None,
    orders: Annotated[bool, typer.Option("--orders", help="Train a sequence (table4) in every order.")] = False,
    dry_run: DryRun = False,
    sets: Sets = None,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Run a table or figure of the paper: what is finished stays, what was stopped goes on."""
    from loretta.studies.expansion import Options
    from loretta.studies.study import load_study, study_names

    if target is None:
        studies = [load_study(name) for name in study_names()]
        if as_json:
            _print_json([{"target": study.name, "title": study.title, "source": study.source} for study in studies])
        else:
            typer.echo("\n".join(f"{study.name:<8}  {study.title}" for study in studies))
        return
    options = Options(
        models=tuple(model or ()),
        tasks=_words("--tasks", tasks),
        methods=_words("--methods", methods),
        seeds=seeds,
        limit=limit,
        data_dir=data_dir,
        sweep=sweep,
        rates=_rates(rates),
        batches=batches,
        orders=orders,
        cpu=cpu,
        sets=dict(parse_option(word) for word in sets or []),
    )
    _carry_out(load_study(target), options, output or Path("runs"), jobs=jobs, dry_run=dry_run, as_json=as_json)


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="CSV, TSV, JSONL or Parquet file, or a GLUE task.", show_default=False)],
    methods: Annotated[str, typer.Option(help="Methods of `loretta train`.")] = "lora,loretta_adp,loretta_rep,ia3",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the demo's encoder.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of the methods that have one: 2,5,10.")] = None,
    seeds: Seeds = 5,
    text: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column with the second text of a pair.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label.")] = None,
    kind: Annotated[str | None, typer.Option(help="classification, regression or language_modeling.")] = None,
    validation: Annotated[str | None, typer.Option(help="File to validate on; default: a part of the data.")] = None,
    test: Annotated[str | None, typer.Option(help="File to compare on; default: the validation split.")] = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs/compare"),
    jobs: Jobs = 1,
    sweep: Sweep = False,
    rates: Rates = None,
    dry_run: DryRun = False,
    sets: Sets = None,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Compare methods and sizes on your own data, over seeds, with an answer in words."""
    from loretta.cli.demo import encoder_folder
    from loretta.studies.compare import check_data, comparison
    from loretta.studies.expansion import Options

    files = {"validation": validation, "test": test}
    columns = {"text": text, "text_pair": text_pair, "label": label, "kind": kind, **files}
    try:
        numbers = [int(word) for word in _words("--ranks", ranks)]
    except ValueError:
        raise InputError(f"--ranks {ranks!r} is not a list of whole numbers: write 2,5,10") from None
    study = comparison(
        data,
        _words("--methods", methods),
        ranks=numbers,
        seeds=seeds or 5,
        settings={key: value for key, value in columns.items() if value is not None},
    )
    options = Options(
        models=(model or encoder_folder(),),
        seeds=seeds,
        limit=limit,
        data_dir=data_dir,
        sweep=sweep,
        rates=_rates(rates),
        cpu=cpu,
        sets=dict(parse_option(word) for word in sets or []),
    )
    check_data(study, options, output)
    _carry_out(study, options, output, jobs=jobs, dry_run=dry_run, as_json=as_json)


def _carry_out(study: "Study", options: "Options", root: Path, *, jobs: int, dry_run: bool, as_json: bool) -> None:
    if dry_run:
        _dry_run(study, options, root, as_json=as_json)
        return
    from loretta.studies.compare import verdict
    from loretta.studies.results import collect
    from loretta.studies.runner import run_study
    from loretta.studies.show import results_table

    try:
        with _progress() as watch:
            summary = run_study(study, options, root, jobs=jobs, command=_command(), watch=watch)
    except KeyboardInterrupt:
        typer.echo("loretta: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    results = collect(root, study.name)
    words = verdict(results).words if study.view == "compare" else None
    if as_json:
        content = {"outcomes": [dataclasses.asdict(outcome) for outcome in summary.outcomes], "notes": summary.notes}
        _print_json({**content, "verdict": words, "cells": [cell.model_dump(mode="json") for cell in results.cells]})
    else:
        _console().print(results_table(results))
        for note in dict.fromkeys([*study.notes, *summary.notes]):
            typer.echo(f"note: {note}")
        if words:
            typer.echo(words)
        typer.echo(_summary_words(summary))
        typer.echo(f"All of it, beside the paper's numbers: loretta report {shlex.quote(str(root))} -o report.html")
    if not summary.complete:
        raise typer.Exit(1)


def _dry_run(study: "Study", options: "Options", root: Path, *, as_json: bool) -> None:
    from loretta.studies.expansion import expand
    from loretta.studies.results import find_row
    from loretta.studies.show import duration, estimate_table, total
    from loretta.studies.sizes import estimate
    from loretta.studies.state import state_of

    expansion = expand(study, options, root)
    estimates, basis = estimate(root, expansion.runs)
    finished = sum(state_of(root, run)[0] == "finished" for run in expansion.runs)
    steps, seconds = (total(getattr(item, name) for item in estimates) for name in ("steps", "seconds"))
    if as_json:
        rows = [
            {
                **item.run.model_dump(mode="json"),
                "state": state_of(root, item.run)[0],
                "parameters": item.size.trained if item.size else None,
                **{key: getattr(item, key) for key in ("reason", "steps", "seconds", "memory_bytes")},
            }
            for item in estimates
        ]
        totals = {"runs": len(rows), "finished": finished, "steps": steps, "seconds": seconds}
        _print_json({"study": study.name, **totals, "rests_on": basis, "notes": expansion.notes, "planned": rows})
        return
    printed = {}
    for run in expansion.runs:
        row = find_row(study, run.row, run.model)
        # the paper's count is of the paper's model
        printed[run.model, run.row] = row.parameters if row and row.model == run.model else None
    _console().print(estimate_table(estimates, printed, f"{study.name}: {study.title}"))
    typer.echo(
        f"{len(expansion.runs)} runs ({finished} finished), {steps or 0:,} steps, about {duration(seconds)} one by one"
    )
    for note in (*basis, *expansion.notes):
        typer.echo(f"note: {note}")


def _summary_words(summary: "Summary") -> str:
    unfinished = [outcome for outcome in summary.outcomes if outcome.state != "finished"]
    lines = [f"{outcome.state}: {outcome.folder}: {outcome.reason}" for outcome in unfinished]
    return "\n".join([f"{len(summary.of('finished'))} of {len(summary.outcomes)} runs are finished", *lines])


@contextmanager
def _progress() -> Iterator[Any]:
    """What the runner tells as it goes, on standard error: a bar on a terminal, a line for each run elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("starting", total=None)

    def watch(folder: str, outcome: "Outcome | None", ended: int, total: int) -> None:
        bar.update(task, completed=ended, total=total, description=folder)
        if outcome is None:
            return
        words = f"[{ended}/{total}] {folder}: {outcome.state}"
        words += f", {outcome.seconds:.0f} s" if outcome.state == "finished" else f": {outcome.reason}"
        bar.console.print(words, markup=False)

    with bar:
        yield watch


@runs.command("ls")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List every run below a folder with its state and score."""
    from loretta.studies.show import run_row, runs_table
    from loretta.studies.state import find_runs

    rows = [run_row(folder, run, state, reason) for run, state, reason in find_runs(_existing(folder))]
    if as_json:
        _print_json(rows)
        return
    _console().print(runs_table(rows))
    states = [row["state"] for row in rows]
    typer.echo(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no runs")


@runs.command("show")
def show_run(run: Annotated[Path, typer.Argument(help="Folder of a run.")], as_json: Json = False) -> None:
    """Show one run: its state, options and scores."""
    from loretta.studies.show import comparison_rows, comparison_table
    from loretta.studies.state import folder_state, measured, result_of
    from loretta.training.record import RunRecord

    result = result_of(_existing(run))
    state, reason = folder_state(run, result)
    if state != "finished":
        content = {"run": str(run), "state": state, "reason": reason}
        _print_json(content) if as_json else typer.echo(f"{run}: {state}: {reason}")
        return
    if result != "run.json":
        values = {key: value for key, value in measured(run / result).items() if key != "config"}
        if as_json:
            _print_json({"run": str(run), "state": state, **values})
        else:
            typer.echo("\n".join(f"{key}: {value}" for key, value in values.items()))
        return
    record = RunRecord.load(run / "run.json")
    if as_json:
        _print_json({"run": str(run), "state": state, **record.model_dump(mode="json")})
        return
    _console().print(comparison_table(comparison_rows({str(run): record}), [str(run)]))
    given = {key: value for key, value in record.config.items() if value not in (None, {}, False)}
    typer.echo("options: " + ", ".join(f"{key}={value}" for key, value in given.items()))
    for note in record.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"command: {record.command}")


@runs.command("compare")
def compare_runs(
    run: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")], as_json: Json = False
) -> None:
    """Show what differs between runs, side by side."""
    from loretta.studies.show import comparison_rows, comparison_table
    from loretta.training.record import RunRecord

    records = {str(folder): RunRecord.load(_existing(folder) / "run.json") for folder in run}
    if len(records) < 2:
        raise InputError(f"`loretta runs compare` needs two runs, got {len(records)}: give another folder")
    rows = comparison_rows(records)
    _print_json(rows) if as_json else _console().print(comparison_table(rows, list(records)))


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}': give the --output of a study, or a run in it")
    return folder


def _words(option: str, given: str | None) -> tuple[str, ...]:
    words = tuple(word.strip() for word in (given or "").split(",") if word.strip())
    if given is not None and not words:
        raise InputError(f"{option} {given!r} names nothing: write words with commas between them, or leave it out")
    return words


def _rates(given: str | None) -> tuple[float, ...]:
    try:
        rates = tuple(float(word) for word in _words("--rates", given))
    except ValueError:
        raise InputError(f"--rates {given!r} is not a list of numbers: write 1e-4,5e-4") from None
    if any(rate <= 0 for rate in rates):
        raise InputError(f"--rates {given!r}: a learning rate must be above 0")
    return rates


def _command() -> str:
    return shlex.join(["loretta", *sys.argv[1:]])


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    # a table in a file or a pipe should not be cut to 80 columns
    return console if console.is_terminal else Console(highlight=False, width=200)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))
