"""Charts -> inline SVG elements, in the page's own colours so that they follow light and dark mode."""

import io
import itertools
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup

LONGEST_LEGEND_ENTRY = 50  # characters that fit into FIGURE_WIDTH; a wide one counts as two
FIGURE_WIDTH, AXES_HEIGHT, LEGEND_ROW, BAR_ROW = 4.6, 2.9, 0.19, 0.3  # inches
UNDRAWABLE = 1e300  # larger values are drawn as infinite: matplotlib's margins would overflow
MARKED_POINTS = 30  # lines with more points have no markers
DESCRIBED_POINTS = 8  # the chart's description in words names at most this many points of a line

# Okabe and Ito's colour-blind safe palette. Yellow is left out, because it is too pale on white. Black is a little
# lighter than theirs: matplotlib omits pure black from an SVG, and an omitted colour cannot change in dark mode.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#111111", "#56B4E9", "#E69F00")
# line styles for when the colours are used up: lengths in points, drawn and left out in turn
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
DOTS = DASHES[2]
MARKS = ("o", "^", "D", "v")  # for points without a line, one for each of DASHES
DODGE = 5  # points between the methods at one tick, so that their intervals do not cover each other
TEXT, AXIS, GRID, CARD = "#1d2126", "#777777", "#e4e4e4", "#ffffff"
# matplotlib's colour -> the page's variable, to which dark mode gives another value
VARIABLES = {
    **{colour.lower(): f"var(--c{k})" for k, colour in enumerate(COLOURS)},
    TEXT: "var(--text)",
    AXIS: "var(--axis)",
    GRID: "var(--grid)",
    CARD: "var(--card)",
}
# matplotlib's settings for text and axes, in colours that the page can change
INKS = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), AXIS),
}


class Look(NamedTuple):
    """How one run or method is drawn, in its table row and in every chart."""

    colour: str
    dashes: tuple[float, ...]  # () is a solid line

    @classmethod
    def of(cls, index: int) -> "Look":
        return cls(COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)])

    @property
    def css(self) -> str:
        """The colour as the page's variable."""
        return VARIABLES[self.colour.lower()]

    @property
    def mark(self) -> str:
        """The marker of points without a line."""
        return MARKS[DASHES.index(self.dashes)] if self.dashes in DASHES else MARKS[0]


QUIET = Look(AXIS, (4, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve or set of points. A NaN is a gap."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # NaN: no interval there
    high: Sequence[float] | None = None
    band: bool = False  # draw the interval as a band, not as a bar at each point
    joined: bool = True
    marked: bool = True
    hollow: bool = False
    in_legend: bool = True
    ring_at: float | None = None  # x of the ring; None for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    y_label: str
    lines: Sequence[Line]
    note: str = ""
    x_label: str = "training step"
    x_scale: Literal["steps", "log"] = "steps"
    ticks: Mapping[float, str] = field(default_factory=dict)  # x -> label; {} for ticks at round numbers


class Bar(NamedTuple):
    label: str
    look: Look
    value: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Horizontal bars from zero."""

    title: str
    bars: Sequence[Bar]
    note: str = ""


def svg(chart: Chart | Bars, *, prefix: str) -> "Markup":
    """Draw a chart as an inline SVG element. All of its ids begin with ``prefix``."""
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # the browser draws the letters, so it does not matter which ones matplotlib's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font|Matplotlib currently does not")
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "loretta",
                "text.parse_math": False,
                "font.size": 10,
                "axes.formatter.useoffset": False,
                **INKS,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "grid.color": GRID,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
            }
        )
        rows = BAR_ROW * len(chart.bars) if isinstance(chart, Bars) else LEGEND_ROW * len(_legend(chart))
        height = rows + (0.6 if isinstance(chart, Bars) else AXES_HEIGHT)
        figure = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(_short(chart.title), loc="left", fontsize=11, fontweight="bold")
        if isinstance(chart, Bars):
            _draw_bars(axes, chart)
        else:
            _draw_lines(figure, axes, chart)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    name = chart.title if isinstance(chart, Bars) else f"{chart.title} by {chart.x_label}"
    return inline(buffer.getvalue(), prefix=prefix, name=name, description=describe(chart))


def describe(chart: Chart | Bars) -> str:
    """The chart in words, for readers who cannot see it."""
    if isinstance(chart, Bars):
        return "; ".join(f"{bar.label}: {bar.text}" for bar in chart.bars)
    return "; ".join(f"{line.label}: {_points(line, chart.ticks)}" for line in chart.lines)


def _points(line: Line, ticks: Mapping[float, str]) -> str:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
    shown = points if len(points) <= DESCRIBED_POINTS else [points[0], points[-1]]
    words = (", " if shown is points else " to ").join(f"{y:.4g} at {ticks.get(x, f'{x:,.6g}')}" for x, y in shown)
    return words or "nothing"


def _draw_bars(axes: Any, chart: Bars) -> None:
    places = range(len(chart.bars))
    values = [bar.value for bar in chart.bars]
    axes.barh(places, values, height=0.62, color=[bar.look.colour for bar in chart.bars])
    axes.set_yticks(places, [_short(bar.label) for bar in chart.bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for place, bar in zip(places, chart.bars, strict=True):
        axes.annotate(bar.text, (bar.value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    # room for the words behind the longest bar
    axes.set_xlim(0, 1.45 * max([*values, 1e-9]))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _draw_lines(figure: Any, axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.grid()
    looks = list(dict.fromkeys(line.look for line in chart.lines))
    for line in chart.lines:
        _draw(axes, line, DODGE * (looks.index(line.look) - (len(looks) - 1) / 2) if chart.ticks else 0.0)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(_short(chart.y_label))
    if chart.x_scale == "log":
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(subs=_steps_per_decade(chart)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.margins(x=0.08)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if chart.ticks:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        axes.margins(x=0.12)
    if all(math.isnan(value) for line in chart.lines for value in line.y):
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center")
        axes.set(xticks=[], yticks=[])
    shown = _legend(chart)
    looks_of = {"frameon": False, "fontsize": 9.5, "labelspacing": 0.3, "handlelength": 2.6}
    legend = figure.legend(list(map(_key, shown)), ["run"] * len(shown), loc="outside lower left", **looks_of)
    # set afterwards: matplotlib leaves out a label that begins with an underscore when it gets it as an argument
    for text, line in zip(legend.get_texts(), shown, strict=True):
        text.set_text(_short(line.label))


def _legend(chart: Chart) -> list[Line]:
    return [line for line in chart.lines if line.in_legend]


def _steps_per_decade(chart: Chart) -> tuple[int, ...]:
    """Where ticks stand within a decade: the fewer decades the values span, the more ticks."""
    values = [x for line in chart.lines for x in line.x if x > 0]
    decades = math.log10(max(values) / min(values)) if values else 0
    return (1, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)


def compact(value: float) -> str:
    """A count in at most four characters and a letter: 54K, 1.5M."""
    value = float(f"{value:.3g}")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _style(line: Line) -> dict[str, Any]:
    dashes = DOTS if line.hollow else line.look.dashes
    small = line.joined and not line.hollow
    return {
        "color": line.look.colour,
        "linestyle": ((0, dashes) if dashes else "-") if line.joined else "none",
        "linewidth": 1.5,
        "marker": ("o" if line.joined else line.look.mark) if line.marked else "none",
        "markersize": 3.5 if small else 6,
        **({"markerfacecolor": CARD, "alpha": 0.75} if line.hollow else {}),
    }


def _key(line: Line) -> Any:
    from matplotlib.lines import Line2D

    style = _style(line)
    return Line2D([], [], **style | ({"marker": "none"} if line.joined and len(line.y) > MARKED_POINTS else {}))


def _draw(axes: Any, line: Line, shift: float) -> None:
    """Draw a line, ``shift`` points to the right of its place."""
    from matplotlib.transforms import ScaledTranslation

    style = {"color": line.look.colour, "zorder": 2 if line.hollow else 3}
    drawn = axes.plot(line.x, line.y, markevery=_marked(line.y), **style | _style(line))
    if line.low is not None and line.high is not None:
        if line.band:
            axes.fill_between(line.x, line.low, line.high, alpha=0.15, linewidth=0, **style)
        else:
            drawn.append(axes.vlines(line.x, line.low, line.high, linewidth=1.2, alpha=0.8, **style))
    # shifted after drawing: matplotlib takes the axes' limits only from what was drawn in their own coordinates
    for artist in drawn if shift else []:
        artist.set_transform(axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans))
    if line.ring_at is not None and line.ring_at in line.x:
        value = line.y[list(line.x).index(line.ring_at)]
        axes.plot(line.ring_at, value, "o", markersize=9, fillstyle="none", **style)


def _marked(values: Sequence[float]) -> list[int]:
    """Indices of the points that need a marker: all of a short line, else those alone between two gaps."""
    if len(values) <= MARKED_POINTS:
        return list(range(len(values)))
    gap = [True, *(math.isnan(value) for value in values), True]
    return [i for i in range(len(values)) if gap[i] and not gap[i + 1] and gap[i + 2]]


def drawable(value: float | None) -> float:
    """The value, or NaN for one that cannot be drawn."""
    return math.nan if value is None or not abs(value) < UNDRAWABLE else value


def _short(name: str) -> str:
    """The name on one printable line, at most LONGEST_LEGEND_ENTRY wide: what is too long loses its middle."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if sum(map(_width, line)) <= LONGEST_LEGEND_ENTRY:
        return line
    half = (LONGEST_LEGEND_ENTRY - 1) // 2
    return f"{_fitting(line, half)}…{_fitting(line[::-1], half)[::-1]}"


def _width(character: str) -> int:
    return 2 if character in "MW@%" or unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(line: str, width: int) -> str:
    """The longest beginning of a line that fits into ``width``."""
    ends = itertools.accumulate(map(_width, line))
    return line[: sum(end <= width for end in ends)]


def inline(document: bytes, *, prefix: str, name: str, description: str) -> "Markup":
    """Turn an SVG file into an element of a page: ids get a prefix, since all figures share them; namespaces go."""
    from xml.etree import ElementTree

    from markupsafe import Markup

    svg = ElementTree.fromstring(document)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            value = prefix + value if key == "id" else value.replace("url(#", f"url(#{prefix}")
            if key.endswith("href"):
                value = value.replace("#", f"#{prefix}")
            elif key == "style":
                value = re.sub(r"#[0-9a-f]{6}\b", lambda colour: VARIABLES.get(colour[0], colour[0]), value)
            element.set(key.rpartition("}")[2], value)
    for metadata in svg.findall("metadata"):
        svg.remove(metadata)
    words = ElementTree.Element("desc", id=f"{prefix}words")
    words.text = _printable(description)
    svg.insert(0, words)
    del svg.attrib["width"], svg.attrib["height"]  # the page's style sheet decides
    svg.attrib |= {"role": "img", "aria-label": _printable(name), "aria-describedby": f"{prefix}words"}
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _printable(text: str) -> str:
    """The text without control characters, which XML forbids."""
    return "".join(c if c.isprintable() else " " for c in text)
