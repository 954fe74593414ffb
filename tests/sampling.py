"""Which cases of a numeric test over families or methods, or one marked `sampled`, run without LORETTA_TEST_WIDE.

The 27 cases of three methods on nine families differ little. A sample of them has every value of every parameter, and
every method on two families at least. The name of the test chooses the sample: the next test has another, so that the
tests together meet all pairs. A mark that names a parameter, as `sampled("method")` of a test that compiles for each
case, leaves one value of it. `sampled(apart=True)` is for a list of all pairs that there can be, where nobody chose
any. The cells of `make test-matrix` run all cases of the same tests.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import pytest

Values = Mapping[str, object]  # of one case, by parameter


def sample(test: str, cases: Sequence[Values]) -> list[int]:
    """The numbers of the cases that stand for all ``cases`` of ``test``."""
    numbers = sorted(range(len(cases)), key=lambda k: hashlib.sha256(f"{test} {k}".encode()).digest())
    chosen: list[int] = []
    seen: Counter = Counter()  # of names and values
    while adding := [k for k in numbers if _adds(cases[k], seen, [cases[c] for c in chosen])]:
        # balanced: the methods share the families evenly
        rarest = min(adding, key=lambda k: sum(seen[value] for value in cases[k].items()))
        chosen.append(rarest)
        seen.update(cases[rarest].items())
    return sorted(chosen)


def _adds(case: Values, seen: Counter, chosen: Sequence[Values]) -> bool:
    if any(value not in seen for value in case.items()):
        return True
    if not {"method", "family"} <= case.keys():
        return False
    families = {other["family"] for other in chosen if other["method"] == case["method"]}
    return len(families) < 2 and case["family"] not in families


def sampled(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """A sample of the cases of a test over several families of models or marked `sampled`, and all of other tests."""
    tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for test, cases in tests.items():
        mark = cases[0].get_closest_marker("sampled")
        for name in mark.args if mark else ():
            cases = _of_one_value(test, cases, name)
        values = [_values(case, apart=mark is not None and mark.kwargs.get("apart", False)) for case in cases]
        whole = not all({"family", "method"} & case.keys() for case in values) and mark is None
        yield from cases if whole else (cases[k] for k in sample(test, values))


def _of_one_value(test: str, cases: Sequence[pytest.Item], name: str) -> list[pytest.Item]:
    """The cases whose parameter ``name`` has the value that the name of the test chooses."""
    values = [case.callspec.params[name] for case in cases]
    different = list(dict.fromkeys(values))
    chosen = different[hashlib.sha256(f"{test} {name}".encode()).digest()[0] % len(different)]
    return [case for case, value in zip(cases, values, strict=True) if value == chosen]


def _values(item: pytest.Item, *, apart: bool) -> Values:
    """By each ``parametrize`` of the test, whose names may be several; the method and the family also by themselves.

    Several names together are one parameter, whose values somebody chose, unless they are to be taken ``apart``.
    """
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return {}
    params = item.callspec.params
    # a value may have neither order nor hash, and all cases of a test hold the same object
    values: dict[str, object] = {name: id(value) for name, value in params.items()}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
        if apart and len(names) > 1:
            continue
        values[",".join(names)] = tuple(id(params[name]) for name in names)
    return values | {name: params[name] for name in ("method", "family") if isinstance(params.get(name), str)}
