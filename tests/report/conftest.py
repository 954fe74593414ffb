"""A study of two methods on two tasks, of which one run failed; figures that are drawn once."""

from pathlib import Path

import pytest
from report.study_runs import SST2, Folder

from loretta.report import figures, page

_drawn: dict[str, object] = {}


@pytest.fixture(autouse=True)
def each_figure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests look at the rest of a page, whose figures matplotlib draws for a fifth of a second each."""

    def svg(chart: figures.Chart | figures.Bars, *, prefix: str) -> object:
        key = f"{prefix} {chart!r}"
        if key not in _drawn:
            _drawn[key] = figures.svg(chart, prefix=prefix)
        return _drawn[key]

    monkeypatch.setattr(page, "svg", svg)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Folder(tmp_path)
    made.score("big", "sst2", SST2)
    made.score("big", "mrpc", (0.8, 0.9, None))
    made.score("small", "sst2", (0.6, 0.6, 0.6))
    made.score("small", "mrpc", (0.5, 0.6, 0.7))
    return made.write()
