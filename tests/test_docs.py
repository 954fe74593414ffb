"""Numbers in README and docs are those of the result files, and what they point to is there."""

import importlib.util
import json
import pathlib
import re
from collections import defaultdict
from statistics import mean

import pytest

import loretta

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


def searched(quick, score):
    """The means of the demo's search by method and learning rate."""
    points = defaultdict(lambda: defaultdict(list))
    for row in json.loads((ROOT / "benchmarks/results/learning_rates.json").read_text())["rows"]:
        if row["quick"] == quick:
            points[row["method"]][row["learning_rate"]].append(row[score])
    return {method: {rate: mean(scores) for rate, scores in of.items()} for method, of in points.items()}


def test_the_demo_uses_the_best_learning_rates_of_the_search():
    from loretta.cli.demo import LEARNING_RATES, QUICK_LEARNING_RATES
    from loretta.training.methods import METHODS

    best = {method: max(of, key=of.get) for method, of in searched(False, "validation").items()}
    assert {"compact": METHODS["compact"].learning_rate, **best} == LEARNING_RATES
    assert {method: max(of, key=of.get) for method, of in searched(True, "validation").items()} == QUICK_LEARNING_RATES


def test_lora_is_the_best_method_of_the_short_demo_as_the_readme_says():
    from loretta.cli.demo import QUICK_LEARNING_RATES

    scores = {method: of[QUICK_LEARNING_RATES[method]] for method, of in searched(True, "test").items()}
    assert max(scores, key=scores.get) == "lora"
    assert "in the mean of five seeds LoRA is the best of the six there" in " ".join(
        (ROOT / "README.md").read_text().split()
    )


def test_the_page_of_studies_says_how_far_estimates_were_off():
    rows = json.loads((ROOT / "benchmarks/results/estimates.json").read_text())["rows"]
    found = {name: sorted(round(row["ratios"][name], 2) for row in rows) for name in rows[0]["ratios"]}
    assert {*found["parameters"], *found["steps"]} == {1}
    words = " ".join((ROOT / "docs/studies.md").read_text().split())
    time, memory = found["seconds"], found["memory_bytes"]
    assert f"the time told was {time[0]} to {time[-1]} of the time taken" in words
    assert f"the memory {memory[0]} to {memory[-1]} of what the process held" in words
    assert f"The two shortest, {time[0]} and {time[1]}" in words
    assert f"without them it is {time[2]} and more" in words
    assert len(rows) == 11


PAGES = sorted(path for folder in ("", "docs", "examples") for path in (ROOT / folder).glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors_of(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):  # a page elsewhere
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_are_there(page):
    """The change log alone speaks of the past."""
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"`((?:src|benchmarks|docs|examples|tests)/[\w/.*-]+)`", text)
    missing = [name for name in files if not list(ROOT.glob(name.rstrip("/")))]
    for name in set(re.findall(r"\bloretta((?:\.[a-z_0-9]+)+)\b", text)):
        path = ROOT / "src" / "loretta" / name[1:].replace(".", "/")
        if not (path.is_dir() or path.with_suffix(".py").is_file() or name[1:] in loretta.__all__):
            missing.append(f"loretta{name}")
    assert not missing
