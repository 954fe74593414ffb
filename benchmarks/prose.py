"""Whether the figures in the prose of RESULTS.md, docs/choosing.md and README are what was measured.

    python benchmarks/prose.py [--write]

With --write the sentences of prose.txt and sentences.py first get the figures that were measured. Then it names what
only a writer can mend: each sentence of these files and of compared.py that is no longer true of the tables and result
files, each decimal, rate and count in the prose that none of them holds, and each interval that is called level, above
or below and is not.
"""

import argparse
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cited import CHOOSING, MADE, PAGE, README, cells
from compared import named, not_run_in_results, so_in_choosing, so_in_readme, so_in_results
from sentences import Said, of_choosing, of_readme, of_results

COUNTED = (
    "none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBERS = {word: number for number, word in enumerate(COUNTED)} | {"twice": 2}
PARTS = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10, "twelfth": 12}
STATED = rf"([+-]?[\d,]*\.?\d+(?:e-\d+)?|{'|'.join(sorted([*NUMBERS, *PARTS], key=len, reverse=True))})"
# decimals, rates such as 3e-3, and counts such as 37,632
FIGURE = re.compile(r"(?<![\w.,/±^-])[+-]?(?:\d{1,3}(?:,\d{3})+|\d*\.\d+(?:e-\d+)?|\d+e-\d+)(?![\w±]|\.\d)")
DIFFERENCE = re.compile(r"([+-]?\d*\.\d+) ± (\d*\.\d+)")
SIZED = re.compile(rf"{DIFFERENCE.pattern} (above|below|higher|less)\b")
IN_BRACKETS = re.compile(
    r"\b(level|open|above|below)\b(?:(?!\b(?:level|open|above|below)\b)[^.;:()])*\(([^)]*±[^)]*)\)"
)
COUNT = re.compile(r"\d{1,3}(?:,\d{3})+")
MARKS = r"(?:[*`\[]|\]\([^)]*\))*"  # of emphasis, code and links, which a sentence is given without

SENTENCES = {PAGE: of_results, CHOOSING: of_choosing, README: of_readme}
SO = {PAGE: (so_in_results, not_run_in_results), CHOOSING: (so_in_choosing,), README: (so_in_readme,)}
# headings below which no figure is today's, by the reason
LEFT_OUT = {
    f"The {which} round": "what was predicted before the runs, and what came of it then"
    for which in ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
}
# pieces of sentences whose figures no file here has, by the reason
UNSOURCED = {
    "arXiv 2402.11417": "the paper's number",
    "the answer that most rows have (.635)": "of WSC's 104 official validation rows 66 have it",
    "It gained .013 in the mean of MPNet and .001 on MiniLM": "beside its first rates, before its grid was widened",
    "2,391 sentences to train on": "what the demo draws from Python 3.11's documentation, which it prints",
    "(rep, shared), scaling (adp) | 16, 1.0": "a default of the package",
    "For 30,000 to 40,000 on MiniLM's size": "a budget",
    "their variance is 2.1": "of the labels of STS-B's training rows",
}


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The prose under each heading: without tables, code, marks and where links lead, in single spaces."""
    text = MADE.sub("", text)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE):
        heading, _, prose = part.partition("\n")
        yield heading.strip(), " ".join(re.sub(r"\*\*|`|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)", "", prose).split())


def agrees(stated: str, value: float) -> bool:
    """Whether a figure says a value, at its own decimals. What is rounded twice may be off by half of a thousandth."""
    if stated.lower() in PARTS:
        return min(PARTS.values(), key=lambda part: abs(1 / part - value)) == PARTS[stated.lower()]
    if stated.lower() in NUMBERS:
        return NUMBERS[stated.lower()] == value
    digits, _, exponent = stated.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    twice = 0.0005 if unit in (0.01, 0.1) else 0
    return abs(float(stated.replace(",", "")) - value) <= unit / 2 + twice + 1e-9


def pattern(sentence: str) -> re.Pattern[str]:
    return re.compile(STATED.join(map(re.escape, sentence.split("{}"))), re.IGNORECASE)


@cache
def said(page: Path) -> tuple[Said, ...]:
    """The sentences of a page."""
    return (*SENTENCES[page](), *(named(page) if page != README else ()))


def stale(page: Path, text: str) -> Iterator[str]:
    """Sentences that the text of a page does not have, or with other figures than were measured."""
    prose = [part for _, part in sections(text)]
    for sentence, values in said(page):
        found = [match for part in prose for match in pattern(sentence).finditer(part)]
        if not found:
            yield f"{page.name} has no {sentence!r}"
        for match in found:
            for stated, value in zip(match.groups(), values, strict=True):
                if not agrees(stated, value):
                    yield f"{page.name}: {match[0]!r} says {stated} where {value:.4g} was measured"


def said_as(stated: str, value: float) -> str:
    """A value in the form of a figure: its decimals, its sign, a word for a word.

    A figure stays where the value has no such form.
    """
    word, size = stated.lower(), abs(value)
    if agrees(stated, value) or (value < 0 and stated[0] not in "+-"):
        return stated
    if word in PARTS:
        made = min(PARTS, key=lambda part: abs(1 / PARTS[part] - value))
    elif word in NUMBERS:
        made = COUNTED[int(value)] if value in range(len(COUNTED)) else stated
    elif "e" in word:
        made = re.sub(r"e-0", "e-", f"{value:.{len(word.partition('e')[0].partition('.')[2])}e}")
    else:
        made = f"{size:,.{len(word.partition('.')[2])}f}"
        made = ("+-"[value < 0] if stated[0] in "+-" else "") + (made.removeprefix("0") if size < 1 else made)
    return made.capitalize() if stated[0].isupper() else made


def filled(page: Path, text: str) -> str:
    """The text of a page with the figures that were measured, where a sentence has others."""
    for sentence, values in said(page):
        parts = (
            "".join(rf"{MARKS}\s+" if c == " " else MARKS + re.escape(c) for c in part) for part in sentence.split("{}")
        )
        found = [*re.finditer((MARKS + STATED).join(parts), text, re.IGNORECASE)]
        for match in reversed(found):
            for k in reversed(range(len(values))):
                begin, end = match.span(k + 1)
                text = text[:begin] + said_as(match[k + 1], values[k]) + text[end:]
    return text


def untrue(page: Path, text: str) -> Iterator[str]:
    """What a page's text says without a figure and is not so."""
    prose = [part for _, part in sections(text)]
    for sentence, is_so in (each for make in SO[page] for each in make().items()):
        if not any(sentence in part for part in prose):
            yield f"{page.name} has no {sentence!r}"
        elif not is_so:
            yield f"{page.name}: {sentence!r} is not so"


def unheld(page: Path, text: str) -> Iterator[str]:
    """Figures in the prose of a page's text that nothing holds."""
    made = [(name, table) for of in (PAGE, CHOOSING) for name, table in MADE.findall(of.read_text())]
    counts = {count for _, table in made for count in COUNT.findall(table)}
    grids = [cell for name, _ in made if name.startswith("front ") for cell in cells(CHOOSING, name, "rates")]
    rates = {float(rate.strip("*")) for grid in grids for rate in grid.split()}
    patterns = [pattern(sentence) for sentence, _ in said(page)]
    for heading, prose in sections(text):
        if heading.startswith(tuple(LEFT_OUT)):
            continue
        held = {match.span(k) for each in patterns for match in each.finditer(prose) for k in range(1, each.groups + 1)}
        held |= {match.span() for piece in UNSOURCED for match in re.finditer(re.escape(piece), prose)}
        for match in FIGURE.finditer(prose):
            figure = match[0]
            is_held = any(begin <= match.start() and match.end() <= end for begin, end in held)
            if not (is_held or figure in counts or ("e" in figure and float(figure) in rates)):
                yield f"{page.name}, {heading}: {figure} in {prose[max(0, match.start() - 60) : match.end() + 30]!r}"


def misworded(page: Path, text: str) -> Iterator[str]:
    """Differences that are called level where their interval does not hold zero, or above or below where it does."""
    for heading, prose in sections(text):
        found = [(match[3], [match.groups()[:2]], match[0]) for match in SIZED.finditer(prose)]
        found += [(match[1], DIFFERENCE.findall(match[2]), match[0]) for match in IN_BRACKETS.finditer(prose)]
        for word, differences, sentence in found:
            for middle, half in differences:
                ahead, wide = float(middle), float(half)
                if word in ("level", "open"):
                    right = abs(ahead) <= wide
                else:  # a difference as large as its interval may be either, once both are rounded
                    right = abs(ahead) >= wide and not (middle[0] == "-" and word == "above")
                if not right or (middle[0] == "+" and word == "below"):
                    yield f"{page.name}, {heading}: {middle} ± {half} is called {word!r} in {sentence!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="the figures that were measured into the sentences")
    if parser.parse_args().write:
        for page in SENTENCES:
            page.write_text(filled(page, page.read_text()))
    texts = [(page, page.read_text()) for page in SENTENCES]
    found = [line for each in texts for find in (stale, unheld, misworded, untrue) for line in find(*each)]
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
