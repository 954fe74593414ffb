"""The command line. One function per verb: parse, call the library, print."""

import csv
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli import studies as studies_cli
from loretta.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Model = Annotated[str | None, typer.Option(help="Hub id or folder of the base model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Cpu = Annotated[bool | None, typer.Option("--cpu", help="Stay on the CPU even where there is an accelerator.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder that `loretta train` wrote.", show_default=False)]


@app.callback()
def main_options() -> None:
    """Fine-tune language models through tensor trains (LoRETTA), beside PEFT's other methods."""


@app.command()
def train(
    model: Model = None,
    data: Annotated[
        str | None, typer.Option(help="GLUE task, 'stdlib', or a CSV, TSV, JSONL, Parquet or text file.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="rep, adp, lora, ia3, norms, head, or any of PEFT's as peft:NAME.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column with the second text of a pair.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label.")] = None,
    kind: Annotated[str | None, typer.Option(help="classification, regression or language_modeling.")] = None,
    validation: Annotated[str | None, typer.Option(help="File to validate on; default: a part of the data.")] = None,
    test: Annotated[str | None, typer.Option(help="File to test the best checkpoint on.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with GLUE's files, one folder a task.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    epochs: Annotated[float | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Load the base in fewer bits: nf4, fp4, int8, torchao-int8 or fp8.")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many rows of each split.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the options.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: any option, or one of the method's. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = None,
    cuda_graph: Annotated[
        bool | None, typer.Option("--cuda-graph", help="Replay training steps as CUDA graphs: small models on a GPU.")
    ] = None,
    cpu: Cpu = None,
    as_json: Json = False,
) -> None:
    """Train an adapter; write adapter/, run.json and report.html."""
    given = {key: value for key, value in locals().items() if key not in _NOT_IN_CONFIG}
    from loretta.training.config import read_config

    run_config = read_config(config, given, sets or [])
    from loretta import report
    from loretta.training.run import train as run

    record = run(run_config, resume=resume, overwrite=overwrite)
    report.write([record], run_config.folder / "report.html", notes=record.notes)
    if as_json:
        _print_json(record.model_dump())
        return
    scores = {"validation": record.validation, "test": record.test or {}}
    for split, values in scores.items():
        if values:
            typer.echo(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    typer.echo(
        f"{record.parameters.trainable:,} trained parameters, {record.adapter_bytes:,} bytes, "
        f"{record.train_seconds:.0f} s; see {run_config.folder / 'report.html'}"
    )


_NOT_IN_CONFIG = {"config", "sets", "resume", "overwrite", "as_json"}


@app.command("eval")
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Other data with the same columns and labels, of a file all rows.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    model: Model = None,
    cpu: Cpu = None,
    as_json: Json = False,
) -> None:
    """Load a run's adapter again and score it."""
    from loretta.training.data import load_config_task
    from loretta.training.predict import evaluate as score
    from loretta.training.predict import load_run

    if split not in ("train", "validation", "test"):
        raise InputError(f"--split {split!r} is none of train, validation and test")
    loaded = load_run(run, model=model, cpu=bool(cpu))
    config = loaded.config
    if data is not None:
        # a file is its own validation file: no rows are held out of it
        validation = data if Path(data).is_file() else None
        config = config.model_copy(update={"data": data, "validation": validation, "test": None, "limit": None})
    values = score(loaded, load_config_task(config), split)
    if as_json:
        _print_json({"run": str(run), "split": split, **values})
    else:
        typer.echo(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


@app.command()
def predict(
    run: RunFolder,
    file: Annotated[Path | None, typer.Argument(help="Table with the text columns of the run.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to predict; repeatable.")] = None,
    text_pair: Annotated[list[str] | None, typer.Option(help="The second text of each pair.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write: .csv or .jsonl.")] = None,
    model: Model = None,
    cpu: Cpu = None,
    as_json: Json = False,
) -> None:
    """Load a run's adapter again and apply it to new text."""
    if (file is None) == (text is None):
        raise InputError("give either a FILE or --text (repeatable), and not both")
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output '{output}' must end in .csv or .jsonl")
    from loretta.training.predict import load_run, text_columns
    from loretta.training.predict import predict as apply

    loaded = load_run(run, model=model, cpu=bool(cpu))
    if file is not None:
        from loretta.tasks.read import read_columns

        columns = read_columns(file, names := text_columns(loaded))
        for name in names:
            if None in columns[name]:
                at = columns[name].index(None) + 1
                raise InputError(
                    f"row {at} of '{file}' has nothing in the column {name!r}: fill it or leave the row out"
                )
        texts = [[str(value) for value in columns[name]] for name in names]
    else:
        texts = [list(text or []), *([list(text_pair)] if text_pair else [])]
        if len({len(column) for column in texts}) > 1:
            raise InputError(f"{len(texts[0])} --text and {len(texts[1])} --text-pair: give one pair for each text")
    rows = [
        {**dict(zip(("text", "text_pair"), words, strict=False)), **row}
        for words, row in zip(zip(*texts, strict=True), apply(loaded, texts), strict=True)
    ]
    if output is not None:
        _write_rows(output, rows)
    elif as_json:
        _print_json(rows)
    else:
        for row in rows:
            typer.echo("\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))


@app.command()
def plan(
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or a name such as llama-2-70b.")] = None,
    method: Annotated[str | None, typer.Option(help="rep or adp.")] = None,
    preset: Annotated[str | None, typer.Option(help="A configuration of the paper; --presets lists them.")] = None,
    task_type: Annotated[str | None, typer.Option(help="SEQ_CLS, CAUSAL_LM, ...; default: by the model.")] = None,
    num_labels: Annotated[int, typer.Option(help="Labels of a classification head.")] = 2,
    budget: Annotated[
        str | None, typer.Option(help="100k or 1.5M (parameters), 400kB or 1MiB (bytes): choose what fits.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value: an option of the method.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="One page in words.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the paper's configurations and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Show what LoRETTA will do to a model, from its configuration alone."""
    from loretta.plan import request as planning

    if presets:
        rows = planning.list_presets()
        _print_json(rows) if as_json else typer.echo(planning.preset_table(rows))
        return
    result = planning.make_plan(
        model=model,
        method=method,
        preset=preset,
        task_type=task_type,
        num_labels=num_labels,
        budget=budget,
        sets=sets or [],
    )
    if as_json:
        _print_json(result.as_dict())
    else:
        typer.echo(result.explanation() if explain else result.table())


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter, or of a run of `loretta train`.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(help="Folder to write; with --to gguf-lora a .gguf file.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="lora, merged or gguf-lora.", show_default=False)],
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="Of a merged model; auto: of the base model's checkpoint.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a rep adapter so that it works without LoRETTA: a LoRA adapter, a merged model, a LoRA for llama.cpp."""
    from loretta.convert.export import export as write

    written = write(adapter, output, to=to, model=model, dtype=dtype, overwrite=overwrite)
    if as_json:
        _print_json(dataclasses.asdict(written))
        return
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in written.ranks.items())
    typer.echo(f"{to} in {written.dtype}: {sum(written.ranks.values())} modules adapted ({ranks})")
    if written.whole:
        typer.echo(f"written whole: {', '.join(written.whole)}")
    typer.echo(f"{written.bytes_before:,} bytes of tensors became {written.bytes_after:,}; see {written.path}")


@app.command()
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier adapter in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a trained LoRA into a LoRETTA rep adapter, and say what that changes."""
    from rich.console import Console
    from rich.progress import track

    from loretta.convert.compress import compress as convert
    from loretta.convert.compress import show

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
        _print_json(result.as_dict())
    else:
        show(result, Console())


@app.command("report")
def write_report(
    runs: Annotated[Path, typer.Argument(help="Folder of a study, of runs, or of one run.", show_default=False)] = Path(
        "runs"
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; - or nothing: print all but HTML.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="html, md, csv, json or latex; default: by the file's ending.")
    ] = None,
) -> None:
    """Show what was run beside the paper's numbers: a page with tables, figures and the command for each number."""
    from loretta.report.folder import SUFFIXES, report_on
    from loretta.report.page import save

    printed = output == Path("-")
    form = form or ("html" if output is None or printed else SUFFIXES.get(output.suffix, "html"))
    content = report_on(runs, form)
    if printed or (output is None and form != "html"):
        typer.echo(content, nl=False)
        return
    file = output or Path("report.html")
    if not file.parent.is_dir():
        raise InputError(f"--output '{file}': there is no folder '{file.parent}'")
    save(content, file)
    typer.echo(f"written to {file}", err=True)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One epoch on a part of the data, under 2 minutes.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the runs; replaced.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train adp, rep, LoRA and two baselines on real text without a network, then reload and check each."""
    from loretta.cli.demo import run_demo

    result = run_demo(output, quick=quick, show=not as_json)
    if as_json:
        _print_json(result)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


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


app.add_typer(studies_cli.app)


def main() -> None:
    """Entry point of ``loretta``: bad input is one line on standard error and exit status 2."""
    # deprecations inside the libraries are for their authors; PEFT warns of layers that it then handles
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="Unsupported layer type", module="peft")
    try:
        app()
    except InputError as error:
        print(f"loretta: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("loretta: interrupted; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
