"""``loretta reproduce``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli import study as of_study
from loretta.cli.options import run_options
from loretta.cli.output import print_json, say
from loretta.studies.study import OF_EACH_RUN
from loretta.training.config import OF_A_TABLE


@run_options(but=[*OF_EACH_RUN, *OF_A_TABLE], beside=of_study.carry_out, defaults=False)
def reproduce(
    target: Annotated[str | None, typer.Argument(help="table1, figure4, ...; without it they are listed.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Hub id, folder, or a model of the study. Repeatable.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Some of the study's tasks: mrpc,rte.")] = None,
    methods: Annotated[str | None, typer.Option(help="Rows of the study or any method: loretta_adp,lora.")] = None,
    seeds: of_study.Seeds = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs"),
    batches: Annotated[bool, typer.Option("--sweep-batches", help="Sweep over the grid's batch sizes too.")] = False,
    orders: Annotated[bool, typer.Option("--orders", help="Train a sequence (table4) in every order.")] = False,
    **given: Any,
) -> None:
    """Run a table or figure of the paper: what is finished stays, what was stopped goes on.

    An option that is not given is the study's.
    """
    from loretta.studies.study import load_study, study_names

    if target is None:
        studies = [load_study(name) for name in study_names()]
        if given["as_json"]:
            print_json([{"target": study.name, "title": study.title, "source": study.source} for study in studies])
        else:
            say("\n".join(f"{study.name:<8}  {study.title}" for study in studies))
        return
    chosen = {"tasks": of_study.words("--tasks", tasks), "methods": of_study.words("--methods", methods)}
    narrowed = {"models": tuple(model or ()), **chosen, "seeds": seeds, "batches": batches, "orders": orders}
    of_study.carry_out(load_study(target), output, narrowed, **given)
