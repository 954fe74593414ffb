"""``loretta predict``."""

import csv
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from loretta import wording
from loretta.cli.options import Cpu, Json, MaxNewTokens, Model, RunFolder, Temperature, TopP, refuse_other_encodings
from loretta.cli.output import answer, say, writing_output
from loretta.errors import InputError
from loretta.locks import hold_file
from loretta.owned import refuse_to_replace_file, write_listed
from loretta.wording import as_json_lines, finite

if TYPE_CHECKING:
    from loretta.training.loaded import LoadedRun


def predict(
    run: RunFolder,
    file: Annotated[Path | None, typer.Argument(help="Table with the text columns of the run.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; repeatable.")] = None,
    text_pair: Annotated[list[str] | None, typer.Option(help="The second text of each pair.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .csv or .jsonl.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Those of all classes.")] = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    model: Model = None,
    cpu: Cpu = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier call wrote to --output.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Load a run's adapter again and apply it to new text.

    The rows of a FILE keep all their columns; a column that has the name of an answer already makes that
    "predicted_NAME".
    """
    if (file is None) == (text is None):
        raise InputError("give either a FILE or --text (repeatable), and not both")
    if file is not None and text_pair:
        raise InputError(f"--text-pair goes with --text, and '{file}' has the second texts in a column: leave it out")
    refuse_other_encodings("--text", *(text or []))
    refuse_other_encodings("--text-pair", *(text_pair or []))
    with ExitStack() as stack:
        stack.enter_context(_holding(output, file, overwrite=overwrite))
        from loretta.training.predict import Sampling, answers, load_run, refuse_classifier, reply

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        loaded = load_run(run, model=model, cpu=cpu)
        if sampling != Sampling():
            refuse_classifier(loaded, "leave --max-new-tokens, --temperature and --top-p out")
        columns, texts = _asked(loaded, file, text or [], text_pair or [])
        found = answers(
            loaded,
            texts,
            all_probabilities=probabilities,
            go_on=lambda run, words: reply(run, words, sampling),
        )
        # no more than a batch of them lies in memory
        rows: Iterable[dict[str, Any]] = _beside(columns, found)
        document = None
        if as_json:
            document = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            rows = _also_as_json(rows, document)
        if output is not None:
            with writing_output(output):
                _write(rows, output, overwrite=overwrite)
        elif document is not None:
            deque(rows, maxlen=0)
        else:
            for row in rows:
                say("\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
        total = len(texts[0])
        say_cut(loaded, total)
        if output is not None:
            say(f"{total:,} rows written to {output}", err=True)
        if document is not None:  # all of it or nothing
            document.seek(0)
            for part in iter(lambda: document.read(1 << 20), ""):
                answer(part)


def _asked(
    run: "LoadedRun", file: Path | None, text: list[str], text_pair: list[str]
) -> tuple[Mapping[str, Sequence[Any]], Sequence[Sequence[Any]]]:
    """All columns of the rows, and those that are answered."""
    from loretta.training.forms import form_of

    if file is not None:
        columns = _all_columns(file, run.config.separator)
        return columns, form_of(run.kind).asked(run.config, columns, file)
    if text_pair and len(text) != len(text_pair):
        raise InputError(f"{len(text)} --text and {len(text_pair)} --text-pair: give one pair for each text")
    columns = {"text": text, **({"text_pair": text_pair} if text_pair else {})}
    return columns, list(columns.values())


def _beside(columns: Mapping[str, Sequence[Any]], answers: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The answers, each behind the cells of its row."""
    for cells, found in zip(zip(*columns.values(), strict=True), answers, strict=True):
        row = dict(zip(columns, cells, strict=True))
        yield {**row, **{f"predicted_{key}" if key in row else key: value for key, value in found.items()}}


def _also_as_json(rows: Iterable[dict[str, Any]], document: IO[str]) -> Iterator[dict[str, Any]]:
    """The rows, each of which is also written to one document: their list."""
    opened = "["
    for row in rows:
        document.write(opened + "\n  " + wording.as_json(row).rstrip("\n").replace("\n", "\n  "))
        opened = ","
        yield row
    document.write("[]\n" if opened == "[" else "\n]\n")


def say_cut(run: "LoadedRun", total: int) -> None:
    """Say on standard error how many of the texts lost an end, or have no answer."""
    if run.unanswered:
        from loretta.training.loaded import NOT_FINITE

        say(f"note: {run.unanswered:,} of the {total:,} texts without an answer: {NOT_FINITE}", err=True)
    if run.cut:
        say(
            f"note: {run.cut:,} of the {total:,} texts {'is' if run.cut == 1 else 'are'} longer than the "
            f"{run.config.max_length} tokens of the run (max_length) and cut there",
            err=True,
        )


def _all_columns(file: Path, separator: str | None) -> dict[str, list[Any]]:
    from loretta.tasks.read import SEPARATORS, ending
    from loretta.tasks.sources import column_names, find_files, read_columns

    separated = separator is not None and file.is_file() and ending(file) in SEPARATORS
    source = find_files(str(file), separator) if separated else file
    return read_columns(source, column_names(source))


@contextmanager
def _holding(output: Path | None, file: Path | None, *, overwrite: bool) -> Iterator[None]:
    """Check that ``output`` can be written, and lock it until the block ends: loading the model takes long."""
    if output is None:
        yield
        return
    _check_output(output, file, overwrite=overwrite)
    with ExitStack() as stack:
        with writing_output(output):
            stack.enter_context(hold_file(output))
        _check_output(output, file, overwrite=overwrite)  # another process may have written it since
        yield


def _check_output(output: Path, file: Path | None, *, overwrite: bool) -> None:
    if output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output '{output}' must end in .csv or .jsonl")
    if not output.parent.is_dir():
        raise InputError(f"--output '{output}': there is no folder '{output.parent}'")
    if file is not None and file.exists() and output.exists() and output.samefile(file):
        raise InputError(f"--output '{output}' is the file to predict: give another")
    if output.exists() and not overwrite:
        raise InputError(f"--output '{output}' exists: replace it with --overwrite, or give another file")
    refuse_to_replace_file(Path(os.path.realpath(output)), overwrite=overwrite)


def _write(rows: Iterable[Mapping[str, Any]], output: Path, *, overwrite: bool) -> None:
    # a file without a name, of which nothing is left should the process be killed
    with tempfile.TemporaryFile("w+", dir=output.parent, newline="", encoding="utf-8") as file:
        if output.suffix == ".csv":
            table = csv.writer(file)
            for k, row in enumerate(rows):
                if k == 0:
                    table.writerow(row)
                table.writerow(map(_cell, row.values()))
        else:
            file.writelines(as_json_lines([finite(row)]) for row in rows)
        file.seek(0)
        # a link goes on leading where it leads
        write_listed(Path(os.path.realpath(output)), iter(lambda: file.read(1 << 20), ""), overwrite=overwrite)


def _cell(value: Any) -> Any:
    """A value as a cell of CSV: lists as JSON, and none where there is nothing."""
    value = finite(value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
