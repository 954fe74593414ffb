"""Differences of outputs against sums by hand, and which texts are read."""

import math

import pytest
import torch

from loretta.convert.outputs import _difference, read_texts
from loretta.errors import InputError


def test_logits_are_compared_as_choices():
    old = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # (1/4, 3/4) and (4/5, 1/5)
    new = torch.tensor([[math.log(3), 0.0], [math.log(4), 0.0]])  # (3/4, 1/4) and the same
    found = _difference((old, True), (new, True))
    assert found.positions == 2
    assert found.max_output == pytest.approx(math.log(3))
    assert found.mean_output == pytest.approx(math.log(3) / 2)
    assert found.max_probability == pytest.approx(0.5)
    assert found.divergence == pytest.approx((0.25 * math.log(1 / 3) + 0.75 * math.log(3)) / 2)
    assert found.agreement == 0.5
    assert "same best choice at 50.0% of 2 positions" in str(found)


def test_other_outputs_are_numbers_alone():
    old, new = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, -1.5], [0.0, 0.0]])
    found = _difference((old, False), (new, False))
    assert (found.positions, found.max_output, found.mean_output) == (3, 1.5, 0.25)
    assert (found.max_probability, found.divergence, found.agreement) == (None, None, None)
    assert str(found) == "outputs differ by 0.25 on average and 1.5 at most"


def test_equal_outputs_do_not_differ():
    rows = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    found = _difference((rows, True), (rows, True))
    assert (found.max_output, found.max_probability, found.divergence, found.agreement) == (0, 0, 0, 1)


def test_a_file_has_a_text_in_every_line_and_anything_else_is_a_text(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n\n  \ntwo words\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "texts.txt")) == ["one", "two words"]
    for text in ("a text", "and/or", "/ is a slash", "/word", "/s", "x" * 10_000):
        assert read_texts(text) == [text]


@pytest.mark.parametrize("name", ["", "texts.txt", "texts"])
def test_a_path_that_leads_to_no_file_is_no_text(name, tmp_path):
    (tmp_path / "text.txt").write_text("one\n")
    words = "is a folder" if not name else "leads to no file"
    with pytest.raises(InputError, match=words):
        read_texts(str(tmp_path / name))
    for given in ("texts.txt", "/texts.txt", "~/texts", "./texts", "../texts", "/no/texts", "/texts/"):
        with pytest.raises(InputError, match="leads to no file"):
            read_texts(given)


def test_a_file_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG")
    for given, words in (("empty.txt", "holds no text"), ("picture.txt", "is no text file in UTF-8")):
        with pytest.raises(InputError, match=words):
            read_texts(str(tmp_path / given))
    with pytest.raises(InputError, match="holds no text"):
        read_texts("  ")
