"""``loretta predict``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli.options import Cpu, Json, Model, RunFolder
from loretta.cli.output import print_json
from loretta.errors import InputError
from loretta.files import write_whole


def predict(
    run: RunFolder,
    file: Annotated[Path | None, typer.Argument(help="Table with the text columns of the run.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; repeatable.")] = None,
    text_pair: Annotated[list[str] | None, typer.Option(help="The second text of each pair.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .csv or .jsonl.")] = None,
    model: Model = None,
    cpu: Cpu = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    as_json: Json = False,
) -> None:
    """Load a run's adapter again and apply it to new text."""
    if (file is None) == (text is None):
        raise InputError("give either a FILE or --text (repeatable), and not both")
    if output is not None:
        _check_output(output, overwrite=overwrite)
    from loretta.training.predict import load_run, text_columns
    from loretta.training.predict import predict as apply

    loaded = load_run(run, model=model, cpu=cpu)
    texts = _of_pairs(text or [], text_pair) if file is None else _of_file(file, text_columns(loaded))
    rows = [
        {**dict(zip(("text", "text_pair"), words, strict=False)), **row}
        for words, row in zip(zip(*texts, strict=True), apply(loaded, texts), strict=True)
    ]
    if output is not None:
        write_whole(output, _table(rows) if output.suffix == ".csv" else _lines(rows))
        typer.echo(f"{len(rows):,} rows written to {output}", err=True)
    if as_json:
        print_json(rows)
    elif output is None:
        for row in rows:
            typer.echo("\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))


def _of_file(file: Path, names: Sequence[str]) -> list[list[str]]:
    from loretta.tasks.read import read_columns

    columns = read_columns(file, names)
    for name in names:
        if None in columns[name]:
            at = columns[name].index(None) + 1
            raise InputError(f"row {at} of '{file}' has nothing in the column {name!r}: fill it or leave the row out")
    return [[str(value) for value in columns[name]] for name in names]


def _of_pairs(text: list[str], text_pair: list[str] | None) -> list[list[str]]:
    if text_pair and len(text) != len(text_pair):
        raise InputError(f"{len(text)} --text and {len(text_pair)} --text-pair: give one pair for each text")
    return [text, *([text_pair] if text_pair else [])]


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Before the model is loaded: whether the file can be written."""
    if output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output '{output}' must end in .csv or .jsonl")
    if not output.parent.is_dir():
        raise InputError(f"--output '{output}': there is no folder '{output.parent}'")
    if output.exists() and not overwrite:
        raise InputError(f"--output '{output}' exists: replace it with --overwrite, or give another file")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows, dtype=object).to_csv(index=False, na_rep="nan", lineterminator="\r\n")


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
