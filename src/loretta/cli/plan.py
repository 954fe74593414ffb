"""``loretta plan``."""

from typing import Annotated

import typer

from loretta.cli.options import Json
from loretta.cli.output import print_json, say
from loretta.errors import InputError


def plan(
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or a name such as llama-2-70b.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="auto|compact|rep|adp|shared", help="Default: compact, the preset's, or with a budget auto."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A configuration of the paper (--presets lists them), or auto, as --method auto.")
    ] = None,
    task_type: Annotated[str | None, typer.Option(help="SEQ_CLS, CAUSAL_LM, ...; default: by the model.")] = None,
    num_labels: Annotated[int | None, typer.Option(help="Labels of a classification head; default: 2.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="100k or 1.5M (parameters), 400kB or 1MiB (bytes): the form that measured best among those that fit, "
            "or of a method the highest rank that fits."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method. Repeatable.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="One page in words.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the paper's configurations and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Show what LoRETTA will do to a model, from its configuration alone."""
    if explain and as_json:
        raise InputError("--json is for programs and --explain is a page in words: give one of them")
    if presets:
        from loretta.plan import list_presets, preset_table

        rows = list_presets()
        print_json(rows) if as_json else say(preset_table(rows))
        return
    from loretta.plan import make_plan

    result = make_plan(
        model=model,
        method=method,
        preset=preset,
        task_type=task_type,
        num_labels=num_labels,
        budget=budget,
        sets=sets or [],
    )
    if as_json:
        print_json(result.as_dict())
    else:
        say(result.explanation() if explain else result.table())
