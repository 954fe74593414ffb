"""``loretta train``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loretta import processes
from loretta.cli.options import Json, run_options
from loretta.cli.output import print_json, say, scores
from loretta.errors import InputError
from loretta.folders import no_folder
from loretta.record import is_started
from loretta.training.config import read_config
from loretta.training.folder import CONFIG


@run_options(but=["method_args"])
def train(
    run: Annotated[
        Path | None, typer.Argument(help="With --resume: the folder of the run to go on with.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options, or of the method's.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any of these options, or of the method's: tensor_rank=8. Repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last checkpoint: --resume RUN needs no more; --epochs may be raised."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train an adapter; write adapter/, run.json and report.html."""
    if run is not None:
        if not resume:
            raise InputError(f"'{run}': give --resume RUN to go on with a run, or -o {run} for a new one")
        if given["output"] not in (None, str(run)):
            raise InputError(f"'{run}' and --output {given['output']} both name the folder: leave one of them out")
        given["output"] = str(run)
        if not run.is_dir():
            raise InputError(f"{no_folder(run)}: `loretta runs ls` lists the runs")
        if not is_started(run):
            raise InputError(f"'{run}' holds no run to go on with: `loretta runs ls` lists them")
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if resume and config is None and given["output"] and is_started(Path(given["output"])):
        config = Path(given["output"]) / CONFIG  # the run's own options, where no others are given
    run_config = read_config(config, given, sets or [])
    from loretta import report
    from loretta.owned import write_listed
    from loretta.training.folder import REPORT
    from loretta.training.lines import last_lines
    from loretta.training.run import train as carry_out

    record = carry_out(run_config, resume=resume, overwrite=overwrite)
    if not processes.is_first():
        return
    page = run_config.folder / REPORT
    try:
        write_listed(page, report.render([record], notes=record.notes))
    except InputError as error:  # the run itself is whole
        say(f"loretta: {error}, for a page of this run", err=True)
    if as_json:
        print_json(record.model_dump())
        return
    for split, values in {"validation": record.validation, "test": record.test}.items():
        if values:
            say(f"{split}: {scores(values)}")
    for line in last_lines(record):
        say(line)
    say(
        f"{record.parameters.trainable:,} trained parameters, {record.adapter_bytes:,} bytes, "
        f"{record.train_seconds:.0f} s; see {page}"
    )
