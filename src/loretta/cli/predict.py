"""``loretta predict``."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli.options import Cpu, Json, Model, RunFolder
from loretta.cli.output import print_json
from loretta.errors import InputError


def predict(
    run: RunFolder,
    file: Annotated[Path | None, typer.Argument(help="Table with the text columns of the run.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; repeatable.")] = None,
    text_pair: Annotated[list[str] | None, typer.Option(help="The second text of each pair.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .csv or .jsonl.")] = None,
    model: Model = None,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Load a run's adapter again and apply it to new text."""
    if (file is None) == (text is None):
        raise InputError("give either a FILE or --text (repeatable), and not both")
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output '{output}' must end in .csv or .jsonl")
    from loretta.training.predict import load_run, text_columns
    from loretta.training.predict import predict as apply

    loaded = load_run(run, model=model, cpu=cpu)
    texts = _of_pairs(text or [], text_pair) if file is None else _of_file(file, text_columns(loaded))
    rows = [
        {**dict(zip(("text", "text_pair"), words, strict=False)), **row}
        for words, row in zip(zip(*texts, strict=True), apply(loaded, texts), strict=True)
    ]
    if output is not None:
        _write_rows(output, rows)
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


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)
