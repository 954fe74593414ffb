"""Which runs of a study are trained together, and what the user is told where they cannot be."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.studies.sizes import estimate, kind_and_labels
from loretta.studies.state import state_of
from loretta.studies.study import Planned
from loretta.training.config import RunConfig
from loretta.wording import duration, grouped

MOST_TOGETHER = 64  # more runs do not keep a GPU busier (benchmarks/population.py)


def units(ready: Sequence[Planned], population: int, workers: int) -> list[list[Planned]]:
    """Divide the runs that can start into those that one process trains at once; every worker gets some."""
    groups: dict[Any, list[Planned]] = defaultdict(list)
    for run in ready:
        key = _key(run) if population > 1 else None
        groups[run.folder if key is None else (*key, run.until)].append(run)
    found = []
    for group in groups.values():
        size = min(population, -(-len(group) // workers))
        found += [group[k : k + size] for k in range(0, len(group), size)]
    return found


def _key(run: Planned) -> tuple[Any, ...] | None:
    """What runs must have in common to be trained together; None for a run that is trained alone."""
    from loretta.population.training import population_key

    if run.kind != "train" or run.config is None or why_alone(run.run_config()) is not None:
        return None
    return population_key(run.run_config())


def why_alone(config: RunConfig) -> str | None:
    """The option, or the kind of data, for which a run cannot be trained with others; None where there is none."""
    from loretta.population import training

    if (option := training.why_alone(config)) is not None:
        return option
    try:
        kind, _ = kind_and_labels(config, config.model)
    except InputError:  # which the run will say itself
        return None
    return None if kind in training.TOGETHER else f"'{config.data}' ({kind.replace('_', ' ')})"


def words_before(root: Path, runs: Sequence[Planned], population: int) -> str | None:
    """A sentence on the unfinished runs that are trained one by one: how many, how long, why; None without any."""
    from loretta.studies.show import total

    trained = (run for run in runs if population > 1 and run.kind == "train")
    unfinished = (run for run in trained if state_of(root, run)[0] not in ("finished", "stopped"))
    cells = grouped(unfinished, lambda run: run.cell)
    reasons: dict[str, list[Planned]] = defaultdict(list)
    for group in cells.values():
        known = next((run for run in group if run.config is not None), None)
        if known is not None and len(group) > 1 and (reason := why_alone(known.run_config())) is not None:
            reasons[reason] += group
    if not reasons:
        return None
    alone = [run for group in reasons.values() for run in group]
    seconds = total(item.seconds for item in estimate(root, alone)[0])
    return (
        f"{len(alone):,} of {len(runs):,} runs train one by one, about {duration(seconds)} in all without evaluation: "
        f"populations do not take {', nor '.join(reasons)}"
    )
