"""The command line: ``loretta VERB``. Each verb has a file, and three steps: parse, call the library, print.

What a verb does is imported when it runs, so that ``--help``, a typo and shell completion answer at once.
"""

import errno
import sys
from typing import Annotated

import typer

import loretta
from loretta import processes
from loretta.cli import runs
from loretta.cli.chat import chat
from loretta.cli.compare import compare
from loretta.cli.compress import compress
from loretta.cli.demo import demo
from loretta.cli.eval import evaluate
from loretta.cli.exec import AS_GIVEN, execute
from loretta.cli.export import export
from loretta.cli.network import go_offline_without_network
from loretta.cli.options import Command
from loretta.cli.output import quiet_libraries
from loretta.cli.plan import plan
from loretta.cli.predict import predict
from loretta.cli.report import report
from loretta.cli.reproduce import reproduce
from loretta.cli.train import train
from loretta.cli.trl import trl
from loretta.errors import InputError
from loretta.wording import printable

# verbs that load models or data
LOADING = {"train", "trl", "eval", "predict", "chat", "plan", "export", "compress", "reproduce", "compare"}
# a disk that is full (or takes no file of that size), read-only, broken or gone
DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOENT,
    errno.ESTALE,
}
# a path of the user that is too long, or whose links lead in a circle
NAMES = {errno.ENAMETOOLONG, errno.ELOOP}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # --batch_size, as other programs write it, is --batch-size
    context_settings={
        "help_option_names": ["--help", "-h"],
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)


def _version(given: bool) -> None:
    if given:
        typer.echo(f"loretta {loretta.__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fine-tune language models through tensor trains (LoRETTA), beside PEFT's other methods."""
    if processes.count() > 1 and ctx.invoked_subcommand not in ("train", "trl", "exec", None):
        raise InputError(
            f"'{ctx.invoked_subcommand}' is the work of one process, and {processes.count()} were started: start it "
            "without torchrun or accelerate launch, which are for 'train' and 'trl'"
        )
    if ctx.invoked_subcommand in LOADING and not {"-h", "--help", "--presets"} & set(sys.argv):
        go_offline_without_network()


app.command(cls=Command)(train)
app.command("eval", cls=Command)(evaluate)
for verb in (predict, chat, plan, export, compress, report, demo, reproduce, compare):
    app.command(cls=Command)(verb)
app.command("exec", cls=Command, context_settings=AS_GIVEN)(execute)
app.command(cls=Command, context_settings=AS_GIVEN)(trl)
app.add_typer(runs.app, name="runs")


def main() -> None:
    """Entry point of ``loretta``: bad input is one line on standard error and exit status 2."""
    quiet_libraries()
    try:
        app(prog_name="loretta")
    except InputError as error:
        processes.leave_it_to_the_first()
        print(f"loretta: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK | NAMES:
            raise
        where, is_name = f" '{error.filename}'" if error.filename else "", error.errno in NAMES
        words = f"there is no path{where}" if is_name else f"cannot write{where}"
        mend = "give another" if is_name else "see to the disk"
        print(f"loretta: {printable(f'{words} ({error.strerror})')}: {mend}", file=sys.stderr)
        sys.exit(2 if is_name else 74)  # EX_IOERR of sysexits.h


if __name__ == "__main__":
    main()
