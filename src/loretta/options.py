"""``--set key=value``: one word of the command line into a key and a value; and what a wrong value should have been."""

import math
import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from loretta.errors import InputError
from loretta.wording import nearest

MOST_VALUES = 1_000_000

# pydantic's kinds of mistakes
_WANTED = {
    "string_type": "a text, in quotes",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "finite_number": "a finite number",
    "dict_type": "keys with values",
    "greater_than": "above {gt:,.10g}",
    "greater_than_equal": "at least {ge:,.10g}",
    "less_than": "below {lt:,.10g}",
    "less_than_equal": "at most {le:,.10g}",
    "literal_error": "{expected}",
}


def wanted(mistake: Mapping[str, Any]) -> str:
    """``must be ...``, of one of the ``errors()`` of pydantic, whose own words speak of inputs and parsing."""
    limits = mistake.get("ctx", {})
    if (words := _WANTED.get(mistake["type"])) is None:  # of a check of our own
        return str(mistake["msg"])
    names = re.findall(r"'(.+?)'", limits.get("expected", ""))
    return f"must be {words.format(**limits)}{nearest(str(mistake['input']), names) if names else ''}"


def parse_option(word: str) -> tuple[str, Any]:
    """Split ``key=value`` and read the value as YAML (numbers, true, lists, mappings).

    Raises InputError when there is no key or the value is not YAML.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise InputError(f"--set {word!r} is not of the form key=value: write, for example, --set epochs=5")
    try:
        return key, read_yaml(text)
    except yaml.YAMLError:
        raise InputError(f"--set {word!r}: the value is not a YAML value") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's YAML 1.1, but 5e-3 is a number (there a word), 010 is ten and 1:30 a word (there 8 and 90), and a key
    that stands twice is refused (there the last one counts)."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # before `<<` has brought in keys that may be given again
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if double := next((key for at, key in enumerate(keys) if key in keys[:at]), None):
            raise yaml.YAMLError(f"the key {double!r} is given twice")
        return node


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d[\d_]*$", re.ASCII), list("+-0123456789"))
_Loader.add_constructor(_INT, _whole)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("+-.0123456789")
)


def read_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text. Raises yaml.YAMLError, also for aliases that unfold to millions of values."""
    try:
        value = yaml.load(text, Loader=_Loader)
        if _unfolded(value, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a 13th month; lists in lists in lists
        raise yaml.YAMLError(str(error)) from None
    return value


def _unfolded(value: Any, known: dict[int, float]) -> float:
    """How many values there are where every alias is written out; infinity where one stands for a part of itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(value)]


def with_lists(options: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The options of a config class, with ``query,value`` as a list where the class takes a list.

    A single word is one too, unless it has a hyphen or a dot and the class takes text, as "all-linear". An expression,
    such as ``.*layers.(0|1).q_proj``, stays one: its words are not plain.
    """
    hints = get_type_hints(config)
    return {key: _words(value, hints.get(key)) for key, value in options.items()}


def _takes(kind: type, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes(kind, part) for part in get_args(hint))
    return kind in (hint, get_origin(hint))


def _words(value: Any, hint: Any) -> Any:
    if not (isinstance(value, str) and _takes(list, hint) and re.fullmatch(r"[\w.-]+(,\s*[\w.-]+)*", value)):
        return value
    words = [read_yaml(word) for word in value.split(",")]
    # as an expression, which has to be a whole name, a plain word would match no module within another
    return value if _takes(str, hint) and re.fullmatch(r"\w*[.-].*", value) and len(words) == 1 else words
