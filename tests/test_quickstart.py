"""The transcript in the docs is what its commands print today."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "docs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_hour_prints_what_the_page_says(quickstart, tmp_path):
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for heading, words, commands in quickstart.transcript(tmp_path):
        assert words in text
        written = text.partition(f"## {heading}\n")[2].partition("```text\n")[2].partition("```\n")[0]
        assert quickstart.masked(written) == quickstart.masked(quickstart.block(commands)), heading


def test_what_answers_at_once_takes_less_than_a_second_each(quickstart):
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for command in quickstart.AT_ONCE:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{command}` |"))
        assert float(row.split("|")[2]) < 1


def test_the_mask_hides_times_and_fractions_and_nothing_else(quickstart):
    masked = quickstart.masked
    assert masked("loss 0.6931, 12 rows, 3 s") == masked("loss 0.7, 12 rows, 45 s")
    assert masked("12 rows") != masked("13 rows")
    assert masked("accuracy 0.5") != masked("macro_f1 0.5")


def test_new_times_alone_change_no_file_and_anything_else_does(quickstart, tmp_path, monkeypatch):
    page, seconds = tmp_path / "page.md", tmp_path / "seconds.json"
    monkeypatch.setattr(quickstart, "SECONDS", seconds)
    text = "loss 0.69, 0.7869673371315002, 3 s\nfirst  finished  0.52   3   1e-06\n| `loretta --help` | 0.38 |\n"
    later = "loss 0.69, 0.7869672179222107, 12 s\nfirst  finished  0.52  12   1e-06\n| `loretta --help` | 0.41 |\n"
    quickstart.write(page, text, "[3]")
    quickstart.write(page, later, "[12]")
    assert (page.read_text(), seconds.read_text()) == (text, "[3]")
    for old, new in (("0.69", "0.68"), ("0.52", "0.53"), ("--help", "--halp"), ("1e-06", "1e-05")):
        quickstart.write(page, later.replace(old, new), "[12]")
        assert (page.read_text(), seconds.read_text()) == (later.replace(old, new), "[12]")
        quickstart.write(page, text + "x", "[3]")
