import pytest

from loretta.tasks.wording import listed, nearest, quoted


def test_quotes_stay_on_one_line_and_short():
    assert quoted("two\nlines") == r"'two\nlines'"
    assert len(quoted("x" * 1000)) < 70


def test_a_long_list_is_counted_after_the_twentieth():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed([f"c{n}" for n in range(23)]).endswith("'c19' and 3 more")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("SST-2", " (did you mean 'sst2'?)"), ("sts_b", " (did you mean 'stsb'?)"), ("nothing like it", "")],
)
def test_nearest_name_whatever_the_case_and_hyphens(name, hint):
    assert nearest(name, ["sst2", "stsb", "rte"]) == hint
