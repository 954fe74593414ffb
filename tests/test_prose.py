"""The figures in the prose of the evidence are those of its tables and result files, and none is held by nothing."""

import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import cited  # noqa: E402
import prose  # noqa: E402

PAGES = pytest.mark.parametrize("page", prose.SENTENCES, ids=lambda page: page.name)


@PAGES
def test_each_sentence_says_what_was_measured(page):
    assert list(prose.stale(page, page.read_text())) == []


@PAGES
def test_each_figure_of_the_prose_has_a_source(page):
    assert list(prose.unheld(page, page.read_text())) == [], "a line of benchmarks/prose.txt says whence it comes"


@PAGES
def test_what_is_called_level_above_or_below_is_so(page):
    assert list(prose.misworded(page, page.read_text())) == []


@PAGES
def test_what_is_said_without_a_figure_is_so(page):
    assert list(prose.untrue(page, page.read_text())) == []


def test_rows_that_change_make_what_is_said_untrue(monkeypatch):
    def better(row):
        ahead = {rate: [score + 0.2 for score in scores] for rate, scores in row["official"].items()}
        return {**row, "official": ahead} if (row["method"], row["task"]) == ("rep", "cola") else row

    rows = [better(row) for row in cited.front() if row.get("part", "front") == "front"]
    monkeypatch.setattr(cited, "front", lambda: rows)
    cited.board.cache_clear()
    found = list(prose.untrue(prose.PAGE, prose.PAGE.read_text()))
    cited.board.cache_clear()
    (line,) = (line for line in found if "frozen norms loses to LoRA r=1 on both encoders" in line)
    assert line.endswith("is not so")


def test_a_wrong_word_is_found():
    right = "It is level with A (+.003 ± .013, -.010 ± .012), .020 ± .013 above B, and below C (-.02 ± .01; 36,864)."
    assert not list(prose.misworded(prose.PAGE, f"# A\n\n{right}\n"))
    for old, new in (("level", "below"), (".003", ".014"), (".020", ".012"), ("below", "above"), ("below", "level")):
        assert len(list(prose.misworded(prose.PAGE, f"# A\n\n{right.replace(old, new)}\n"))) >= 1, (old, new)


@PAGES
def test_figures_are_written_anew(page):
    text = page.read_text()
    tables = {found.span() for found in prose.MADE.finditer(text)}

    def other(found):
        inside = any(begin <= found.start() < end for begin, end in tables)
        return found[0] if inside else f"{found[1]}{(int(found[2]) + 5) % 10}"

    spoiled = re.sub(r"(\.\d\d)(\d)(?= ± )", other, text)
    assert spoiled == text or list(prose.stale(page, spoiled))
    assert list(prose.stale(page, prose.filled(page, spoiled))) == []
    assert prose.filled(page, text) == text


@pytest.mark.parametrize(
    ("stated", "value", "said"),
    [
        (".010", 0.0123, ".012"), ("+.003", -0.0041, "-.004"), ("-.5", 1.26, "+1.3"), ("37,632", 4000, "4,000"),
        ("1.5e-3", 0.0025, "2.5e-3"), ("Seven", 9, "Nine"), ("third", 0.24, "quarter"), ("twice", 2, "twice"),
        # what has no such form is left for a reader to change
        (".010", -0.02, ".010"), ("seven", 7.5, "seven"), ("seven", 70, "seven"),
    ],
)  # fmt: skip
def test_a_value_takes_the_form_of_the_figure_before_it(stated, value, said):
    assert prose.said_as(stated, value) == said


@PAGES
def test_no_figure_of_a_sentence_could_be_another(page):
    """Each one is refused where it stands with another last figure, by two where what was rounded is rounded again."""
    parts = [part for _, part in prose.sections(page.read_text())]
    for sentence, values in prose.said(page):
        (found, *_) = [found for part in parts if (found := prose.pattern(sentence).search(part))]
        for stated, value in zip(found.groups(), values, strict=True):
            if re.fullmatch(r"[+-]?[\d,]*\.?\d+", stated):
                digits = len(stated.partition(".")[2])
                step = (2 if digits in (1, 2) else 1) * 10.0**-digits
                for other in (f"{float(stated.replace(',', '')) + sign * step:.{digits}f}" for sign in (-1, 1)):
                    assert not prose.agrees(other, value), f"{sentence}: {stated} or {other}"
            elif stated.lower() in prose.NUMBERS:
                others = [word for word, number in prose.NUMBERS.items() if number != prose.NUMBERS[stated.lower()]]
                assert not any(prose.agrees(other, value) for other in others)


def test_a_table_that_changes_makes_its_sentence_stale(tmp_path, monkeypatch):
    text = cited.PAGE.read_text()
    changed = text.replace("| 0.500 (37,632)", "| 0.511 (37,632)")
    assert changed != text
    (tmp_path / "RESULTS.md").write_text(changed)
    monkeypatch.setattr(cited, "PAGE", tmp_path / "RESULTS.md")
    prose.said.cache_clear()
    (line,) = prose.stale(prose.PAGE, changed)
    assert "says .500 where 0.511 was measured" in line
    prose.said.cache_clear()


def test_what_nobody_measured_is_found():
    text = "## More\n\nIt gains .123 and .045 ± .012, trains 37,632 or 12,345 numbers at 1.5e-3 or 1.7e-9 (RTE .45).\n"
    assert [re.search(r": (\S+) in", line)[1] for line in prose.unheld(prose.PAGE, text)] == [
        ".123", ".045", ".012", "12,345", "1.7e-9", ".45",
    ]  # fmt: skip
    assert len(list(prose.stale(prose.PAGE, text))) == len(prose.said(prose.PAGE))


def test_what_is_excused_is_there():
    texts = [part for page in prose.SENTENCES for part in prose.sections(page.read_text())]
    assert [piece for piece in prose.UNSOURCED if not any(piece in text for _, text in texts)] == []
    assert [name for name in prose.LEFT_OUT if not any(heading.startswith(name) for heading, _ in texts)] == []


@pytest.mark.parametrize(
    ("stated", "value", "right"),
    [
        (".832", 0.8324, True), (".832", 0.8326, False), ("-.02", -0.02, True), (".48", 0.4775, True),
        (".48", 0.471, False), ("7.5", 7.52, True), ("118", 118.2, True), ("118", 118.6, False),
        ("37,632", 37632, True), ("1.7e-3", 0.0017, True), ("1.7e-3", 0.0018, False), ("1e-2", 0.01, True),
        ("seven", 7, True), ("Seven", 8, False), ("third", 0.31, True), ("quarter", 0.31, False), ("half", 0.57, True),
        ("none", 0, True), ("none", 1, False),
    ],
)  # fmt: skip
def test_a_figure_is_right_at_its_own_decimals(stated, value, right):
    assert prose.agrees(stated, value) == right
