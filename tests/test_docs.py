"""Numbers in README and docs are those of the result files."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load("tables")


@pytest.mark.parametrize(("file", "name"), TABLES.SECTIONS)
def test_a_table_is_what_its_result_file_says(file, name):
    text = (ROOT / file).read_text()
    assert TABLES.filled(text, name, TABLES.SECTIONS[file, name]()) == text


def test_the_counts_page_is_what_the_presets_plan():
    assert (ROOT / "docs" / "counts.md").read_text() == load("counts").page()


def test_the_demo_uses_the_best_learning_rates_of_the_search():
    import json
    from collections import defaultdict
    from statistics import mean

    from loretta.cli.demo import LEARNING_RATES

    points = defaultdict(list)
    for row in json.loads((ROOT / "benchmarks/results/learning_rates.json").read_text())["rows"]:
        points[row["method"], row["learning_rate"]].append(row["validation"])
    for method, rate in LEARNING_RATES.items():
        scores = {other: mean(values) for (name, other), values in points.items() if name == method}
        assert max(scores, key=scores.get) == rate, method
