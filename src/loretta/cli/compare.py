"""``loretta compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli.options import Json, run_options
from loretta.cli.study import (
    OF_THE_DATA,
    DryRun,
    Jobs,
    PopulationSize,
    Rates,
    Ray,
    RayGpus,
    Search,
    Seeds,
    Sets,
    Sweep,
    Tries,
    carry_out,
    ranks_of,
    run_settings,
    sweep_options,
    words,
)
from loretta.studies.study import OF_EACH_RUN


@run_options(but=OF_EACH_RUN)
def compare(
    data: Annotated[str, typer.Option(help="CSV, TSV, JSONL or Parquet file, or a GLUE task.", show_default=False)],
    methods: Annotated[str, typer.Option(help="Methods of `loretta train`.")] = "lora,loretta_adp,loretta_rep,ia3",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the demo's encoder.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of the methods that have one: 2,5,10.")] = None,
    seeds: Seeds = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs/compare"),
    jobs: Jobs = 1,
    population: PopulationSize = "auto",
    ray: Ray = None,
    ray_gpus: RayGpus = None,
    sweep: Sweep = False,
    search: Search = None,
    tries: Tries = None,
    rates: Rates = None,
    dry_run: DryRun = False,
    sets: Sets = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Compare methods and sizes on your own data, over seeds, with an answer in words."""
    from loretta.cli.demo import encoder_folder
    from loretta.studies.compare import check_data, comparison
    from loretta.studies.configs import Options

    columns = {name: given.pop(name) for name in OF_THE_DATA}
    study = comparison(
        data,
        words("--methods", methods),
        ranks=ranks_of(ranks),
        seeds=seeds or 5,
        settings={key: value for key, value in columns.items() if value is not None},
    )
    options = Options(
        models=(model or encoder_folder(),),
        seeds=seeds,
        limit=given.pop("limit"),
        data_dir=given.pop("data_dir"),
        cpu=bool(given.pop("cpu")),
        **sweep_options(sweep, search, rates, tries),
        sets=run_settings(given, sets),
    )
    check_data(study, options, output)
    where: Any = {"jobs": jobs, "population": population, "ray": ray, "ray_gpus": ray_gpus}
    carry_out(study, options, output, dry_run=dry_run, as_json=as_json, **where)
