"""What ``reproduce`` and ``compare`` share: their options, and carrying a study out."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from loretta.cli.following import following
from loretta.cli.options import Json
from loretta.cli.output import console, print_json, say
from loretta.errors import InputError
from loretta.options import parse_option
from loretta.training.config import ALIASES, read_sample
from loretta.wording import duration

if TYPE_CHECKING:
    from loretta.studies.compare import Verdict
    from loretta.studies.configs import Options
    from loretta.studies.paired import Difference
    from loretta.studies.results import Results
    from loretta.studies.runner import Summary
    from loretta.studies.study import Study

N = TypeVar("N", int, float)

Seeds = Annotated[int | None, typer.Option(min=1, help="How many seeds, from 0 on.")]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs", "--workers", min=0, help="Runs at once, each in a process, on the GPUs in turn; 0: in this process."
    ),
]
PopulationSize = Annotated[
    str,
    typer.Option(
        "--population",
        metavar="auto|N",
        help="Runs that differ in seeds and rates alone, trained at once on one base; auto: on a GPU as many as its "
        "memory holds, on a CPU one.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="auto|ADDRESS", help="Run on this Ray cluster, which decides how many runs there are at once."
    ),
]
RayGpus = Annotated[
    float | None,
    typer.Option(min=0, help="Of a GPU for each process on the cluster, as 0.25; default: one, where it has any."),
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Choose each method's learning rate on validation, with seed 0, from its grid.")
]
Search = Annotated[
    str | None,
    typer.Option(
        metavar="grid|halving",
        help="Sweep, and train all candidates to their end (grid), or go on with the better quarter only, again and "
        "again (halving).",
    ),
]
Tries = Annotated[
    list[str] | None,
    typer.Option(
        "--try",
        metavar="KEY=VALUE,VALUE",
        help="Sweep over these values of an option too, or of METHOD.KEY: rep.tensor_rank=2,5,10. Repeatable.",
    ),
]
Rates = Annotated[str | None, typer.Option(help="Learning rates to sweep over in place of the grid: 1e-4,5e-4.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the runs with parameters, time and memory, and stop.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of every run, or METHOD.KEY=VALUE of a method: lora.r=4. Repeatable.",
    ),
]


def run_settings(given: Mapping[str, Any], sets: Sequence[str] | None) -> dict[str, Any]:
    """Options of every run: those given by their own flags, then those after ``--set``."""
    settings = {key: value for key, value in given.items() if value is not None}
    settings |= {ALIASES.get(key, key): value for key, value in map(parse_option, sets or [])}
    # read here, because a study computes with it before a run reads its options
    return settings | ({"sample": read_sample(settings["sample"])} if "sample" in settings else {})


def words(option: str, given: str | None) -> tuple[str, ...]:
    """The words between the commas of an option. Raises InputError where it is given and names nothing."""
    found = tuple(word.strip() for word in given.split(",")) if given is not None else ()
    if found and not any(found):
        raise InputError(f"{option} {given!r} names nothing: write words with commas between them, or leave it out")
    if not all(found):
        raise InputError(f"{option} {given!r} has a comma with nothing on one side of it: leave that comma out")
    return found


def _numbers(option: str, given: str | None, kind: type[N], wanted: str) -> tuple[N, ...]:
    try:
        return tuple(kind(word) for word in words(option, given))
    except ValueError:
        raise InputError(f"{option} {given!r} is not a list of {wanted}") from None


def learning_rates(given: str | None) -> tuple[float, ...]:
    """The value of ``--rates``."""
    rates = _numbers("--rates", given, float, "numbers: write 1e-4,5e-4")
    if any(rate <= 0 for rate in rates):
        raise InputError(f"--rates {given!r}: a learning rate must be above 0")
    return rates


def sweep_options(sweep: bool, search: str | None, rates: str | None, tries: Sequence[str] | None) -> dict[str, Any]:
    """The fields of Options for a sweep: what it tries, and how."""
    if search not in (None, "grid", "halving"):
        raise InputError(f"--search {search!r} is unknown: write grid or halving")
    values: dict[str, tuple[Any, ...]] = {}
    for word in tries or ():
        key, equals, given = word.partition("=")
        if not equals:
            raise InputError(f"--try {word!r} is not of the form KEY=VALUE,VALUE: write --try rep.tensor_rank=2,5")
        key = ALIASES.get(key, key)
        values[key] = tuple(dict.fromkeys(parse_option(f"{key}={value}")[1] for value in words(f"--try {key}", given)))
    return {
        "sweep": sweep or (search is not None and not values),
        "search": search or "grid",
        "rates": learning_rates(rates),
        "tries": values,
    }


def _refuse_fixed(settings: Mapping[str, Any], swept: Mapping[str, Any], *, batches: bool) -> None:
    """Raise InputError for an option that is given one value and is to be chosen among several."""
    from loretta.studies.configs import full_name

    def whole(key: str) -> str:
        method, *name = key.split(".")
        return ".".join([full_name(method), *name])

    of_rates = {"learning_rate": swept["sweep"] or swept["rates"], "batch_size": batches}
    tried = {*map(whole, swept["tries"]), *(key for key, is_tried in of_rates.items() if is_tried)}
    if fixed := next((key for key in settings if whole(key) in tried), None):
        raise InputError(
            f"{fixed}={settings[fixed]!r} is one value for all runs, and the sweep chooses among several: give it in "
            "--rates or --try, or leave the sweep out"
        )


def population_size(given: str) -> int | None:
    """The value of ``--population``; None for "auto"."""
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"--population {given!r} is no number of runs: write auto, or a whole number of at least 1")
    return int(given)


def ranks_of(given: str | None) -> list[int]:
    """The value of ``--ranks``."""
    return list(_numbers("--ranks", given, int, "whole numbers: write 2,5,10"))


def carry_out(
    study: "Study",
    root: Path,
    narrowed: Mapping[str, Any],
    *,
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
    """Run a study and print its results; with ``dry_run`` print what would run.

    ``narrowed`` are the models, tasks, ... that are asked for, ``given`` the options of every run, both by name.
    """
    from loretta.studies.compare import check_data, verdict
    from loretta.studies.configs import Options
    from loretta.studies.expansion import expand
    from loretta.studies.runner import check_runs, check_workers

    check_workers(jobs, ray, ray_gpus)
    together, is_comparison = population_size(population), study.view == "compare"
    whole = {"limit": given.pop("limit"), "data_dir": given.pop("data_dir"), "cpu": bool(given.pop("cpu"))}
    swept = sweep_options(sweep, search, rates, tries)
    settings = run_settings(given, sets)
    if settings.get("fsdp"):
        raise InputError(
            "--fsdp shares a run out over several processes, and a study has one for each run: leave it out"
        )
    _refuse_fixed(settings, swept, batches=bool(narrowed.get("batches")))
    options = Options(**narrowed, **whole, **swept, sets=settings)
    check_runs(expand(study, options, root).runs)
    if is_comparison:
        check_data(study, options, root)
    if dry_run:
        _dry_run(study, options, root, as_json=as_json)
        return
    from loretta.studies.paired import differences
    from loretta.studies.results import collect
    from loretta.studies.runner import run_study

    command = shlex.join(["loretta", *sys.argv[1:]])
    with following(root, jobs=jobs) as watch:
        where: Any = {"jobs": jobs, "ray": ray, "ray_gpus": ray_gpus, "say": partial(say, err=True)}
        summary = run_study(study, options, root, population=together, command=command, watch=watch, **where)
    results = collect(root, study.name)
    pairs = differences(results, root) if is_comparison else []
    found = verdict(results, pairs) if is_comparison else None
    if as_json:
        print_json(_as_document(results, summary, pairs, found))
    else:
        _say_results(results, summary, pairs, found)
        beside = "" if is_comparison else ", beside the paper's numbers"
        say(f"All of it{beside}: loretta report {shlex.quote(str(root))} -o report.html")
    if not summary.complete:
        raise typer.Exit(1)


def _as_document(
    results: "Results", summary: "Summary", pairs: "Sequence[Difference]", found: "Verdict | None"
) -> dict[str, Any]:
    from loretta.studies.compare import baseline_of

    compared: dict[str, Any] = {}
    if results.study.view == "compare":
        differences = [{**pair.model_dump(mode="json"), "clear": pair.clear} for pair in pairs]
        compared = {"baseline": baseline_of(results), "differences": differences}
    return {
        "outcomes": [dataclasses.asdict(outcome) for outcome in summary.outcomes],
        "notes": summary.notes,
        **compared,
        "verdict": found.words if found else None,
        "cells": [cell.model_dump(mode="json") for cell in results.cells],
    }


def _say_results(
    results: "Results", summary: "Summary", pairs: "Sequence[Difference]", found: "Verdict | None"
) -> None:
    from loretta.studies.show import compared_table, differences_table, results_table

    study = results.study
    if found is not None and not found.learned:
        say(found.words)
    console().print((compared_table if study.view == "compare" else results_table)(results))
    if pairs:
        console().print(differences_table(pairs, {cell.row: cell.label for cell in results.cells}))
    for note in dict.fromkeys([*study.notes, *summary.notes]):
        say(f"note: {note}")
    if found is not None and found.learned:
        say(found.words)
    say(_summary_words(summary))


def _dry_run(study: "Study", options: "Options", root: Path, *, as_json: bool) -> None:
    from loretta.studies.expansion import expand
    from loretta.studies.results import find_row
    from loretta.studies.runner import refuse_other_options
    from loretta.studies.show import estimate_table, total
    from loretta.studies.sizes import estimate
    from loretta.studies.state import state_of

    expansion = expand(study, options, root)
    refuse_other_options(root, expansion.runs)
    estimates, basis = estimate(root, expansion.runs)
    finished = sum(state_of(root, run)[0] == "finished" for run in expansion.runs)
    steps, seconds = (total(getattr(item, name) for item in estimates) for name in ("steps", "seconds"))
    if as_json:
        rows = [
            {
                **item.run.model_dump(mode="json"),
                "state": state_of(root, item.run)[0],
                "parameters": item.size.trained if item.size else None,
                **{key: getattr(item, key) for key in ("reason", "steps", "seconds", "memory_bytes")},
            }
            for item in estimates
        ]
        totals = {"runs": len(rows), "finished": finished, "steps": steps, "seconds": seconds}
        print_json({"study": study.name, **totals, "rests_on": basis, "notes": expansion.notes, "planned": rows})
        return
    printed = {}
    for run in expansion.runs:
        row = find_row(study, run.row, run.model)
        # the paper's count holds for the paper's model alone
        printed[run.model, run.row] = row.parameters if row and row.model == run.model else None
    console().print(estimate_table(estimates, printed, f"{study.name}: {study.title}"))
    say(f"{len(expansion.runs)} runs ({finished} finished), {steps or 0:,} steps, about {duration(seconds)} one by one")
    for note in (*basis, *expansion.notes):
        say(f"note: {note}")


def _summary_words(summary: "Summary") -> str:
    unfinished = [outcome for outcome in summary.outcomes if outcome.state not in ("finished", "stopped")]
    lines = [f"stopped by the search: {outcome.folder}: {outcome.reason}" for outcome in summary.of("stopped")]
    lines += [f"{outcome.state}: {outcome.folder}: {outcome.reason}" for outcome in unfinished]
    return "\n".join([f"{len(summary.of('finished'))} of {len(summary.outcomes)} runs are finished", *lines])
