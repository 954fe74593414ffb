import json
from pathlib import Path

import pytest

from loretta.tasks import load_task

EXAMPLES = Path(__file__).parents[2] / "docs" / "data"
NAMES = ("boats", "prices", "weather")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lists_and_columns_are_the_same():
    lists = load_task(EXAMPLES / "topics.jsonl", label="labels")
    columns = load_task(EXAMPLES / "topics.csv", label="boats,prices,weather")
    for task in (lists, columns):
        assert (task.kind, task.label_names) == ("multi_label", NAMES)
        assert task.metrics == ("micro_f1", "macro_f1", "accuracy")
        assert (len(task.train), len(task.validation)) == (8, 2)
    assert lists.train[:] == columns.train[:]
    by_text = dict(zip(lists.train["text"], lists.train["label"], strict=True))
    for line in (EXAMPLES / "topics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["text"] in by_text:
            assert by_text[row["text"]] == [float(name in row["labels"]) for name in NAMES]


@pytest.mark.parametrize(
    ("labels", "pieces"),
    [
        ("a", ["'a' is not a list of labels"]),
        (["a", 3], ["the label 3 is not a name"]),
        (["a", " "], ["the label ' ' is not a name"]),
        (["a", "a"], ["the label 'a' is there twice"]),
    ],
)
def test_a_cell_that_is_no_list_of_labels_is_named(labels, pieces, tmp_path, refused):
    path = write(tmp_path / "m.jsonl", {"text": "x", "topics": ["a", "b"]}, {"text": "y", "topics": labels})
    refused(lambda: load_task(path, label="topics"), f"row 2 of '{path}', column 'topics'", *pieces)


def test_what_does_not_fit_is_refused(tmp_path, refused):
    path = write(tmp_path / "m.jsonl", *({"text": f"x {k}", "topics": ["a", "b"][: k % 3]} for k in range(12)))
    other = write(tmp_path / "v.jsonl", {"text": "z", "topics": ["c"]})
    refused(lambda: load_task(path, label="topics", validation=other), f"row 1 of '{other}'", "lacks 'c'", "'a', 'b'")
    refused(lambda: load_task(path, label="topics", kind="regression"), "several labels a row", "'regression'")
    table = tmp_path / "t.csv"
    table.write_text("text,a,b\nx,0,1\ny,1,2\nz,1,0\n")
    refused(lambda: load_task(table, label="a,b"), f"row 2 of '{table}', column 'b'", "'2' is neither 0 nor 1")
    refused(lambda: load_task(table, label="a,c"), "has no column 'c'")
    refused(lambda: load_task(table, label="a,text"), "'text' is given twice")
    alone = write(tmp_path / "1.jsonl", {"text": "x", "topics": ["a"]}, {"text": "y", "topics": []})
    refused(lambda: load_task(alone, label="topics"), "have the labels 'a'", "at least two")
