"""Write docs/results.html: RESULTS.md as one page that opens from disk, with contents, drawn intervals and pictures.

    python benchmarks/page.py

Every figure of it is one of RESULTS.md, whose tables ``python benchmarks/evidence.py`` fills.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from os.path import relpath
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from tables import ROOT

from loretta.report.figures import inline

SOURCE, PAGE = ROOT / "RESULTS.md", ROOT / "docs" / "results.html"
REACH = 0.06  # the largest difference that is drawn at its place; of a larger one the side alone is shown
DIFFERENCE = re.compile(r"([+-]\d*\.\d+) ± (\d*\.\d+)(\)?,?)")
HEAD = 3  # tokens of the page's own heading, which the template writes
# columns of differences from what is named in their head, or of claims about a model
COMPARING = re.compile(r"to |difference|MiniLM|MPNet|SmolLM2")


@dataclass(kw_only=True)
class Heading:
    level: int
    id: str
    title: Markup
    tables: list[str] = field(default_factory=list)  # ids
    parts: list["Heading"] = field(default_factory=list)


def html(text: str) -> str:
    """The page of a text in Markdown. Raises ValueError for HTML in it that is no comment."""
    md = MarkdownIt("commonmark").enable("table")
    tokens = md.parse(text)
    top = Heading(level=0, id="", title=Markup())
    _place([child for token in tokens for child in token.children or ()])
    made: Counter[str] = Counter()
    path = [top]
    for k, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = _heading(int(token.tag[1:]), tokens[k + 1], md, made)
            token.attrs["id"] = heading.id
            path = [other for other in path if other.level < heading.level]
            path[-1].parts.append(heading)
            path.append(heading)
        elif token.type == "table_open":
            _mark(tokens[k : next(j for j in range(k, len(tokens)) if tokens[j].type == "table_close")], md)
            path[-1].tables.append(f"{path[-1].id}-table" + (f"-{len(path[-1].tables) + 1}" if path[-1].tables else ""))
            said = escape(path[-1].title.striptags())
            _write(token, f'<div class="scroll" role="region" aria-label="{said}" tabindex="0">'
                          f'<table id="{path[-1].tables[-1]}">\n')  # fmt: skip
        elif token.type == "table_close":
            _write(token, "</table></div>\n")
        elif token.type == "html_block":
            if re.sub(r"<!--.*?-->", "", token.content, flags=re.DOTALL).strip():
                raise ValueError(f"HTML that would go into the page as it is: {token.content.strip()!r}")
            token.content = ""
    (whole,) = top.parts
    loader = ChoiceLoader([FileSystemLoader(Path(__file__).parent), PackageLoader("loretta", "report")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("results.html.j2").render(
        contents=[replace(whole, parts=[]), *whole.parts],
        title=whole.title.striptags(),
        body=Markup(
            md.renderer.render(tokens[HEAD:], md.options, {}).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
        ),
        sample=Markup(interval(REACH / 4, REACH / 3)),
        reach=f"{REACH:g}",
    )


def _place(inlines: Sequence[Token]) -> None:
    """Point links from the page's place, and put pictures into it."""
    pictures = 0
    for token in inlines:
        if token.type == "link_open":
            token.attrs["href"] = from_page(str(token.attrs["href"]))
        elif token.type == "html_inline":
            raise ValueError(f"HTML that would go into the page as it is: {token.content!r}")
        elif token.type == "image":
            pictures += 1
            svg = (ROOT / str(token.attrs["src"])).read_bytes()
            drawn = inline(svg, prefix=f"picture{pictures}-", name=token.content, description="")
            _write(token, f'<span class="picture">{drawn}</span>')


def _write(token: Token, text: str) -> None:
    """Put HTML of ours in the place of what a token would be rendered as."""
    token.type, token.tag, token.content, token.children = "html_inline", "", text, None


def _heading(level: int, content: Token, md: MarkdownIt, made: Counter[str]) -> Heading:
    """A heading with an id of its own, by which GitHub finds it too."""
    title = Markup(md.renderer.renderInline(content.children or [], md.options, {}))
    slug = re.sub(r"[^\w\- ]", "", title.striptags().lower()).replace(" ", "-")
    made[slug] += 1
    return Heading(level=level, id=slug + (f"-{made[slug] - 1}" if made[slug] > 1 else ""), title=title)


def _mark(table: Sequence[Token], md: MarkdownIt) -> None:
    """Give the cells of a table the page's classes, the first of a row a heading's place, and differences a drawing."""
    heads = [content.content for _, content, _ in _cells(table, "th")]
    for column, (begin, _, _) in enumerate(_cells(table, "th")):
        begin.attrs = {"scope": "col", **_kind(begin, column)}
    for k, (begin, content, end) in enumerate(_cells(table, "td")):
        column = k % len(heads)
        begin.attrs = _kind(begin, column)
        text = md.renderer.renderInline(content.children or [], md.options, {})
        if column == 0:
            begin.tag = end.tag = "th"
            begin.attrs["scope"] = "row"
            text = f"<span>{text}</span>"
        elif COMPARING.match(heads[column]):
            text = DIFFERENCE.sub(lambda found: found[0] + interval(float(found[1]), float(found[2])), text)
        _write(content, text)


def _cells(table: Sequence[Token], tag: str) -> Iterator[tuple[Token, Token, Token]]:
    for k, token in enumerate(table):
        if token.type == f"{tag}_open":
            yield token, table[k + 1], table[k + 2]


def _kind(cell: Token, column: int) -> dict[str, str | int | float]:
    """The class of a cell: numbers, which stand on the right, have none."""
    return {"class": "run"} if column == 0 else {} if "right" in str(cell.attrs["style"]) else {"class": "words"}


def interval(middle: float, half: float) -> str:
    """A difference as a dot on its interval, beside the line of no difference."""
    low, at, high = (round(1000 * min(max(x, -REACH), REACH), 1) for x in (middle - half, middle, middle + half))
    dot = f'<circle cx="{at:g}" cy="8" r="3.2"/>'
    if abs(middle) > REACH:
        dot = f'<path d="M{at:g} 8l{-8 if at > 0 else 8} -5v10z"/>'
    end = 1000 * REACH + 5
    return (
        f'<svg class="gap" viewBox="{-end:g} 0 {2 * end:g} 16" aria-hidden="true"><path class="zero" d="M0 0v16"/>'
        f'<path d="M{low:g} 8H{high:g}"/>{dot}</svg>'
    )


def from_page(target: str) -> str:
    """A link of RESULTS.md as the page has it, which lies in docs/."""
    if target.startswith("#") or re.match(r"[a-z]+:", target):
        return target
    return relpath(ROOT / target, PAGE.parent)


if __name__ == "__main__":
    PAGE.write_text(html(SOURCE.read_text()))
    print(f"wrote {PAGE}")
