"""``--set key=value``: one word of the command line into a key and a value."""

from typing import Any

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
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {word!r}: the value is not a YAML value") from None
    if isinstance(value, str):
        # YAML 1.1 reads 5e-3 as a word
        try:
            value = float(value)
        except ValueError:
            return key, value
    return key, value
