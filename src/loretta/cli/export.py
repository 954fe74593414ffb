"""``loretta export``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from loretta.cli.options import Json, Model, Overwrite
from loretta.cli.output import print_json, say
from loretta.errors import InputError


def export(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter, or of a run of `loretta train`.", show_default=False)
    ],
    to: Annotated[str, typer.Option(metavar="lora|merged|gguf-lora", help="The form to write.", show_default=False)],
    out: Annotated[Path | None, typer.Argument(metavar="OUTPUT", help="As --output.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; with --to gguf-lora a .gguf file.")
    ] = None,
    model: Model = None,
    dtype: Annotated[
        str, typer.Option(help="Of a merged model: float32, bfloat16 or float16; auto: of the base model's checkpoint.")
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter that works without LoRETTA: a LoRA, a merged model, or a LoRA for llama.cpp."""
    if out is not None and output is not None:
        raise InputError(f"'{out}' and --output '{output}' both say where to write: give one of them")
    if (where := output or out) is None:
        raise InputError("give -o with the folder to write; with --to gguf-lora a .gguf file")
    from loretta.convert.export import export as write

    written = write(adapter, where, to=to, model=model, dtype=dtype, overwrite=overwrite)
    if as_json:
        print_json(dataclasses.asdict(written))
        return
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in written.ranks.items())
    say(f"{to} in {written.dtype}: {sum(written.ranks.values())} modules adapted ({ranks}), on {written.base}")
    if written.whole:
        say(f"written whole: {', '.join(written.whole)}")
    say(f"{written.bytes_before:,} bytes of tensors became {written.bytes_after:,}; see {written.path}")
