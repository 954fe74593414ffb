"""Tables in Markdown, LaTeX and CSV: their readers see every text as it was, and obey none of it."""

import csv
import io

import pytest
from markdown_it import MarkdownIt
from report.pages import record

from loretta.report.tables import Cell, Column, Row, Table, number
from loretta.report.text import latex, markdown, runs_csv, runs_latex, runs_markdown

# text -> what Markdown's and CSV's readers see, and the LaTeX that shows it
HOSTILE = {
    "a|b": ("a|b", "a|b", r"a\textbar{}b"),
    "<script>alert(1)</script>": (
        "<script>alert(1)</script>",
        "<script>alert(1)</script>",
        r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}",
    ),
    "snake_case_*x*": ("snake_case_*x*", "snake_case_*x*", r"snake\_case\_*x*"),
    r"\input{/etc/passwd}": (r"\input{/etc/passwd}", r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
    "two\nlines": ("two lines", "two\nlines", "two lines"),
    "\x1b[2J\x9b1m": (r"\x1b[2J\x9b1m", r"\x1b[2J\x9b1m", r"\textbackslash{}x1b[2J\textbackslash{}x9b1m"),
    "a\u202eb": (r"a\u202eb", r"a\u202eb", r"a\textbackslash{}u202eb"),
    "a\u200f\u2066b\u200dc": (
        "a\\u200f\\u2066b\u200dc", "a\\u200f\\u2066b\u200dc", r"a\textbackslash{}u200f\textbackslash{}u2066b"
        "\u200dc",
    ),
    '=HYPERLINK("http://x")': ('=HYPERLINK("http://x")', '\'=HYPERLINK("http://x")', '=HYPERLINK("http://x")'),
    "-2+3+cmd|' /C calc'!A0": (
        "-2+3+cmd|' /C calc'!A0",
        "'-2+3+cmd|' /C calc'!A0",
        r"-2+3+cmd\textbar{}' /C calc'!A0",
    ),
    "@SUM(1)": ("@SUM(1)", "'@SUM(1)", "@SUM(1)"),
    "＝SUM(1)": ("＝SUM(1)", "'＝SUM(1)", "＝SUM(1)"),
    "[x](javascript:y)": ("[x](javascript:y)", "[x](javascript:y)", "{}[x](javascript:y)"),
    "`x` **y** ~~z~~ &amp; $1$": ("`x` **y** ~~z~~ &amp; $1$", "`x` **y** ~~z~~ &amp; $1$",
                                  r"`x` **y** \textasciitilde{}\textasciitilde{}z\textasciitilde{}\textasciitilde{} "
                                  r"\&amp; \$1\$"),
    "中文 é": ("中文 é", "中文 é", "中文 é"),
}  # fmt: skip


def table(word: str = "a", *, groups: tuple[str, str, str] = ("", "", "")) -> Table:
    """One row, headed by ``word``; the same word names a column, its metric, the table and its caption."""
    return Table(
        title=word,
        stubs=("Method", "Order"),
        columns=[Column(group, word, detail=word) for group in groups],
        rows=[Row(heads=(word, "1,2"), cells=[Cell(word), number(0.5), Cell("1.50", paper="2", note="1 of 2 seeds")])],
        caption=word,
    )


def shown(text: str) -> tuple[list[list[str]], list[str], list[str]]:
    """What Markdown's reader shows: the rows of its tables, the names of all tags, and other texts."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    rows: list[list[str]] = []
    others: list[str] = []
    tags = [child.tag for token in tokens for child in (token, *(token.children or ())) if child.tag]
    inside = ""
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        inside = token.type if token.type.endswith("_open") else inside
        if token.type == "inline":
            words = "".join(child.content for child in token.children or () if child.type in ("text", "text_special"))
            (rows[-1] if inside in ("td_open", "th_open") else others).append(words)
    return rows, tags, others


@pytest.mark.parametrize("word", HOSTILE)
def test_markdown_shows_the_text(word: str):
    seen = HOSTILE[word][0]
    rows, tags, others = shown(markdown(word, [("part", {word: word}, [word], [table(word)], [])]))
    assert rows == [
        ["Method", "Order", *3 * [f"{seen} ({seen})"]],
        [seen, "1,2", seen, "0.5000", "1.50 (1 of 2 seeds) [paper 2]"],
    ]
    assert others == [seen, "part", f"{seen}: {seen}", seen, seen, seen]
    assert {*tags} <= {"h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}


def test_markdown_has_numbers_to_the_right():
    lines = markdown("t", [("t", {}, [], [table()], [])]).splitlines()
    rule = next(line for line in lines if line.startswith("|:"))
    assert [cell.endswith(":") for cell in rule.strip("|").split("|")] == [False, False, True, True, True]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_a_command_cannot_leave_its_block():
    tokens = MarkdownIt("commonmark").parse(markdown("t", [("t", {}, [], [], ["echo 1\n```\n<b>\x1b[2J"])]))
    assert [token.content for token in tokens if token.type == "fence"] == ["echo 1\n```\n<b>\\x1b[2J\n"]


@pytest.mark.parametrize("word", HOSTILE)
def test_latex_shows_the_text(word: str):
    spelled = HOSTILE[word][2]
    inner = spelled.removeprefix("{}")
    text = latex([(table(word), [word])])
    lines = text.splitlines()
    assert lines[1] == "% " + HOSTILE[word][0]
    heads, row = (next(line for line in lines if line.startswith(start)) for start in ("Method", f"{spelled} & 1,2"))
    assert heads == " & ".join(["Method", "Order", *3 * [f"{spelled} ({inner})"]]) + r" \\"
    assert row == rf"{spelled} & 1,2 & {spelled} & 0.5000 & 1.50 (1 of 2 seeds) [paper 2] \\"
    assert rf"\caption{{{spelled}. {inner}}}" in lines


def test_latex_of_groups():
    text = latex([(table("x", groups=("A_1", "A_1", "B")), [])])
    assert (
        text
        == r"""% needs \usepackage{booktabs}
\begin{table}
\centering
\caption{x. x}
\begin{tabular}{llrrr}
\toprule
\multicolumn{2}{c}{} & \multicolumn{2}{c}{A\_1} & B \\
\cmidrule(lr){3-4} \cmidrule(lr){5-5}
Method & Order & x (x) & x (x) & x (x) \\
\midrule
x & 1,2 & x & 0.5000 & 1.50 (1 of 2 seeds) [paper 2] \\
\bottomrule
\end{tabular}
\end{table}

"""
    )


def test_no_rule_below_columns_without_a_group():
    assert r"\cmidrule(lr){3-3} \cmidrule(lr){5-5}" in latex([(table("x", groups=("A", "", "B")), [])])


@pytest.mark.parametrize("word", HOSTILE)
def test_csv_holds_the_text(word: str):
    text = runs_csv([record(method=word, command=word, validation={"accuracy": 0.5, word: -0.25})])
    (line,) = csv.DictReader(io.StringIO(text))
    seen = HOSTILE[word][1]
    assert line["method"] == line["command"] == seen
    assert line["validation." + seen.removeprefix("'")] == "-0.25"


def test_csv_has_numbers_in_full():
    records = [record(seed=1, test=None), record(seed=2, test={"accuracy": float("nan")}, best_step=12)]
    first, second = csv.DictReader(io.StringIO(runs_csv(records)))
    assert (first["seed"], second["seed"], second["best_step"]) == ("1", "2", "12")
    assert (first["test.accuracy"], second["test.accuracy"]) == ("", "nan")
    assert float(first["train_seconds"]) == records[0].train_seconds


def test_a_table_without_rows_has_its_heads():
    empty = Table(title="t", stubs=("Method",), columns=[Column("", "x")], rows=[])
    assert shown(markdown("t", [("t", {}, [], [empty], [])]))[0] == [["Method", "x"]]
    assert r"Method & x \\" in latex([(empty, [])])


def test_runs_have_the_same_numbers_in_both():
    one = record()
    rows, _, _ = shown(runs_markdown([one], []))
    (row,) = [line for line in runs_latex([one]).splitlines() if line.startswith(rows[1][0])]
    assert [cell.strip(" \\") for cell in row.replace(r"\%", "%").split("&")] == rows[1]
