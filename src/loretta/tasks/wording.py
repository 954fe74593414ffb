"""Words for error messages: quotes of user data that stay short and on one line, lists, nearest names."""

import difflib
from collections.abc import Iterable, Sequence

MAX_QUOTE = 60
MAX_LISTED = 20


def quoted(value: object) -> str:
    """``repr`` of the value, line ends escaped, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE] + "..."


def listed(values: Iterable[object]) -> str:
    """Quoted values with commas between them; those after the twentieth are counted only."""
    shown = [quoted(value) for value in values]
    more = len(shown) - MAX_LISTED
    return ", ".join(shown[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, names: Sequence[str]) -> str:
    """`` (did you mean 'x'?)``, with the blank in front, or nothing when no name is near."""
    by_key = {_key(candidate): candidate for candidate in names}
    close = difflib.get_close_matches(_key(name), by_key, n=1)
    return f" (did you mean {quoted(by_key[close[0]])}?)" if close else ""


def _key(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").replace(" ", "")
