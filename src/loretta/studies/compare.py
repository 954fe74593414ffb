"""A user's own comparison as a study, and the advice that its results allow: which method, and how small."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import combine_pvalues

from loretta.errors import InputError
from loretta.studies.configs import Options, full_name
from loretta.studies.expansion import expand
from loretta.studies.paired import Difference
from loretta.studies.results import Cell, Results
from loretta.studies.study import Grid, Row, Study
from loretta.tasks.metrics import metric_range
from loretta.tasks.read import short_name
from loretta.training.baseline import CHANCE
from loretta.training.methods import find_method
from loretta.wording import listed

# a factor of 5 between neighbours, around the methods' defaults (loretta.training.methods)
RATES = (2e-4, 1e-3, 5e-3)
_RANKED = ("compact", "loretta_adp", "loretta_rep", "loretta_shared", "lora")


def comparison(
    data: str, methods: Sequence[str], *, ranks: Sequence[int] = (), seeds: int = 5, settings: Mapping[str, Any]
) -> Study:
    """The study that compares ``methods`` on ``data``, with one row for each of ``ranks`` where a method has a rank.

    ``settings`` are run options (text, label, epochs, ...). Raises InputError for an unknown method.
    """
    if any(rank < 1 for rank in ranks):
        raise InputError(f"--ranks {','.join(map(str, ranks))}: a rank is a whole number of at least 1")
    if not methods:
        raise InputError("--methods is empty: give at least two, for example lora,loretta_adp,loretta_rep,ia3")
    rows: dict[str, Row] = {}
    for given in methods:
        method = full_name(given)
        find_method(method)
        for row in _rows(method, ranks):
            rows[row.name] = row
    if ranks and not any(row.method in _RANKED for row in rows.values()):
        raise InputError(f"--ranks is for {listed(_RANKED)}, and --methods has none of them: leave it out")
    task = short_name(data)
    return Study(
        name="compare",
        title=f"Which method for {task}",
        view="compare",
        seeds=seeds,
        scale=1,
        tasks=(task,),
        protocol={**settings, "data": data},
        grids={row.method: Grid(learning_rate=RATES) for row in rows.values()},
        rows=tuple(rows.values()),
    )


def _rows(method: str, ranks: Sequence[int]) -> list[Row]:
    name = method.replace(":", "-")
    if method not in _RANKED or not ranks:
        return [Row(name=name, label=method, method=method)]
    return [
        Row(name=f"{name}-r{rank}", label=f"{method}, rank {rank}", method=method, options=_options(method, rank))
        for rank in ranks
    ]


def _options(method: str, rank: int) -> dict[str, Any]:
    if method == "lora":
        return {"r": rank, "lora_alpha": 2 * rank}  # the scale of the default
    # a bottleneck below the tensor rank would waste that rank
    return {"tensor_rank": rank, "r": max(8, rank)} if method == "loretta_rep" else {"tensor_rank": rank}


def check_data(study: Study, options: Options, root: Path) -> None:
    """Load the data once, as the runs will. Raises InputError as ``loretta.training.data.load_task_to_train`` does."""
    from loretta.training.data import load_task_to_train

    load_task_to_train(expand(study, options, root).runs[0].run_config())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the seeds show. ``best`` and ``smallest`` are names of rows; None where the seeds do not show any."""

    best: str | None
    smallest: str | None
    words: str
    learned: bool = True  # whether any method scores better than an answer that needs no text, beyond chance


def baseline_of(results: Results) -> float | None:
    """The score of an answer that needs no text (the commonest class, the mean), averaged over all runs; or None."""
    known = [s.baseline for cell in results.final() for s in cell.scores if s.baseline is not None]
    return statistics.fmean(known) if known else None


def learned(cell: Cell) -> bool:
    """Whether a method's runs beat an answer that needs no text by more than chance; True where nobody knows.

    The chances of the runs are combined by Fisher's method.
    """
    sign = 1 if cell.higher_is_better else -1
    gains = [sign * (score.value - score.baseline) for score in cell.scores if score.baseline is not None]
    chances = [score.chance for score in cell.scores if score.chance is not None]
    if gains and statistics.fmean(gains) <= 0:
        return False
    return not gains or len(chances) < len(gains) or float(combine_pvalues(chances).pvalue) <= CHANCE


def verdict(results: Results, pairs: Sequence[Difference] = ()) -> Verdict:
    """Whether anything was learned, the method of the best mean, and careful advice.

    ``pairs`` are the differences between that method and the others on the same rows; without them the advice names
    the smallest method whose interval over seeds reaches the best mean.
    """
    found = [cell for cell in results.final() if cell.mean is not None and cell.task in results.study.tasks]
    cells = [cell for cell in found if math.isfinite(_mean(cell))]
    diverged = [cell.label for cell in found if cell not in cells]
    lost = f" A run of {', '.join(diverged)} diverged, which leaves no mean to compare." if diverged else ""
    if not cells:
        words = lost.strip() or "No run is finished, so there is nothing to compare."
        return Verdict(best=None, smallest=None, words=words)
    sign = 1 if cells[0].higher_is_better else -1
    best = max(cells, key=lambda cell: sign * _mean(cell))
    if not any(map(learned, cells)):
        return Verdict(best=None, smallest=None, words=_nothing_learned(results, cells) + lost, learned=False)
    idle = [cell.label for cell in cells if not learned(cell)]
    if idle:
        lost = f" Nothing was learned by {', '.join(idle)}: try other --rates for it, with --sweep.{lost}"
    words = f"{best.label} has the best mean {best.metric} ({_figures(best)}) with {_size(best)}.{lost}"
    if pairs and all(cell is best or any(pair.other == cell.row for pair in pairs) for cell in cells):
        return _by_rows(best, cells, {pair.other: pair for pair in pairs}, words)
    if any(cell.low is None for cell in cells):
        return Verdict(
            best=best.row,
            smallest=None,
            words=f"{words} With fewer than two finished seeds for a method there is no interval, so this says little "
            "about which method is better: give --seeds 5 or more.",
        )
    # of each interval the end on the better side
    ends = [(cell, (cell.high if sign > 0 else cell.low) or 0.0) for cell in cells]
    reach = [cell for cell, end in ends if cell is best or sign * end >= sign * _mean(best)]
    smallest = min(reach, key=lambda cell: cell.parameters or 0)
    if len(cells) == 1:
        return Verdict(best=best.row, smallest=None, words=f"{words} There is no other method to compare it with.")
    seeds = "" if all(cell.finished == cell.asked for cell in cells) else " Some seeds are missing."
    if len(reach) == len(cells):
        words += (
            f" The 95% interval of every other method reaches that mean: on these {best.finished} seeds the data "
            f"cannot tell the methods apart. The smallest is {smallest.label} "
            f"({_figures(smallest)}, {_size(smallest)})."
        )
    elif smallest is best:
        words += " No smaller method's 95% interval reaches that mean."
    else:
        words += (
            f" The smallest method whose 95% interval reaches that mean is {smallest.label} ({_figures(smallest)}, "
            f"{_size(smallest)}): the seeds show no difference between the two, which is not proof that there is none."
        )
    return Verdict(best=best.row, smallest=smallest.row, words=words + seeds)


def _nothing_learned(results: Results, cells: Sequence[Cell]) -> str:
    scores = [score.value for cell in cells for score in cell.scores]
    found = f"{min(scores):.4f}" if min(scores) == max(scores) else f"{min(scores):.4f} to {max(scores):.4f}"
    longer = "--max-steps" if any((run.config or {}).get("max_steps") for run in results.planned) else "--epochs"
    beyond = "" if all(score.value == score.baseline for cell in cells for score in cell.scores) else " beyond chance"
    return (
        f"Nothing was learned{beyond}: the methods score {cells[0].metric} {found}, and an answer that needs no text "
        f"{baseline_of(results):.4f}, so this says nothing about which method is better. Advice: give more "
        f"{longer}, a higher --lr, or --sweep with other --rates before you compare."
    )


def _by_rows(best: Cell, cells: Sequence[Cell], pairs: Mapping[str, Difference], words: str) -> Verdict:
    level = [best, *(cell for cell in cells if cell is not best and not pairs[cell.row].clear)]
    smallest = min(level, key=lambda cell: cell.parameters or 0)
    any_pair = next(iter(pairs.values()))
    on = f"{any_pair.rows:,} rows and {any_pair.seeds} seed{'s' * (any_pair.seeds != 1)}"
    if len(level) == 1:
        advice = f"take {best.label}: on {on} every other method is clearly worse."
    elif smallest is best:
        others = ", ".join(cell.label for cell in level if cell is not best)
        advice = f"take {best.label}: {on} do not tell it from {others}, and it is the smallest of them."
    else:
        pair = pairs[smallest.row]
        advice = (
            f"take {smallest.label} ({_size(smallest)}): its distance to {best.label}, {pair.mean:+.4f} (95% interval "
            f"{pair.low:+.4f} to {pair.high:+.4f}), may be chance on {on}."
        )
    return Verdict(best=best.row, smallest=smallest.row, words=f"{words} Advice: {advice}")


def _mean(cell: Cell) -> float:
    assert cell.mean is not None
    return cell.mean


def _figures(cell: Cell) -> str:
    return f"{cell.mean:.4f}{ends_of(cell, ', 95% interval ')}"


def ends_of(cell: Cell, before: str = "") -> str:
    """The interval over seeds as "0.7500 to 1.0000", cut off at the ends of the metric's range."""
    if cell.low is None or cell.high is None:
        return ""
    least, most = metric_range(cell.metric)
    return f"{before}{max(cell.low, least):.4f} to {min(cell.high, most):.4f}"


def _size(cell: Cell) -> str:
    return f"{cell.parameters:,} trained parameters" if cell.parameters is not None else "an unknown size"
