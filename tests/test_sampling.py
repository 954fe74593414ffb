"""The sample of a test's cases: every value, every method on two families, and all pairs over several tests."""

from itertools import combinations, product

import pytest
from sampling import sample, sampled

METHODS, FAMILIES = ("rep", "adp", "shared"), ("bert", "gpt2", "llama", "t5", "mlp")
GRID = [{"method": m, "family": f, "dtype": d} for m, f, d in product(METHODS, FAMILIES, range(4))]
# a list of pairs is one parameter: what it holds was chosen by hand
SOURCE = """
import pytest

@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(("method", "options"), [("rep", {"r": 1}), ("rep", {}), ("adp", {}), ("adp", {"r": 1})])
def test_on_two(family, method, options):
    pass

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", range(10))
def test_without_families(number, dtype):
    pass

@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_of_methods(method, trains):
    pass

@pytest.mark.sampled
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_marked(size, trains):
    pass

@pytest.mark.sampled(apart=True)
@pytest.mark.parametrize(("size", "trains"), [(1, False), (1, True), (2, False), (2, True), (3, False)])
def test_of_pairs(size, trains):
    pass

@pytest.mark.sampled("method")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_of_one(method, trains):
    pass

@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_on_each_family(family):
    pass

def test_without_parameters():
    pass
"""

SAMPLED = ("test_on_two", "test_of_methods", "test_marked", "test_of_pairs", "test_of_one")


@pytest.mark.parametrize("cases", [GRID, [case for case in GRID if case["method"] != "adp" or case["family"] == "t5"]])
def test_a_sample_has_every_value_and_every_method_on_two_families(cases):
    for k in range(20):
        chosen = [cases[number] for number in sample(f"test {k}", cases)]
        assert len(chosen) <= 6
        for name in GRID[0]:
            assert {case[name] for case in chosen} == {case[name] for case in cases}
        for method in METHODS:
            families, of_all = ({c["family"] for c in group if c["method"] == method} for group in (chosen, cases))
            assert len(families) >= min(2, len(of_all))


def test_several_tests_meet_all_pairs():
    pairs = [frozenset(pair) for case in GRID for pair in combinations(case.items(), 2)]
    samples = [sample(f"test {k}", GRID) for k in range(60)]
    assert samples == [sample(f"test {k}", GRID) for k in range(60)]
    met = {frozenset(pair) for numbers in samples for k in numbers for pair in combinations(GRID[k].items(), 2)}
    assert met == set(pairs)


def test_a_mark_that_names_a_parameter_leaves_one_value_and_several_tests_have_all(pytester):
    names = [f"test_{k}" for k in range(20)]
    test = "@pytest.mark.sampled('method')\n@pytest.mark.parametrize('method', ['rep', 'adp', 'shared'])\n"
    items = pytester.getitems("import pytest\n" + "".join(f"{test}def {name}(method): ...\n" for name in names))
    chosen = [(item.originalname, item.callspec.params["method"]) for item in sampled(items)]
    assert [name for name, _ in chosen] == names
    assert {method for _, method in chosen} == {"rep", "adp", "shared"}


def test_what_needs_no_sample_runs_whole(pytester):
    pytester.makeini("[pytest]\nmarkers = sampled")
    items = pytester.getitems(SOURCE)
    chosen = list(sampled(items))
    others = [item for item in items if item.originalname not in SAMPLED]
    assert [item for item in chosen if item in others] == others
    assert len(others) == 10 * 2 + 4 + 1
    for name, parameter, values in (
        ("test_of_methods", "method", {"rep", "adp", "shared"}),
        ("test_marked", "size", {1, 2, 3}),
        ("test_of_pairs", "size", {1, 2, 3}),
    ):
        params = [item.callspec.params for item in chosen if item.originalname == name]
        assert len(params) == 3
        assert {each[parameter] for each in params} == values
        assert {each["trains"] for each in params} == {False, True}
    of_one = [item.callspec.params for item in chosen if item.originalname == "test_of_one"]
    assert len({params["method"] for params in of_one}) == 1
    assert sorted(params["trains"] for params in of_one) == [False, True]
    on_two = [item.callspec.params for item in chosen if "test_on_two" in item.name]
    assert len(on_two) == 4 < len(items) - len(others)
    assert {params["family"] for params in on_two} == {"bert", "gpt2", "llama", "t5"}
    assert {(params["method"], str(params["options"])) for params in on_two} == {
        (method, options) for method in ("rep", "adp") for options in ("{}", "{'r': 1}")
    }
