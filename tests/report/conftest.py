"""A study of two methods on two tasks, of which one run failed."""

from pathlib import Path

import pytest
from report.study_runs import SST2, Folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Folder(tmp_path)
    made.score("big", "sst2", SST2)
    made.score("big", "mrpc", (0.8, 0.9, None))
    made.score("small", "sst2", (0.6, 0.6, 0.6))
    made.score("small", "mrpc", (0.5, 0.6, 0.7))
    return made.write()
