"""Options that several verbs share, and those of a run, which are read off :class:`RunConfig`."""

import inspect
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from loretta import processes
from loretta.cli.output import answer_json
from loretta.errors import InputError, OutOfMemory, Stopped
from loretta.options import wanted
from loretta.training.config import ALIASES, GROUPS, RunConfig
from loretta.wording import printable, quoted

Json = Annotated[
    bool,
    typer.Option("--json", callback=answer_json, help="Print one JSON document and nothing else on standard output."),
]
Model = Annotated[str | None, typer.Option(help="Hub id or folder of the base model.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even where there is an accelerator.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder that `loretta train` wrote.", show_default=False)]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens of a continuation at most; default: the run's.")]
Temperature = Annotated[
    float | None, typer.Option(help="Draw the tokens of a continuation; 0 or neither of the two: the likeliest.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")]


def run_options(
    *, but: Collection[str], beside: Callable[..., None] | None = None, defaults: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the ``**given`` of a verb by an option for each field of RunConfig except ``but``.

    An option that is not given is None. With ``defaults`` the help shows RunConfig's, if the verb takes these. The
    options among the parameters of ``beside`` come before those fields.
    """

    def with_options(verb: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(verb).parameters.values())[:-1]
        shared = inspect.signature(beside).parameters.values() if beside is not None else ()
        own += [parameter for parameter in shared if get_origin(parameter.annotation) is Annotated]
        names = {name: group for group, members in GROUPS.items() for name in members if name not in but}
        fields = [_parameter(name, RunConfig.model_fields[name], group, defaults) for name, group in names.items()]
        verb.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *fields]}
        return verb

    return with_options


def _parameter(name: str, field: FieldInfo, group: str, defaults: bool) -> inspect.Parameter:
    kind, words = _type_of(field.annotation)
    flags = [_flag(name), *(_flag(alias) for alias, key in ALIASES.items() if key == name)]
    if name == "output":
        flags.append("-o")
    if kind is bool:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    # nobody needs to read that an option is off by default: None, False, {}
    default = f" [default: {field.default}]" if defaults and field.default and not field.is_required() else ""
    option = typer.Option(
        *flags,
        help=f"{field.description}{default}",
        rich_help_panel=group,
        metavar="|".join(words) or None,
        autocompletion=(lambda: list(words)) if words else None,
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _type_of(hint: Any) -> tuple[type, tuple[str, ...]]:
    """The type of a field on the command line, and the words it may be. RunConfig itself checks the value."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return str, get_args(hint)
    return (hint, ()) if hint in (bool, int, float) else (str, ())


# names of options in other programs -> ours
ELSEWHERE = {
    "--dataset": "--data", "--train-file": "--data", "--model-name": "--model", "--model-name-or-path": "--model",
    "--base-model": "--model", "--dataset-name": "--data", "--output-dir": "--output", "--out": "--output",
    "--num-epochs": "--epochs", "--num-train-epochs": "--epochs", "--per-device-train-batch-size": "--batch-size",
    "--bs": "--batch-size", "--gradient-accumulation-steps": "--accumulate", "--grad-accum": "--accumulate",
    "--max-seq-length": "--max-length", "--cutoff-len": "--max-length", "--sequence-len": "--max-length",
    "--val-set-size": "--validation", "--adapter": "--method", "--finetuning-type": "--method", "--stage": "--kind",
    "--lr-scheduler": "--schedule", "--wandb-project": "--report-to wandb", "--steps": "--max-steps",
    "--micro-batch-size": "--batch-size", "--warmup-ratio": "--warmup", "--lr-scheduler-type": "--schedule",
    "--early-stopping": "--patience", "--early-stopping-patience": "--patience", "--optim": "--optimizer",
    "--validation-file": "--validation", "--dev": "--validation", "--valid": "--validation", "--val": "--validation",
    "--eval-file": "--validation", "--test-file": "--test", "--wandb": "--report-to wandb",
    "--resume-from-checkpoint": "--resume", "--load-in-4bit": "--quantize nf4", "--load-in-8bit": "--quantize int8",
    "--peft": "--method", "--rank": "--set tensor_rank=N (rep, adp) or --set r=N (lora)", "--r": "--set r=N",
    "--lora-r": "--set r=N", "--alpha": "--set lora_alpha=N", "--lora-alpha": "--set lora_alpha=N",
    "--lora-dropout": "--set lora_dropout=N", "--target-modules": "--set target_modules=query,value",
    "--lora-target": "--set target_modules=query,value", "--lora-target-modules": "--set target_modules=query,value",
    "--fp16": "--bf16", "--device": "--cpu", "--verbose": "--logging-steps", "--hub-model-id": "--push-to-hub",
}  # fmt: skip


# verb -> what to do where the memory is too small for it or for the runs that it starts
WITH_LESS_MEMORY = {
    "eval": "give --cpu",
    "predict": "give --cpu, shorter texts or fewer --max-new-tokens",
    "chat": "give --cpu, begin again with /clear, or lower --max-new-tokens",
    "export": "give --dtype bfloat16 for a merged model",
    "compress": "leave --text out, which loads the base model",
    "reproduce": "lower --jobs, --population or --batch-size",
    "compare": "lower --jobs, --population or --batch-size",
}

GO_ON = {
    "train": "; a run goes on from its last checkpoint with --resume",
    **dict.fromkeys(("compare", "reproduce"), "; the same command goes on"),
}


@contextmanager
def _ended_by_signals(verb: str) -> Iterator[None]:
    """Raise Stopped where a signal would end the process at once, with locks and half of what it writes left behind.

    A second one does. A training has handlers of its own.
    """
    process, taken = os.getpid(), []

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if process != os.getpid():  # a worker
            os.kill(os.getpid(), number)
            return
        words = f"stopped by {signal.Signals(number).name}{GO_ON.get(verb, '')}"
        raise Stopped(words, exit_status=128 + number)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


# options that name a file or folder, and arguments; data are read so by every road
PATHS = {"adapter", "config", "data_dir", "file", "folder", "model", "out", "output", "run", "runs"}


def _from_home(value: Any) -> Any:
    """With ``~`` as the home folder: a shell leaves it as it is in ``--output=~/runs`` and in quotes.

    Raises InputError for the home of a user that there is not, which would become a folder here.
    """
    if isinstance(value, str | Path):
        whole = os.path.expanduser(value)
        if whole.startswith("~") and not os.path.lexists(whole):
            raise InputError(f"'{value}' begins with the home of no user here: write ./{value} for a folder")
        return type(value)(whole)
    return [*map(_from_home, value)] if isinstance(value, list | tuple) else value


def _refuse_empty(words: list[str]) -> None:
    """As ``--output "$RUN"`` is without that variable: it would be the default, or this folder, or no bound."""
    for before, word in zip(["", *words], words, strict=False):
        name = before if word == "" else word.removesuffix("=")
        if word == "" or (name != word and name.startswith("--") and "=" not in name):
            given = f"{name} is" if name.startswith("-") else "an argument is"
            raise InputError(f"{given} given and empty: say what is meant, or leave it out")


def refuse_other_encodings(name: str, *texts: str) -> None:
    """Raise InputError for a text with bytes that are not UTF-8, of which Python makes characters that are none."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{name} {quoted(text)} is not UTF-8: give it in that encoding") from None


class Command(TyperCommand):
    """A verb whose ``--help`` lists options in groups, and that suggests ours for the names of other programs.

    When it is stopped or out of memory it says so in one sentence, and how to go on.
    """

    def invoke(self, ctx: Any) -> Any:
        # caught here, because typer would treat each of them as an interrupt and print nothing
        try:
            with _ended_by_signals(str(ctx.info_name)):
                return self._invoke(ctx)
        except Stopped as stopped:
            # all processes of a run stop together, so the first one speaks; only one of them may be out of memory
            if processes.is_first() or isinstance(stopped, OutOfMemory):
                print(f"loretta: {printable(stopped)}", file=sys.stderr)
            raise typer.Exit(stopped.exit_status) from None
        except KeyboardInterrupt:
            if processes.is_first():
                print(f"loretta: interrupted{GO_ON.get(str(ctx.info_name), '')}", file=sys.stderr)
            raise typer.Exit(130) from None

    def _invoke(self, ctx: Any) -> Any:
        ctx.params |= {name: _from_home(value) for name, value in ctx.params.items() if name in PATHS}
        try:
            return super().invoke(ctx)
        except (MemoryError, OSError, RuntimeError):
            from loretta.memory import saying_what_helps  # torch, which no verb loads for this

            mend = WITH_LESS_MEMORY.get(str(ctx.info_name), "use less of it elsewhere")
            with saying_what_helps(f"`loretta {ctx.info_name}`", f"{mend}, or take a larger machine"):
                raise

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.ignore_unknown_options:
            _refuse_empty(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # by typer's version the error is of its own class or of click's, and pydantic reads the values
            if isinstance(error.__cause__, ValidationError):
                mistake: Any = error.__cause__.errors()[0]
                error.message = f"{quoted(mistake['input'])} {wanted(mistake)}"  # type: ignore[attr-defined]
            ours = ELSEWHERE.get(str(getattr(error, "option_name", "")))
            known = {flag for option in self.params for flag in option.opts}
            if ours is not None and hasattr(error, "possibilities") and ours.split()[0] in known:
                error.possibilities = [ours]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", "Options", *GROUPS)}
        for parameter in self.get_params(ctx):
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            group = getattr(parameter, "rich_help_panel", None) or default
            if (record := parameter.get_help_record(ctx)) is not None:
                groups[group].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
