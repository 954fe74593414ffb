"""docs/results.html is what benchmarks/page.py makes of RESULTS.md, and a browser finds all of it in the one file."""

import pathlib
import re
import sys
from html.parser import HTMLParser

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import page  # noqa: E402

NUMBER = re.compile(r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
DRAWN = re.compile(
    r"(?P<middle>[+-]\d*\.\d+)\xa0±\xa0(?P<half>\d*\.\d+)\)?,?<svg class=\"gap\".*?"
    r"<path d=\"M(?P<low>\S+) 8H(?P<high>\S+)\"/>(?:<circle cx=\"(?P<at>\S+)\"|<path d=\"M(?P<end>\S+) 8l)"
)


class Reader(HTMLParser):
    """The tags of a page, and its text outside of the contents and of pictures."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside += [tag] * (tag in ("nav", "svg", "style", "title"))

    def handle_endtag(self, tag):
        if self.inside[-1:] == [tag]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text += data

    def all(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def made():
    return page.PAGE.read_text()


@pytest.fixture(scope="module")
def read(made):
    return Reader(made)


def test_the_page_is_what_results_md_says(made):
    assert made == page.html(page.SOURCE.read_text()), "python benchmarks/page.py, behind all others of make tables"


def test_the_numbers_of_the_page_are_those_of_results_md_in_their_order(read):
    text = re.sub(r"<!--.*?-->", "", page.SOURCE.read_text(), flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # where a link leads
    assert NUMBER.findall(read.text) == NUMBER.findall(text)


def test_ids_are_unique_and_links_lead_somewhere(read):
    ids, links = read.all("id"), read.all("href")
    assert len(ids) == len(set(ids)) > 50
    for target in links:
        path, _, anchor = target.partition("#")
        assert anchor in ids if not path else (page.PAGE.parent / path).exists(), target
    named = re.findall(r"\]\(([^)]*)\)", page.SOURCE.read_text())
    anchors = [target.partition("#")[2] for target in named if "#" in target]
    assert set(anchors) <= {target.partition("#")[2] for target in links}
    # the contents have each table and each heading
    assert {f"#{some['id']}" for tag, some in read.tags if tag in ("table", "h1", "h2", "h3", "h4")} <= set(links)


def test_the_page_needs_nothing_beside_itself(made, read):
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object"}
    assert not read.all("src")
    assert all(
        target.startswith("#") for tag, some in read.tags if tag == "use" for target in some.values() if "#" in target
    )
    assert not re.search(r"@import|url\((?!#)|https?:", made)
    assert made.count('class="picture"') == len(re.findall(r"^!\[", page.SOURCE.read_text(), re.MULTILINE)) == 2


def test_a_difference_is_drawn_at_its_place(made):
    def place(value):
        return min(max(value, -page.REACH), page.REACH)

    drawn = list(DRAWN.finditer(made))
    assert len(drawn) == made.count('class="gap"') - 1 > 1000  # one explains the others
    for found in drawn:
        middle, half = float(found["middle"]), float(found["half"])
        ends = [1e-3 * float(found[name]) for name in ("low", "high")]
        assert ends == pytest.approx([place(middle - half), place(middle + half)], abs=1e-9)
        assert 1e-3 * float(found["at"] or found["end"]) == pytest.approx(place(middle), abs=1e-9)
        assert (found["at"] is None) == (abs(middle) > page.REACH)


@pytest.mark.parametrize("text", ["# A\n\n<div>one</div>\n", "# A\n\na <b>word</b>\n"], ids=["block", "inline"])
def test_html_does_not_go_into_the_page_as_it_is(text):
    with pytest.raises(ValueError, match="HTML that would go into the page"):
        page.html(text)
