"""The short form of `make reliability`: kills at random moments, and the same end."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "reliability", Path(__file__).parents[2] / "benchmarks" / "reliability.py"
)
reliability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reliability)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked, so that none has to import torch")
def test_killed_runs_end_as_the_run_that_nobody_killed(tmp_path, recwarn):
    rows = reliability.measure(6, tmp_path, seed=1, methods=("rep", "adp", "shared"), accumulate=(2,))
    assert sum(row["kills"] for row in rows) >= 3
    assert [row for row in rows if not reliability.is_same(row)] == []


def test_the_page_is_what_was_measured():
    folder = reliability.ROOT / "benchmarks" / "results"
    results, night = (json.loads((folder / name).read_text()) for name in ("reliability.json", "fuzz.json"))
    assert reliability.DOC.read_text() == reliability.page(results, night)
    assert not night["failures"]
    assert results["same"] == sum(map(reliability.is_same, results["rows"]))
    assert results["kills"] == sum(row["kills"] for row in results["rows"])
