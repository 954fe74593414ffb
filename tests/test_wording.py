import json

import pytest

from loretta.wording import as_json, as_json_lines, distinct, flat, listed, nearest, one_line, quoted, size_words


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


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (5 * 2**40, "5.0 TiB")],
)
def test_sizes_are_in_the_unit_below_1024(n_bytes, words):
    assert size_words(n_bytes) == words


def test_nested_settings_by_dotted_name():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": None}}}) == {"a": 1, "b.c": 2, "b.d.e": None}


def test_a_message_of_a_library_on_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line("x" * 9, most=4) == "xxxx..."


def test_distinct_texts_keep_their_first_order():
    assert distinct(["b", "a", "b"]) == "b, a"


def test_json_that_every_reader_takes():
    def refuse(name):
        raise AssertionError(name)

    content = {"a": [float("nan"), 1, {"b": float("-inf")}, (0.5,)], "c": "\x9b1mé\ud800", "d": True}
    text = as_json(content)
    assert text.isascii()
    assert json.loads(text, parse_constant=refuse) == {
        "a": [None, 1, {"b": None}, [0.5]],
        "c": "\x9b1mé\ud800",
        "d": True,
    }
    assert text.endswith("}\n")


def test_lines_of_json_escape_what_a_terminal_obeys():
    rows = [{"text": "one\ntwo", "score": 0.5}, {"text": "é中 \u2028\u202e\u200e\U000e0041\ud800\x9b"}]
    text = as_json_lines(rows)
    assert "é中" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    lines = text.split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert lines[-1] == ""
