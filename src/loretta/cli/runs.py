"""``loretta runs ls | show | diff``: look at the runs in a folder, at any time."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loretta.cli.options import Command, Json
from loretta.cli.output import console, existing, print_json, say
from loretta.errors import InputError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the runs in a folder, at any time.")


@app.command("ls", cls=Command)
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path("runs"), as_json: Json = False
) -> None:
    """List every run below a folder with its state and score."""
    from loretta.studies.show import next_command, run_row, runs_table
    from loretta.studies.state import find_runs

    rows = [
        {**run_row(folder, run, state, reason), "next": next_command(folder, run, state)}
        for run, state, reason in find_runs(existing(folder))
    ]
    if as_json:
        print_json(rows)
        return
    console().print(runs_table(rows))
    states = [row["state"] for row in rows]
    say(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no runs")
    for command in dict.fromkeys(row["next"] for row in rows if row["state"] != "finished" and row["next"]):
        say(f"go on: {command}")


@app.command("show", cls=Command)
def show_run(run: Annotated[Path, typer.Argument(help="Folder of a run.")], as_json: Json = False) -> None:
    """Show one run: its state, options and scores."""
    from loretta.record import RunRecord, is_started
    from loretta.studies.show import comparison_rows, comparison_table, next_command
    from loretta.studies.state import folder_state, measured, result_of

    result = result_of(existing(run))
    state, reason = folder_state(run, result)
    command = next_command(run.parent, run, state)
    if state == "waiting" and not is_started(run):
        RunRecord.load(run / "run.json")  # says what the folder is
    if state != "finished":
        content = {"run": str(run), "state": state, "reason": reason, "next": command}
        print_json(content) if as_json else say(f"{run}: {state}: {reason}")
        if command and not as_json:
            say(f"go on: {command}")
        return
    if result != "run.json":
        values = {key: value for key, value in measured(run / result).items() if key != "config"}
        if as_json:
            print_json({"run": str(run), "state": state, **values})
        else:
            say("\n".join(f"{key}: {value}" for key, value in values.items()))
        return
    record = RunRecord.load(run / "run.json")
    if as_json:
        print_json({"run": str(run), "state": state, **record.model_dump(mode="json")})
        return
    console().print(comparison_table(comparison_rows({str(run): record}), [str(run)]))
    given = {key: value for key, value in record.config.items() if value not in (None, {}, False)}
    say("options: " + ", ".join(f"{key}={value}" for key, value in given.items()))
    for note in record.notes:
        say(f"note: {note}")
    say(f"command: {record.command}")
    if command:
        say(f"use: {command}")
    again = ["loretta", "train", "--config", str(run / "config.json"), "-o", f"{run}-again"]
    say(f"again: {shlex.join(again)}")


@app.command("diff", cls=Command)
def diff_runs(
    run: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")], as_json: Json = False
) -> None:
    """Show what differs between runs, side by side."""
    from loretta.record import RunRecord
    from loretta.studies.show import comparison_rows, comparison_table

    records = {str(folder): RunRecord.load(existing(folder) / "run.json") for folder in run}
    if len(records) < 2:
        raise InputError(f"`loretta runs diff` needs two runs, got {len(records)}: give another folder")
    rows = comparison_rows(records)
    print_json(rows) if as_json else console().print(comparison_table(rows, list(records)))
