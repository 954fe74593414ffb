"""``loretta report``."""

from pathlib import Path
from typing import Annotated

import typer

from loretta.cli.options import Json
from loretta.cli.output import answer
from loretta.errors import InputError


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
    as_json: Json = False,
) -> None:
    """Show what was run beside the paper's numbers: a page with tables, figures and the command for each number."""
    if as_json and (output is not None or form not in (None, "json")):
        raise InputError("--json prints the report as JSON: leave --output and --format out")
    from loretta.report.folder import SUFFIXES, report_on
    from loretta.report.page import save

    printed = output == Path("-")
    default = "json" if as_json else "html"
    form = form or (default if output is None or printed else SUFFIXES.get(output.suffix, default))
    content = report_on(runs, form)
    if printed or (output is None and form != "html"):
        answer(content)
        return
    file = output or Path("report.html")
    if not file.parent.is_dir():
        raise InputError(f"--output '{file}': there is no folder '{file.parent}'")
    save(content, file)
    typer.echo(f"written to {file}", err=True)
