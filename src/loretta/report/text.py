"""The report's tables and data in the formats that other programs read: Markdown, CSV, JSON and LaTeX."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pandas as pd

from loretta.record import KINDS, RunRecord
from loretta.report.runs import facts_of, labels_of, table_of, title_of
from loretta.report.study import Section
from loretta.report.tables import Cell, Table
from loretta.studies.results import Results
from loretta.wording import OBEYED, as_json, printable

# pandas' own escape covers neither the caption nor the characters that pdfLaTeX's fonts lack
LATEX = {
    **{character: f"\\{character}" for character in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # fonts of pdfLaTeX lack these
    "±": r"$\pm$",
    "×": r"$\times$",
    "÷": r"$\div$",
    "→": r"$\rightarrow$",
    "∞": r"$\infty$",
    "−": "$-$",
    "–": "--",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
}


def markdown(
    title: str, parts: Iterable[tuple[str, Mapping[str, str], Sequence[str], Sequence[Table], list[str]]]
) -> str:
    """Headings, facts, tables, notes and commands. ``parts`` are (heading, facts, notes, tables, commands)."""
    blocks = [f"# {_md(title)}"]
    for heading, facts, notes, tables, commands in parts:
        if heading != title:
            blocks.append(f"## {_md(heading)}")
        blocks.append("\n".join(f"- {_md(name)}: {_md(value)}" for name, value in facts.items()))
        for table in tables:
            blocks += [f"### {_md(table.title)}", _md_table(table), _md(table.caption)]
        blocks.append("\n".join(f"- {_md(note)}" for note in notes))
        if commands:
            text = "\n".join(map(_inert, commands))
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            blocks.append(f"{fence}sh\n{text}\n{fence}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _md(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it literally."""
    return re.sub(r"([\\`*_\[\]<>&|$~#])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return _inert(" ".join(text.split()))


def _inert(text: str) -> str:
    """The text with control and hidden characters spelled out, and its line ends kept."""
    return OBEYED.sub(lambda found: printable(found[0]), text)


def _md_table(table: Table) -> str:
    heads = [*table.stubs, *(f"{c.group}: {c.heading}" if c.group else c.heading for c in table.columns)]
    rows = [[*map(_md, [*row.heads, *map(_words, row.cells)])] for row in table.rows]
    return pd.DataFrame(rows, columns=[*map(_md, heads)]).to_markdown(
        index=False,
        disable_numparse=True,  # the cells are words: they stay as they are
        colalign=["left" if k < len(table.stubs) or table.of_words else "right" for k in range(len(heads))],
    )


def _words(cell: Cell) -> str:
    """The number, how many seeds it has where some are missing, and the paper's number in brackets."""
    return f"{cell.text}{f' ({cell.note})' if cell.note else ''}{f' [paper {cell.paper}]' if cell.paper else ''}"


def latex(tables: Iterable[tuple[Table, Sequence[str]]]) -> str:
    """A ``table`` environment of the package booktabs for each table, under comments that say where it is from."""
    return "\n".join(["% needs \\usepackage{booktabs}", *(_tex_table(*each) for each in tables), ""])


def _tex_table(table: Table, comments: Sequence[str]) -> str:
    grouped = any(name for name, _ in table.groups)
    heads = [*map(_tex, [*table.stubs, *(column.heading for column in table.columns)])]
    groups = [*("" for _ in table.stubs), *(_tex(column.group) for column in table.columns)]
    text = (
        pd.DataFrame(
            [[*map(_tex, [*row.heads, *map(_words, row.cells)])] for row in table.rows],
            columns=pd.MultiIndex.from_arrays([groups, heads]) if grouped else heads,
        )
        .style.hide(axis="index")
        .to_latex(
            hrules=True,
            position_float="centering",
            column_format="l" * len(table.stubs) + ("l" if table.of_words else "r") * len(table.columns),
            multicol_align="c",
            caption=_tex(f"{table.title}. {table.caption}".strip()),
        )
    )
    if grouped:  # pandas draws no rules below groups of columns, so they are put behind the first row
        text = text.replace("\\\\\n", f"\\\\\n{_rules(table)}\n", 1)
    return "\n".join([*(f"% {_line(comment)}" for comment in comments), text])


def _rules(table: Table) -> str:
    """booktabs' rule below each group of columns."""
    ends = accumulate((span for _, span in table.groups), initial=len(table.stubs))
    named = [columns for columns, (name, _) in zip(pairwise(ends), table.groups, strict=True) if name]
    return " ".join(rf"\cmidrule(lr){{{before + 1}-{end}}}" for before, end in named)


def _tex(text: str) -> str:
    words = "".join(LATEX.get(character, character) for character in _line(text))
    # a row that begins with a bracket would be read as an option of the \\ before it
    return f"{{}}{words}" if words.startswith(("[", "*")) else words


def studies_markdown(title: str, sections: Sequence[Section]) -> str:
    """The page's tables, notes and commands."""
    return markdown(
        title,
        [
            (
                section.title,
                section.facts,
                [*filter(None, [section.verdict]), *section.notes],
                [*section.tables, *filter(None, [section.missing])],
                [
                    *section.commands,
                    *(
                        f"# {heading}, {number.title}, seed {score.seed}: {score.value:.12g}\n{score.repeat}".rstrip()
                        for heading, numbers in section.numbers.items()
                        for number in numbers
                        for score in number.scores
                    ),
                ],
            )
            for section in sections
        ],
    )


def studies_latex(sections: Sequence[Section]) -> str:
    """The page's tables, with the commands and notes of each study as comments."""
    return latex(
        (table, [section.title, *section.commands, *section.notes]) for section in sections for table in section.tables
    )


def studies_json(studies: Sequence[Results]) -> str:
    """Every cell with every seed in full precision."""
    content = [
        {
            **results.study.model_dump(mode="json", include={"name", "title", "source", "view", "scale", "notes"}),
            "options": results.options,
            "commands": list(results.commands),
            "cells": [{**cell.model_dump(mode="json"), "finished": cell.finished} for cell in results.cells],
        }
        for results in studies
    ]
    return as_json({"studies": content})


def studies_csv(studies: Sequence[Results]) -> str:
    """One line for each number, in full precision and in the unit of the records."""
    plain = (
        "model", "row", "label", "method", "task", "stage", "metric", "split", "mean", "low", "high", "finished",
        "asked", "parameters", "adapter_bytes", "printed", "printed_model", "printed_parameters",
    )  # fmt: skip
    return _csv(
        {
            "study": results.study.name,
            **{name: getattr(cell, name) for name in plain},
            "order": " ".join(cell.order),
            "scale": results.study.scale,
            "seeds": " ".join(str(score.seed) for score in cell.scores),
            "values": " ".join(repr(score.value) for score in cell.scores),
            "folders": " ".join(score.folder for score in cell.scores),
            "commands": "\n".join(score.repeat for score in cell.scores),
            "missing": "; ".join(f"seed {lost.seed} {lost.state}: {lost.reason}" for lost in cell.missing),
        }
        for results in studies
        for cell in results.cells
    )


def runs_markdown(records: Sequence[RunRecord], notes: Sequence[str]) -> str:
    title = title_of(records)
    commands = [record.command for record in records]
    return markdown(title, [(title, facts_of(records), notes, [table_of(records)], commands)])


def runs_latex(records: Sequence[RunRecord]) -> str:
    return latex([(table_of(records), [record.command for record in records])])


def runs_json(records: Sequence[RunRecord], notes: Sequence[str]) -> str:
    content = [
        {"label": label, **record.model_dump(mode="json")}
        for label, record in zip(labels_of(records), records, strict=True)
    ]
    return as_json({"runs": content, "notes": list(notes)})


def runs_csv(records: Sequence[RunRecord]) -> str:
    """One line for each run, in full precision."""
    plain = (
        "model", "task", "method", "seed", "metric", "adapter_bytes", "train_seconds", "peak_memory_bytes", "best_step",
    )  # fmt: skip
    return _csv(
        {
            "label": label,
            **{name: getattr(record, name) for name in plain},
            **{f"parameters.{kind}": getattr(record.parameters, kind) for kind in (*KINDS, "trainable", "total")},
            **{f"validation.{name}": value for name, value in record.validation.items()},
            **{f"test.{name}": value for name, value in (record.test or {}).items()},
            "command": record.command,
        }
        for label, record in zip(labels_of(records), records, strict=True)
    )


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    cells = [{_csv_cell(name): _csv_cell(value) for name, value in row.items()} for row in rows]
    # dtype=object: pandas would turn whole numbers into floats where one of them is missing
    return pd.DataFrame(cells, dtype=object).to_csv(index=False, lineterminator="\n")


def _csv_cell(value: Any) -> Any:
    """The value as a spreadsheet shows it literally: text that begins like a formula gets a quote in front."""
    if not isinstance(value, str):
        return "nan" if value is not None and value != value else value  # pandas would write NaN as an empty cell
    text = _inert(value)
    # some spreadsheets trim the text first, and in East Asian settings wide signs begin formulas too
    return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) and not _are_numbers(text) else text


def _are_numbers(text: str) -> bool:
    try:
        return bool([float(word) for word in text.split()])
    except ValueError:
        return False
