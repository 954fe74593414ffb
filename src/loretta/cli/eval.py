"""``loretta eval``."""

from pathlib import Path
from typing import Annotated

import typer

from loretta.cli.options import Cpu, Json, Model, RunFolder
from loretta.cli.output import print_json, say, scores
from loretta.cli.predict import say_cut
from loretta.errors import InputError


def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Other data with the same columns and labels, of a file all rows.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="What to score.")] = "validation",
    model: Model = None,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Load a run's adapter again and score it."""
    if split not in ("train", "validation", "test"):
        raise InputError(f"--split {split!r} is none of train, validation and test")
    from loretta.training.data import load_config_task, load_other_task
    from loretta.training.predict import evaluate as score
    from loretta.training.predict import load_run
    from loretta.training.sources import changed_places, is_data_of, was_trained_on

    loaded = load_run(run, model=model, cpu=cpu)
    config = loaded.config
    if loaded.kind == "preference" and (changed := changed_places(run, config, ("start_from",))):
        raise InputError(f"the pairs are held to the run {changed}, which is another one now: put it back")
    # without a file of its own a split was held out of the data
    option = split if split != "train" and getattr(config, split) is not None else "data"
    if data is not None and option == "data" and not Path(config.data).exists() and is_data_of(run, data):
        say(f"note: '{data}' is the data of the run, of which the {split} rows are scored", err=True)
        config, data = config.model_copy(update={"data": data}), None
    if data is None:
        task = load_config_task(config)
        if changed := changed_places(run, config, (option,)):
            raise InputError(
                f"{changed} has changed since the run began, so that the {split} rows are others and may have been "
                "trained: give --data FILE to score all rows of a file, or put the file back as it was"
            )
    else:
        task = load_other_task(config, loaded.record, data)
        if was_trained_on(run, data):
            say(f"note: the run was trained on rows of '{data}', which flatters the score", err=True)
    values = score(loaded, task, split)
    say_cut(loaded, len(getattr(task, split)))
    if as_json:
        print_json({"run": str(run), "split": split, **values})
    else:
        say(f"{split}: {scores(values)}")
