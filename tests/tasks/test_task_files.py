import csv
import gzip
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loretta.tasks import load_task
from loretta.tasks.files import load_table, load_text
from loretta.tasks.split import text_key


def write(path, rows, sep=","):
    """A table with the columns text, pair and label, from rows of three."""
    path.write_text("\n".join(sep.join(map(str, row)) for row in [("text", "pair", "label"), *rows]) + "\n")
    return path


@pytest.fixture
def reviews(tmp_path):
    rows = [(f"good {n}", f"so {n}", "pos") for n in range(30)] + [(f"bad {n}", f"so {n}", "neg") for n in range(10)]
    return write(tmp_path / "reviews.csv", rows)


def texts(dataset):
    return {text_key((text,)) for text in dataset["text"]}


def test_a_table_becomes_a_task(reviews):
    task = load_table(reviews, text="text", text_pair="pair", label="label")
    assert (task.name, task.kind) == ("reviews.csv", "classification")
    assert task.columns == ("text", "text_pair")
    assert task.label_names == ("neg", "pos")
    assert task.metrics == ("accuracy", "macro_f1")
    assert task.test is None
    assert task.train.column_names == task.validation.column_names == ["text", "text_pair", "label"]
    assert sorted(task.validation["label"]) == [0] * 2 + [1] * 6
    assert sorted(task.train["label"]) == [0] * 8 + [1] * 24
    assert not texts(task.train) & texts(task.validation)
    row = task.train[0]
    assert row["text_pair"] == f"so {row['text'].split()[1]}"
    assert row["label"] == (row["text"].startswith("good"))
    assert task.notes == (
        "8 of the 40 rows of 'reviews.csv' were held out for validation (seed 0, in each class alike), "
        "rows with equal texts on one side",
    )


def test_the_seed_decides_the_split(reviews):
    def held(seed):
        return load_table(reviews, text="text", label="label", seed=seed).validation["text"][:]

    assert held(4) == held(4) != held(5)


def test_the_format_of_the_file_does_not_matter(tmp_path, reviews):
    lines = [line.split(",") for line in reviews.read_text().splitlines()[1:]]
    columns = dict(zip(("text", "pair", "label"), zip(*lines, strict=True), strict=True))
    pq.write_table(pa.table({name: list(cells) for name, cells in columns.items()}), tmp_path / "reviews.parquet")
    rows = [json.dumps(dict(zip(columns, line, strict=True))) for line in lines]
    (tmp_path / "reviews.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    write(tmp_path / "reviews.tsv", lines, sep="\t")
    reference = load_table(reviews, text="text", label="label")
    for name in ("reviews.parquet", "reviews.jsonl.gz", "reviews.tsv"):
        task = load_table(tmp_path / name, text="text", label="label")
        assert task.train.to_dict() == reference.train.to_dict()
        assert task.validation.to_dict() == reference.validation.to_dict()


def test_equal_texts_stay_on_one_side(tmp_path):
    rows = [(f"{'  Text' if n % 2 else 'text'} {n // 4}", "p", n // 4 % 2) for n in range(120)]
    task = load_table(write(tmp_path / "a.csv", rows), text="text", label="label")
    assert len(task.train) + len(task.validation) == 120
    assert len(task.validation) == 24
    assert not texts(task.train) & texts(task.validation)


def test_scores(tmp_path):
    rows = [(f"text {n}", "p", n / 4) for n in range(20)]
    task = load_table(write(tmp_path / "a.csv", rows), text="text", label="label")
    assert (task.kind, task.label_names, task.metrics[0]) == ("regression", (), "spearman")
    assert len(task.validation) == 4
    assert task.train.features["label"].dtype == "float64"
    assert all(
        label == int(text.split()[1]) / 4 for text, label in zip(task.train["text"], task.train["label"], strict=True)
    )


def test_whole_numbers_as_scores_on_request(tmp_path):
    rows = [(f"text {n}", "p", n % 5) for n in range(20)]
    path = write(tmp_path / "a.csv", rows)
    assert load_table(path, text="text", label="label").label_names == ("0", "1", "2", "3", "4")
    assert load_table(path, text="text", label="label", kind="regression").kind == "regression"


def test_files_for_validation_and_test(tmp_path, reviews):
    validation = write(tmp_path / "val.csv", [("new", "p", "neg"), ("Good 1", "p", "pos")])
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "bad  2", "label": "pos"}\n')
    task = load_table(reviews, text="text", label="label", validation_path=validation, test_path=test)
    assert (len(task.train), task.validation["label"][:], task.test["label"][:]) == (40, [0, 1], [1])
    assert task.notes == (
        "1 of the 2 validation rows have a text that is in train, which flatters the score",
        "1 of the 1 test rows have a text that is in train, which flatters the score",
    )


def test_a_class_too_small_to_hold_out_is_noted(tmp_path):
    rows = [(f"t{n}", "p", "many") for n in range(10)] + [("only", "p", "rare")]
    task = load_table(write(tmp_path / "a.csv", rows), text="text", label="label")
    assert task.label_names[1] == "rare"
    assert 1 in task.train["label"]
    assert set(task.validation["label"]) == {0}
    assert "'rare'" in task.notes[1]


def test_texts_that_look_like_a_mistake_are_noted(tmp_path):
    rows = [(f"t{n}", "p", "ab"[n % 2]) for n in range(10)]
    doubtful = [*rows, ("T 1 x", "p", "a"), ("t 1  X", "p", "b"), ("t0", "p", "a")]
    task = load_table(write(tmp_path / "a.csv", doubtful), text="text", label="label")
    assert "1 text stands in several rows with different labels" in task.notes
    numbers = [(str(n), "p", label) for n, (_, _, label) in enumerate(rows)]
    task = load_table(write(tmp_path / "b.csv", numbers), text="text", label="label")
    assert task.notes[1:] == ("every cell of column 'text' is a number: is it the text?",)


def test_many_small_classes_are_noted_in_short(tmp_path):
    rows = [(f"t{n}", "p", "many") for n in range(10)] + [(f"only {n}", "p", f"rare {n}") for n in range(50)]
    note = load_table(write(tmp_path / "a.csv", rows), text="text", label="label").notes[1]
    assert note.endswith("and 30 more")


GOOD = [("a", "p", 0), ("b", "p", 0), ("c", "p", 1), ("d", "p", 1)]


@pytest.mark.parametrize(
    ("rows", "pieces"),
    [
        ([*GOOD, ("", "p", 1), (" ", "p", 0)], ["'text'", "2 of 6 rows", "row 5"]),
        ([GOOD[0], ("b", "p", ""), *GOOD], ["'label'", "1 of 6 rows", "row 2"]),
        ([("a", "p", "x"), ("b", "p", "x")], ["'x'", "two different labels"]),
        ([("a", "p", "x"), ("b", "p", "y")], ["too few different rows to split (2", "--validation FILE"]),
        ([("a", "p", "x"), ("A ", "p", "y")], ["too few different rows to split"]),
        ([(f"t{n}", "p", n) for n in range(51)], ["51 different whole numbers", "--kind regression"]),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(tmp_path, refused, rows, pieces):
    path = write(tmp_path / "a.csv", rows)
    refused(lambda: load_table(path, text="text", label="label"), f"'{path}'", *pieces)


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ('{"text": 5, "label": 0}', ["'text'", "5 is not text", "row 2", "not text"]),
        ('{"text": null, "label": 0}', ["'text'", "empty in 1 of 2", "row 2"]),
        ('{"text": "b", "label": NaN}', ["'label'", "empty in 1 of 2", "row 2"]),
        ('{"text": "b"}', ["'label'", "empty in 1 of 2", "row 2"]),
        ('{"text": "b", "label": [1, 2]}', ["'label'", "[1, 2]", "row 2", "not one label"]),
    ],
)
def test_cells_that_are_no_text_or_label_are_refused(tmp_path, refused, row, pieces):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n' + row)
    refused(lambda: load_table(path, text="text", label="label"), f"'{path}'", *pieces)


@pytest.mark.parametrize("which", ["validation_path", "test_path"])
def test_unseen_labels_name_the_file(tmp_path, reviews, refused, which):
    other = write(tmp_path / "other.csv", [("x", "p", "pos"), ("y", "p", "neutral"), ("z", "p", "neutral")])
    call = lambda: load_table(reviews, text="text", label="label", **{which: other})  # noqa: E731
    refused(call, f"'{other}'", "'neutral' in 2 rows", f"'{reviews}'")


def test_other_files_are_checked_as_the_first(tmp_path, reviews, refused):
    missing, empty = tmp_path / "val.csv", write(tmp_path / "test.csv", [])
    refused(
        lambda: load_table(reviews, text="text", label="label", validation_path=missing), f"'{missing}' does not exist"
    )
    refused(lambda: load_table(reviews, text="text", label="label", test_path=empty), f"'{empty}'", "no rows")


def test_one_column_cannot_play_two_parts(reviews, refused):
    refused(lambda: load_table(reviews, text="text", label="text"), "'text'", "twice")
    refused(lambda: load_table(reviews, text="text", text_pair="text", label="label"), "'text'", "twice")


def test_plain_text_is_split_by_paragraphs(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {n}\nwith two lines." for n in range(30)))
    task = load_text(path)
    assert (task.name, task.kind, task.columns) == ("book.txt", "language_modeling", ("text",))
    assert (task.label_names, task.metrics, task.test) == ((), ("perplexity",), None)
    assert task.train.column_names == ["text"]
    assert (len(task.train), len(task.validation)) == (27, 3)
    assert not texts(task.train) & texts(task.validation)
    assert task.train["text"][0].endswith("\nwith two lines.")
    assert "3 of the 30 documents of 'book.txt'" in task.notes[0]
    assert load_text(path).validation.to_dict() == task.validation.to_dict()
    assert load_text(path, seed=1).validation.to_dict() != task.validation.to_dict()


def test_a_column_of_a_table_can_be_the_documents(tmp_path, reviews):
    task = load_text(reviews, text="pair")
    assert set(task.validation["text"]) <= {f"so {n}" for n in range(30)}
    assert not texts(task.train) & texts(task.validation)
    assert load_text(reviews).train["text"][0].startswith("good")
    (tmp_path / "val.md").write_text("one\n\ngood 1")
    task = load_text(reviews, validation_path=tmp_path / "val.md", test_path=tmp_path / "val.md")
    assert task.validation["text"][:] == task.test["text"][:] == ["one", "good 1"]
    assert task.notes == tuple(
        f"1 of the 2 {split} rows have a text that is in train, which flatters the score"
        for split in ("validation", "test")
    )


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("a.txt", "one paragraph\nonly", ["too few different documents to split (1"]),
        ("a.txt", "same\n\nSAME", ["too few different documents to split (2"]),
        ("a.csv", "body,id\nx,1\n", ["no column 'text'", "--text COLUMN", "'body', 'id'"]),
        ("a.csv", "text,id\nx,1\n,2\n", ["'text'", "1 of 2 rows", "row 2"]),
        ("a.jsonl", '{"text": 1}', ["1 is not text", "not text"]),
    ],
)
def test_documents_that_cannot_be_trained_on_are_refused(tmp_path, refused, name, content, pieces):
    path = tmp_path / name
    path.write_text(content)
    refused(lambda: load_text(path), f"'{path}'", *pieces)


@pytest.mark.parametrize("mark", [",", "\t"])
def test_rows_that_a_stray_quotation_mark_swallows_are_named(mark, tmp_path):
    path = tmp_path / ("a.tsv" if mark == "\t" else "a.csv")
    rows = ['"So he said', "a plain one", 'and the end."', *(f"text {k}" for k in range(8))]
    path.write_text("\n".join([f"text{mark}label", *(f"{text}{mark}{k % 2}" for k, text in enumerate(rows))]))
    as_they_stand = pandas.read_csv(path, sep=mark, quoting=csv.QUOTE_NONE)
    assert len(as_they_stand) == len(rows)
    task = load_task(path)
    assert len(task.train) + len(task.validation) == len(rows) - 2
    assert [note for note in task.notes if note.startswith("1 text holds what looks like whole rows")]
    path.write_text(f'text{mark}label\n"two\nlines"{mark}1\n"a list:\nx{mark} y"{mark}0\nb{mark}1\nc{mark}0\n')
    assert not [note for note in load_task(path).notes if "whole rows" in note], "no line of these is a row"


def test_numbers_that_are_read_as_words_are_named(tmp_path, refused):
    path = tmp_path / "a.csv"
    path.write_text("text;label\n" + "".join(f"text {k};{k % 3},5\n" for k in range(12)))
    (note,) = [note for note in load_task(path, separator=";").notes if "commas or percent" in note]
    assert note.startswith("the classes '0,5', '1,5', '2,5' are numbers")
    path.write_text("text,label\n" + "".join(f"text {k},word {k}\n" for k in range(12)))
    refused(lambda: load_task(path), "12 different labels in 12 rows", "--kind regression", "--validation FILE")


def test_json_of_columns_is_told_from_json_of_rows(tmp_path, refused):
    table = pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    table.to_json(tmp_path / "columns.json")
    table.to_json(tmp_path / "over_lines.json", indent=1)
    table.to_json(tmp_path / "rows.json", orient="records")
    for name in ("columns.json", "over_lines.json"):
        refused(lambda name=name: load_task(tmp_path / name), f"'{tmp_path / name}' is one JSON object", "lines=True")
    task = load_task(tmp_path / "rows.json", validation=tmp_path / "rows.json")
    assert (list(task.train["text"]), task.label_names) == (["a", "b"], ("0", "1"))
