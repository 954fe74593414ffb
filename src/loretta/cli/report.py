"""``loretta report``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from loretta.cli.options import Json
from loretta.cli.output import answer, say, writing_output
from loretta.errors import InputError
from loretta.owned import refuse_to_replace_file, write_listed


def report(
    runs: Annotated[Path, typer.Argument(help="Folder of a study, of runs, or of one run.", show_default=False)] = Path(
        "runs"
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; - or nothing: print all but HTML.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="html|md|csv|json|latex", help="Default: by the file's ending, or html."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier report though it was edited since.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what was run beside the paper's numbers: a page with tables, figures and the command for each number."""
    if as_json and (output is not None or form not in (None, "json")):
        raise InputError("--json prints the report as JSON: leave --output and --format out")
    from loretta.report.folder import SUFFIXES, report_on
    from loretta.training.folder import CONFIG, PREDICTIONS, RECORD

    printed = output == Path("-")
    default = "json" if as_json else "html"
    if form is None and not printed and output is not None and output.suffix not in ("", *SUFFIXES):
        raise InputError(
            f"--output '{output}' has the ending '{output.suffix}', which no report has: give one of "
            f"{', '.join(SUFFIXES)}, or --format"
        )
    form = form or (default if output is None or printed else SUFFIXES.get(output.suffix, default))
    if printed or (output is None and form != "html"):
        answer(report_on(runs, form))
        return
    given = output or Path("report.html")
    file = Path(os.path.realpath(given))  # a link goes on leading where it leads
    if not file.parent.is_dir():
        raise InputError(f"--output '{given}': there is no folder '{file.parent}'")
    if file.name in (CONFIG, RECORD, PREDICTIONS):
        raise InputError(f"--output '{given}' has the name of a file of a run: give another")
    if file.is_dir():
        raise InputError(f"--output '{given}' is a folder: give a file")
    refuse_to_replace_file(file, overwrite=overwrite)
    content = report_on(runs, form)
    with writing_output(given):
        write_listed(file, content, overwrite=overwrite)
    say(f"written to {given}", err=True)
