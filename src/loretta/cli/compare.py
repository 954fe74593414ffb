"""``loretta compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loretta.cli import study as of_study
from loretta.cli.options import Json, run_options
from loretta.studies.study import OF_EACH_RUN


@run_options(but=OF_EACH_RUN)
def compare(
    data: Annotated[str, typer.Option(help="CSV, TSV, JSONL or Parquet file, or a GLUE task.", show_default=False)],
    methods: Annotated[str, typer.Option(help="Methods of `loretta train`.")] = "lora,loretta_adp,loretta_rep,ia3",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the demo's encoder.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of the methods that have one: 2,5,10.")] = None,
    seeds: of_study.Seeds = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs/compare"),
    jobs: of_study.Jobs = 1,
    population: of_study.PopulationSize = "auto",
    ray: of_study.Ray = None,
    ray_gpus: of_study.RayGpus = None,
    sweep: of_study.Sweep = False,
    search: of_study.Search = None,
    tries: of_study.Tries = None,
    rates: of_study.Rates = None,
    dry_run: of_study.DryRun = False,
    sets: of_study.Sets = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Compare methods and sizes on your own data, over seeds, with an answer in words."""
    from loretta.cli.demo import encoder_folder
    from loretta.studies.compare import check_data, comparison
    from loretta.studies.configs import Options

    columns = {name: given.pop(name) for name in of_study.OF_THE_DATA}
    study = comparison(
        data,
        of_study.words("--methods", methods),
        ranks=of_study.ranks_of(ranks),
        seeds=seeds or 5,
        settings={key: value for key, value in columns.items() if value is not None},
    )
    options = Options(
        models=(model or encoder_folder(),),
        seeds=seeds,
        limit=given.pop("limit"),
        data_dir=given.pop("data_dir"),
        cpu=bool(given.pop("cpu")),
        **of_study.sweep_options(sweep, search, rates, tries),
        sets=of_study.run_settings(given, sets),
    )
    check_data(study, options, output)
    where: Any = {"jobs": jobs, "population": population, "ray": ray, "ray_gpus": ray_gpus}
    of_study.carry_out(study, options, output, dry_run=dry_run, as_json=as_json, **where)
