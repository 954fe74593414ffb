"""``--set key=value``: one word of the command line into a key and a value."""

import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from loretta.errors import InputError


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
    """PyYAML's YAML 1.1, in which 5e-3 is a number: PyYAML itself takes it for a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("+-.0123456789")
)


def read_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def with_lists(options: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The options of a config class, with ``query,value`` as a list where the class takes a list.

    An expression, such as ``.*layers.(0|1).q_proj``, stays an expression: its words are not plain.
    """
    hints = get_type_hints(config)
    return {key: _words(value) if _takes_list(hints.get(key)) else value for key, value in options.items()}


def _takes_list(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes_list(part) for part in get_args(hint))
    return list in (hint, get_origin(hint))


def _words(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+(,\s*[\w.-]+)+", value):
        return [read_yaml(word) for word in value.split(",")]
    return value
