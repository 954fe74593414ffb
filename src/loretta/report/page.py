"""Templates and charts -> one HTML page."""

import math
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from loretta.report.figures import Bars, Chart, svg
from loretta.wording import spelled

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render(template: str, **content: Any) -> str:
    """Fill in a template of this package. Text in ``content`` is shown literally; Markup is not escaped."""
    return _environment().get_template(template).render(**content)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("loretta", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # plain strings may come from others; Markup is ours
        finalize=lambda value: spelled(value) if type(value) is str else value,
    )


def drawn(charts: Iterable[Chart | Bars], *, prefix: str) -> list[dict[str, "Markup | str"]]:
    """Draw each chart as an element with its caption. Its ids begin with ``prefix`` and the chart's number."""
    return [
        {"svg": svg(chart, prefix=f"{prefix}{number}-"), "note": caption(chart)}
        for number, chart in enumerate(charts, start=1)
    ]


def caption(chart: Chart | Bars) -> str:
    """The chart's note, what its ring means, and how many values could not be drawn."""
    sentences = [chart.note] if chart.note else []
    if isinstance(chart, Chart):
        points = [
            (x == line.ring_at, not math.isnan(y)) for line in chart.lines for x, y in zip(line.x, line.y, strict=True)
        ]
        drawn = [is_drawn for _, is_drawn in points]
        if (True, True) in points:
            sentences.append("Ring: the best step.")
        if not all(drawn):
            sentences.append(f"Not drawn: {drawn.count(False):,} of {len(drawn):,} values, NaN or infinite.")
    return " ".join(sentences)
