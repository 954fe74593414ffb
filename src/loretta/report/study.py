"""The results of studies -> the sections of a page: facts, tables, figures, what is missing and how to repeat it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loretta.errors import InputError
from loretta.report import page
from loretta.report.figures import Look
from loretta.report.study_figures import Group, figures_of
from loretta.report.study_tables import QUANTITIES, Anchors, key_of, record_of, tables_of
from loretta.report.tables import Table, words_table
from loretta.studies.results import AVERAGE, Results, Score, find_row
from loretta.studies.results import Cell as Measured
from loretta.studies.show import printed_models, with_half
from loretta.studies.state import measured, state_of
from loretta.studies.study import Planned
from loretta.wording import MISSING, distinct, grouped

SHOWN = {"models", "tasks", "methods"}  # options that the page shows elsewhere, as what was run


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """Where one number of a table comes from."""

    anchor: str
    title: str
    scores: Sequence[Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One study as the page shows it."""

    name: str
    title: str
    facts: Mapping[str, str]
    verdict: str  # "" unless the study is a comparison
    notes: Sequence[str]
    tables: Sequence[Table]
    groups: Sequence[Group]
    missing: Table | None
    commands: Sequence[str]  # as they were typed
    numbers: Mapping[str, Sequence[Number]]  # heading (method and model) -> its numbers


def section_of(results: Results, root: Path, *, number: int = 1) -> Section:
    """The section of one study. Its runs are below ``root``; ``number`` tells its ids from those of other sections."""
    study = results.study
    own = [cell for cell in results.cells if cell.task != AVERAGE]
    anchors = {key_of(cell): f"study{number}-{k}" for k, cell in enumerate(own, start=1) if cell.scores}
    rows = dict.fromkeys([*(run.row for run in results.planned), *(cell.row for cell in results.cells)])
    looks = {row: Look.of(index) for index, row in enumerate(rows)}
    return Section(
        name=study.name,
        title=study.title,
        facts=_facts(results, root),
        verdict=_verdict(results, root),
        notes=_notes(results),
        tables=tables_of(results, root, anchors, looks),
        groups=figures_of(results, root, looks),
        missing=_missing(own),
        commands=results.commands,
        numbers=_numbers(own, anchors, study.scale),
    )


def render(sections: Sequence[Section]) -> str:
    """The page as HTML text, which needs no other file. All text of the runs is shown literally."""
    return page.render(
        "studies.html.j2",
        title=title_of(sections),
        sections=[
            (
                f"study-{k}",
                section,
                [
                    (group, page.drawn(group.charts, prefix=f"study{k}-group{n}-chart"))
                    for n, group in enumerate(section.groups, start=1)
                ],
            )
            for k, section in enumerate(sections, start=1)
        ],
    )


def title_of(sections: Sequence[Section]) -> str:
    return sections[0].title if len(sections) == 1 else ", ".join(section.name for section in sections)


def _facts(results: Results, root: Path) -> dict[str, str]:
    runs = [run for run in results.planned if not run.candidate]
    states = [(run, state_of(root, run)[0]) for run in runs]
    finished = [run for run, state in states if state == "finished"]
    records = [record for run in finished if (record := record_of(root, run)) is not None]
    devices = [record.device for record in records] or [_timed_on(root, run) for run in finished if run.kind == "cost"]
    counts = Counter(state for _, state in states)
    others = "".join(f", {count} {state}" for state, count in counts.items() if state != "finished")
    options = {key: value for key, value in results.options.items() if value and key not in SHOWN}
    versions = [f"{name} {version}" for record in records for name, version in record.versions.items()]
    facts = {
        "Study": results.study.name,
        "In the paper": results.study.source,
        "Model": distinct(run.model for run in runs),
        "Tasks": distinct(task for run in runs for task in run.order or (run.task,)),
        "Runs": f"{counts['finished']} of {len(runs)} finished{others}",
        "Options": " · ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in options.items()),
        "Device": distinct(filter(None, devices)),
        "Versions": distinct(versions),
    }
    return {name: value for name, value in facts.items() if value}


def _timed_on(root: Path, run: Planned) -> str:
    try:
        return measured(root / run.folder / "cost.json").get("device") or ""
    except InputError:
        return ""


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "yes" if value is True else str(value)


def _verdict(results: Results, root: Path) -> str:
    """What `loretta compare` says of its results."""
    if results.study.view != "compare":
        return ""
    from loretta.studies.compare import verdict
    from loretta.studies.paired import differences

    return verdict(results, differences(results, root)).words


def _notes(results: Results) -> list[str]:
    """Why the numbers differ from the paper's, then the notes of the study, of its rows and of its runs."""
    notes = []
    cells = [cell for cell in results.cells if cell.scores]
    others = {cell.model for cell in cells if cell.printed is not None and cell.model != cell.printed_model}
    if others:
        models = " and ".join(printed_models(cells))
        notes.append(f"The paper's numbers are for {models}, these runs are of {' and '.join(sorted(others))}.")
    if (limit := results.options.get("limit")) and results.study.kind == "train":
        notes.append(f"At most {limit:,} rows of each split were used, so the scores are not those of the whole task.")
    own = [cell for cell in results.cells if cell.task != AVERAGE]
    if few := sum(0 < cell.finished < cell.asked for cell in own):
        notes.append(f"{few} of {len(own)} numbers are of fewer seeds than were asked for.")
    if without := sum(not cell.scores for cell in own):
        notes.append(f"{without} of {len(own)} numbers are not there yet.")
    for model, task in dict.fromkeys((cell.model, cell.task) for cell in own if cell.stage is None):
        alike = [cell for cell in own if (cell.model, cell.task) == (model, task) and cell.scores]
        if len(alike) > 1 and len({score.value for cell in alike for score in cell.scores}) == 1:
            notes.append(f"{task}: all methods score the same with {model}, as where each gives every row one answer.")
    notes += results.study.notes
    rows = [find_row(results.study, cell.row, cell.model) for cell in results.cells]
    notes += [f"{row.label}: {row.note}" for row in rows if row and row.note]
    of_task: dict[str, dict[str, None]] = {}
    for cell in cells:
        # an adapter of a sequence is scored on every task, but its notes are about the task that it was trained on
        task = cell.task if cell.stage is None else cell.order[cell.stage - 1]
        of_task.setdefault(task if results.study.kind == "train" else "", {}).update(dict.fromkeys(cell.notes))
    # tasks with the same notes share one sentence
    same_words = grouped(of_task, lambda task: "; ".join(of_task[task]))
    notes += [f"{', '.join(tasks)}: {words}" if any(tasks) else words for words, tasks in same_words.items() if words]
    return list(dict.fromkeys(notes))


def _missing(cells: Sequence[Measured]) -> Table | None:
    """The runs without a number. Tasks of one method that lack the same seeds for the same reason share a row."""
    seeds: dict[tuple[str, str, str, str, str], dict[str, int]] = {}
    for cell in cells:
        for missing in cell.missing:
            # one run of a sequence gives several numbers
            task = " → ".join(cell.order[: cell.stage]) if cell.order else cell.task
            key = (cell.label, cell.model, task, missing.state, missing.reason)
            seeds.setdefault(key, {})[missing.folder] = missing.seed
    if not seeds:
        return None
    alike: dict[tuple[str, str, str, str, str], dict[str, list[str]]] = {}
    for (label, model, task, state, reason), folders in seeds.items():
        numbers = ", ".join(map(str, folders.values()))
        alike.setdefault((label, model, numbers, state, reason), {})[task] = list(folders)
    rows = []
    for (label, model, numbers, state, reason), of_task in alike.items():
        # a waiting run has no folder to look into
        shown = [folder for names in of_task.values() for folder in names if state != "waiting"]
        rows.append((label, model, ", ".join(of_task), numbers, state, reason, ", ".join(shown) or MISSING))
    names = ("model", "task", "seed", "state", "reason", "folder")
    return words_table("Runs without a number", "Method", names, rows)


def _numbers(cells: Iterable[Measured], anchors: Anchors, scale: float) -> dict[str, list[Number]]:
    numbers: dict[str, list[Number]] = {}
    for cell in cells:
        if cell.scores:
            steps = f" after {' → '.join(cell.order[: cell.stage])}" if cell.order else ""
            split = f" on {cell.split}" if cell.split else ""
            metric = f"{cell.metric}{split} " if cell.metric != cell.task else ""
            value = with_half(cell.mean, cell.high, scale)
            title = f"{QUANTITIES.get(cell.task, cell.task)}{steps}: {metric}{value}, {cell.seeds}"
            numbers.setdefault(f"{cell.label}, {cell.model}", []).append(
                Number(anchor=anchors[key_of(cell)], title=title, scores=cell.scores)
            )
    return numbers
