import json
from pathlib import Path

import pytest

from loretta.tasks import load_task

EXAMPLES = Path(__file__).parents[2] / "docs" / "data"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(tokens, tags, column="tags"):
    return {"tokens": tokens.split(), column: tags.split()}


def test_tokens_and_tags_become_a_task(tmp_path):
    task = load_task(EXAMPLES / "names.jsonl")
    assert (task.kind, task.columns, task.metrics[0]) == ("token_classification", ("tokens",), "entity_f1")
    assert task.label_names == ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    assert (len(task.train), len(task.validation)) == (9, 1)
    first = json.loads((EXAMPLES / "names.jsonl").read_text().splitlines()[0])
    (at,) = [k for k, tokens in enumerate(task.train["tokens"]) if tokens == first["tokens"]]
    assert [task.label_names[tag] for tag in task.train["tags"][at]] == first["tags"]
    path = write(tmp_path / "a.jsonl", row("a b", "NOUN VERB", "ner_tags"), row("c", "X", "ner_tags"))
    assert load_task(path, validation=path).metrics == ("accuracy", "macro_f1"), "no entities"
    path = write(tmp_path / "b.jsonl", {"words": ["a", "b"], "pos": [3, 4]})
    other = load_task(path, validation=path, text="words", label="pos", kind="token_classification")
    assert (other.label_names, other.train["tags"][:]) == (("3", "4"), [[0, 1]])


@pytest.mark.parametrize(
    ("bad", "pieces"),
    [
        (row("a b", "O"), ["column 'tags'", "1 tags for 2 tokens"]),
        (row("a", "O O"), ["column 'tags'", "2 tags for 1 tokens"]),
        ({"tokens": [], "tags": []}, ["column 'tokens'", "the list is empty"]),
        ({"tokens": "a b", "tags": ["O"]}, ["column 'tokens'", "'a b' is not a list"]),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, ["column 'tokens'", "item 2 is ' '"]),
        ({"tokens": ["a"], "tags": [None]}, ["column 'tags'", "item 1 is None"]),
        ({"tokens": ["a"]}, ["column 'tags'", "None is not a list"]),
    ],
)
def test_a_row_that_cannot_be_trained_is_named(bad, pieces, tmp_path, refused):
    path = write(tmp_path / "t.jsonl", row("a b", "B-X O"), bad)
    refused(lambda: load_task(path), f"row 2 of '{path}'", *pieces)


def test_tags_that_training_has_not_are_refused(tmp_path, refused):
    path, other = write(tmp_path / "t.jsonl", row("a b", "B-X O")), write(tmp_path / "v.jsonl", row("a b", "O B-Y"))
    refused(lambda: load_task(path, validation=other), f"row 1 of '{other}', column 'tags'", "'B-Y'", "'B-X', 'O'")
    refused(lambda: load_task(path), "too few different rows to split (1 in all)")
    path = write(tmp_path / "o.jsonl", row("a", "O"))
    refused(lambda: load_task(path), "every token", "has the tag 'O'")
