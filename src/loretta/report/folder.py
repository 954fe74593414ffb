"""A folder of runs -> a report in any format: on its studies, or on its runs where it holds no study."""

from collections.abc import Callable, Mapping
from pathlib import Path

from loretta.errors import InputError
from loretta.folders import no_folder
from loretta.record import RunRecord
from loretta.report import runs, study, text
from loretta.report.study import section_of
from loretta.studies.results import collect_all
from loretta.studies.state import find_runs

FORMATS = ("html", "md", "csv", "json", "latex")
SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".csv": "csv", ".json": "json", ".tex": "latex"}


def report_on(root: Path, form: str) -> str:
    """Report on a folder as ``form``, one of FORMATS.

    Raises InputError for another format, and when the folder holds neither a study nor a finished run.
    """
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}")
    if not root.is_dir():
        raise InputError(f"{no_folder(root)}: give the --output of a study, or a folder with runs")
    if not any(root.glob("study*.json")):
        return _of_runs(root, form)
    studies = collect_all(root)
    if form == "csv":
        return text.studies_csv(studies)
    if form == "json":
        return text.studies_json(studies)
    sections = [section_of(results, root, number=number) for number, results in enumerate(studies, start=1)]
    if form == "md":
        return text.studies_markdown(study.title_of(sections), sections)
    return text.studies_latex(sections) if form == "latex" else study.render(sections)


def _of_runs(root: Path, form: str) -> str:
    found = list(find_runs(root))
    records, damaged = [], []
    for folder, state, _ in found:
        try:
            if state == "finished" and (folder / "run.json").is_file():
                records.append(RunRecord.load(folder / "run.json"))
        except InputError as error:  # one damaged record must not hide the others
            damaged.append(f"left out: {error}")
    if damaged and not records:
        raise InputError(damaged[0].removeprefix("left out: "))
    if not records:
        raise InputError(
            f"'{root}' holds neither a study nor a finished run: `loretta runs ls '{root}'` shows its state"
        )
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    notes += [f"{folder.relative_to(root)}: {state}, {why}" for folder, state, why in found if state != "finished"]
    notes += damaged
    write: Mapping[str, Callable[[], str]] = {
        "html": lambda: runs.render(records, notes=notes),
        "md": lambda: text.runs_markdown(records, notes),
        "csv": lambda: text.runs_csv(records),
        "json": lambda: text.runs_json(records, notes),
        "latex": lambda: text.runs_latex(records),
    }
    return write[form]()
