"""``loretta train``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli.options import Json, run_options
from loretta.cli.output import print_json, say, scores
from loretta.errors import InputError
from loretta.training.config import read_config
from loretta.training.folder import CONFIG


@run_options(but=["method_args"])
def train(
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
        typer.Option("--resume", help="Go on from the last checkpoint in the folder: --resume -o RUN needs no more."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train an adapter; write adapter/, run.json and report.html."""
    if resume and config is None and given["output"] and (begun := Path(given["output"]) / CONFIG).is_file():
        config = begun  # the run's own options, where no others are given
    run_config = read_config(config, given, sets or [])
    from loretta import report
    from loretta.owned import write_listed
    from loretta.training.folder import REPORT
    from loretta.training.run import train as run

    record = run(run_config, resume=resume, overwrite=overwrite)
    page = run_config.folder / REPORT
    try:
        write_listed(page, report.render([record], notes=record.notes).encode("utf-8", errors="replace"))
    except InputError as error:  # the run itself is whole
        say(f"loretta: {error}, for a page of this run", err=True)
    if as_json:
        print_json(record.model_dump())
        return
    for split, values in {"validation": record.validation, "test": record.test}.items():
        if values:
            say(f"{split}: {scores(values)}")
    say(
        f"{record.parameters.trainable:,} trained parameters, {record.adapter_bytes:,} bytes, "
        f"{record.train_seconds:.0f} s; see {page}"
    )
