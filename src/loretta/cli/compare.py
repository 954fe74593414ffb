"""``loretta compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli import study as of_study
from loretta.cli.options import run_options
from loretta.studies.study import OF_EACH_RUN
from loretta.training.config import OF_A_TABLE


@run_options(but=OF_EACH_RUN, beside=of_study.carry_out)
def compare(
    data: Annotated[str, typer.Option(help="CSV, TSV, JSONL or Parquet file, or a GLUE task.", show_default=False)],
    methods: Annotated[str, typer.Option(help="Methods of `loretta train`.")] = "lora,loretta_adp,loretta_rep,ia3",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the demo's encoder.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of the methods that have one: 2,5,10.")] = None,
    seeds: of_study.Seeds = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs/compare"),
    **given: Any,
) -> None:
    """Compare methods and sizes on your own data, over seeds, with an answer in words."""
    from loretta.cli.demo import encoder_folder
    from loretta.studies.compare import comparison

    columns = {name: given.pop(name) for name in OF_A_TABLE}
    study = comparison(
        data,
        of_study.words("--methods", methods),
        ranks=of_study.ranks_of(ranks),
        seeds=seeds or 5,
        settings={key: value for key, value in columns.items() if value is not None},
    )
    of_study.carry_out(study, output, {"models": (model or encoder_folder(),), "seeds": seeds}, **given)
