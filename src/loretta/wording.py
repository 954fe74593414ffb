"""How values become words: short quotes, lists, groups, nearest names, sizes, nested settings, tables, JSON."""

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

MAX_QUOTE = 60
MAX_LISTED = 20
MISSING = "–"  # in the place of a number that nobody knows
# characters that a terminal obeys or a reader does not see, and that are no part of words: control characters but tabs
# and line ends, marks and turns of direction, line separators, blanks without width but for the two joiners, tags, and
# halves of characters
OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)


def quoted(value: object) -> str:
    """``repr`` of the value, line ends escaped, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE] + "..."


def listed(values: Iterable[object]) -> str:
    """Quoted values with commas between them; those after the twentieth are counted only."""
    shown = [quoted(value) for value in values]
    more = len(shown) - MAX_LISTED
    return ", ".join(shown[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def distinct(values: Iterable[str]) -> str:
    """Each text once, in the order of the first ones, with commas between them."""
    return ", ".join(dict.fromkeys(values))


def nearest(given: str | Iterable[str], names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, with the blank in front: the name nearest to each one given; "" where none is near."""
    by_key = {_key(candidate): candidate for candidate in names}
    words = [given] if isinstance(given, str) else given
    close = [key for word in words for key in difflib.get_close_matches(_key(word), by_key, n=1)]
    return f" (did you mean {', '.join(quoted(by_key[key]) for key in close)}?)" if close else ""


def _key(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").replace(" ", "")


def one_line(error: object, most: int = 300) -> str:
    """A library's message on one line, cut after ``most`` characters: some messages list every tensor of a model."""
    words = " ".join(str(error).split())
    return words if len(words) <= most else words[:most] + "..."


def printable(text: object) -> str:
    """The text on one line; what a terminal would obey or hide is spelled (escapes, line ends, turns of direction)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def spelled(text: object) -> str:
    """As :func:`printable`, with line ends and tabs left as they are."""
    return re.sub(r"[^\n\t]+", lambda line: printable(line[0]), str(text))


def console(**options: Any) -> "Console":
    """rich's console, which takes no text for markup, and spells what a terminal would obey in all of it."""
    from rich.console import Console  # only here: most words need no tables

    class Spelling(Console):
        def render_str(self, text: str, **style: Any) -> Any:
            return super().render_str(spelled(text), **style)

    return Spelling(markup=False, **options)


def size_words(n_bytes: int | None) -> str:
    """Bytes as "512 B" or "1.5 GiB"."""
    if n_bytes is None:
        return MISSING
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(value, 1) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """As 0:01:30 or "3 days, 4:00:00"."""
    return MISSING if seconds is None else str(timedelta(seconds=round(seconds)))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by their key, groups and items in the order of the first ones."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, as ``{"method_args.r": 8}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def as_json(content: Any) -> str:
    """Data as JSON that every reader takes: NaN and infinity, for which JSON has no word, are null, and dates text."""
    return json.dumps(finite(content), indent=2, allow_nan=False, default=str) + "\n"


def finite(content: Any) -> Any:
    """The same with None for each number that is not finite."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def as_json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line of JSON for each row, which a person may read: what is obeyed or hidden in it is escaped."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    return "".join(OBEYED.sub(lambda found: json.dumps(found[0])[1:-1], line) + "\n" for line in lines)


def table_of(names: Iterable[str], words: Collection[str] = (), *, fold: bool = False, **options: Any) -> "Table":
    """rich's table: ``words`` are the columns on the left, which take several lines; with ``fold`` numbers do too."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, **options)
    for name in names:
        is_left = name in words
        table.add_column(
            name, justify="left" if is_left else "right", overflow="fold" if fold or is_left else "ellipsis"
        )
    return table


def as_text(*tables: Any, width: int = 160) -> str:
    """rich's tables (and texts) as plain lines of at most ``width`` characters, without blanks at their ends."""
    out = console(width=width, no_color=True)
    with out.capture() as captured:
        for table in tables:
            out.print(table, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
