"""Checks of the options of a config, whoever wrote it: types, sizes, and expressions that match in finite time."""

import math
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from loretta.errors import InputError
from loretta.wording import quoted

# Expressions of people are much shorter; those that export writes name every module
LONGEST_EXPRESSION = 100_000
# Seconds that all names of a model may take; a thousand names take a few milliseconds
TIME_FOR_EXPRESSIONS = 3.0


def wrong_types(config: Any, among: Collection[str] | None = None) -> dict[str, str]:
    """For each option of a dataclass whose value has the wrong type: its name -> a phrase that quotes the value.

    ``among`` are options of a config of PEFT: only those are looked at, and whose types are plain words, numbers,
    lists and mappings of these.
    """
    kinds = _kinds(config.__class__)
    return {
        option.name: f"{option.name}={quoted(value)} is not {_words(kinds[option.name])}"
        for option in fields(config)
        if option.init
        and (among is None or (option.name in among and _is_plain(kinds[option.name])))
        and not _fits(value := getattr(config, option.name), kinds[option.name])
    }


@cache
def _kinds(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _is_plain(kind: Any) -> bool:
    inner = get_args(kind)
    return (
        kind in _WORDS
        or is_dataclass(kind)
        or get_origin(kind) is Literal
        or (inner != () and all(map(_is_plain, inner)))
    )


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str)  # the option itself checks which words it takes
    if origin is list:
        return isinstance(value, list | tuple | set | frozenset) and all(_fits(each, inner[0]) for each in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else kind is Any


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


_WORDS = {
    str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null",
    dict: "a mapping",
}  # fmt: skip


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list:
        return f"a list of {_words(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_words, inner))}]"
    if origin is dict:
        return f"a mapping of {_words(inner[0])} to {_words(inner[1])}"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def without_unknown(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that this version knows. A file of a later version may hold others, as long as they are off.

    Raises InputError for one that is on: neither null nor false nor empty.
    """
    known = {option.name for option in fields(cls)}
    for name in sorted(options.keys() - known):
        if options[name] not in (None, False, "", [], {}):
            raise InputError(
                f"{cls.__name__} has no option {quoted(name)} (given as {quoted(options[name])}): a later version of "
                "loretta wrote it, or a person did; upgrade with pip install -U loretta-peft, or leave it out"
            )
    return {name: value for name, value in options.items() if name in known}


# Expressions


def expressions_of(config: Any) -> list[tuple[str, str]]:
    """(option, expression) for every expression that PEFT matches with names, with the parts that PEFT adds."""
    found = [
        (option, value)
        for option in ("target_modules", "exclude_modules")
        if isinstance(value := getattr(config, option, None), str) and value != "all-linear"
    ]
    for option in ("rank_pattern", "alpha_pattern"):
        found += [(option, rf"(.*\.)?({key})$") for key in getattr(config, option, None) or ()]
    found += [
        ("modules_to_save", rf"(^|.*\.){name}($|\..*)") for name in getattr(config, "modules_to_save", None) or ()
    ]
    pattern = getattr(config, "layers_pattern", None) or ()
    patterns = [pattern] if isinstance(pattern, str) else pattern
    return found + [("layers_pattern", rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\.") for each in patterns]


def bad_expressions(config: Any) -> list[str]:
    """A phrase for every text that is no expression, or too long."""
    problems = []
    for option, expression in expressions_of(config):
        if len(expression) > LONGEST_EXPRESSION:
            problems.append(f"{option} is an expression of {len(expression):,} characters: give a list of names")
            continue
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            problems.append(f"{option}: {quoted(expression)} is no regular expression ({reason})")
    return problems


def check_expressions(config: Any, model: nn.Module) -> None:
    """Raise InputError where matching an expression with the names of ``model`` takes longer than three seconds.

    ``re`` cannot be interrupted, and one with repeats within repeats may run for years. Such an expression is tried in
    a process of its own first.
    """
    for option, expression in expressions_of(config):
        if _may_backtrack(expression) and not _ends(expression, tuple(name for name, _ in model.named_modules())):
            raise InputError(
                f"{option}: the expression {quoted(expression)} takes more than {TIME_FOR_EXPRESSIONS:.0f} seconds to "
                "match with the names of this model: write it without repeats within repeats, or give a list of names"
            )


# a repeated group, a reference to a group, or (?x), with which an expression may look like anything
_SUSPICIOUS = re.compile(r"\)\s*[*+{]|\\\d|\(\?P=|\(\?\(|\(\?[a-z]*x")


def _may_backtrack(expression: str) -> bool:
    """Whether an expression may have repeats within repeats, or more than three of them in a row."""
    return _SUSPICIOUS.search(expression) is not None or len(re.findall(r"[*+{]", expression)) > 3


_TRIAL = (
    "import re, sys; e, *names = sys.stdin.read().split('\\0'); [(re.match(e, n), re.fullmatch(e, n)) for n in names]"
)


@cache
def _ends(expression: str, names: tuple[str, ...]) -> bool:
    try:
        given = "\0".join([expression.replace("\0", ""), *names])
        command = [sys.executable, "-I", "-S", "-c", _TRIAL]
        subprocess.run(command, input=given, text=True, timeout=TIME_FOR_EXPRESSIONS, capture_output=True, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return False
    return True


# Sizes

# Numbers that a train may have beyond four times those of the weight it stands beside: room for tiny models
_ROOM = 1 << 18


def check_size(name: str, what: str, numbers: int, base_numbers: int) -> None:
    """Raise InputError for a train far larger than the matrix of the base model that it is to change."""
    if numbers > 4 * base_numbers + _ROOM:
        raise InputError(
            f"'{name}': {what} needs {quoted(numbers)} numbers beside a matrix of {base_numbers:,}: give a smaller one"
        )
