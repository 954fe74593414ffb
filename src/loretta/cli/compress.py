"""``loretta compress``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from loretta.cli.options import Json, Model, Overwrite, refuse_other_encodings
from loretta.cli.output import console, print_json


def compress(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a LoRA or another low-rank adapter, or of a run.", show_default=False)
    ],
    rank: Annotated[int | None, typer.Option(help="Tensor rank of every module.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Relative error that no module's update may exceed: chooses the ranks.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default: ADAPTER-loretta.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text, or a file of them, to compare the outputs on: loads the base model.")
    ] = None,
    model: Model = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn a trained LoRA into a LoRETTA rep adapter, and say what that changes."""
    from rich.console import Console
    from rich.progress import track

    from loretta.convert.compress import compress as convert
    from loretta.convert.compress import show

    refuse_other_encodings("--text", text or "")
    progress = Console(stderr=True)
    result = convert(
        adapter,
        output,
        rank=rank,
        error=error,
        model=model,
        text=text,
        overwrite=overwrite,
        watch=lambda names: track(names, "Fitting", console=progress, transient=True, disable=not progress.is_terminal),
    )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        show(result, console())
