import ast
from pathlib import Path

import pytest

import loretta.tasks
from loretta.errors import InputError
from loretta.tasks import Known, load_task, read

HEAVY = {"datasets", "pandas", "pyarrow", "sklearn", "scipy", "torch", "transformers", "peft"}
ALLOWED_HERE = {"errors", "tasks", "wording"}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,body,stars\n" + "".join(f"t{n},b{n},{n % 2}\n" for n in range(20)))
    return path


def test_the_name_of_a_glue_task_is_loaded_as_one(monkeypatch, tmp_path):
    monkeypatch.setattr("loretta.tasks.glue.load", lambda name, data_dir: (name, data_dir))
    assert load_task("rte", data_dir=str(tmp_path), seed=3) == ("rte", tmp_path)
    assert load_task("stsb") == ("stsb", None)


def test_stdlib_is_the_demo(monkeypatch):
    monkeypatch.setattr("loretta.tasks.stdlib.load", lambda: "the demo")
    assert load_task("stdlib") == "the demo"


def test_options_name_the_columns_and_the_kind_of_a_table(table):
    task = load_task(str(table), label="stars")
    assert task.train["text"][0].startswith("t")
    assert task.label_names == ("0", "1")
    other = load_task(
        str(table), text="body", text_pair="text", label="stars", kind="regression", validation=str(table)
    )
    assert other.kind == "regression"
    assert (other.train[0]["text"], other.train[0]["text_pair"]) == ("b0", "t0")
    assert len(other.validation) == len(other.train) == 20
    assert load_task(str(table), label="stars", test=table).test.num_rows == 20


def test_a_column_called_label_need_not_be_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t{k},{k % 2}\n" for k in range(8)))
    task, named = load_task(path), load_task(path, label="label")
    assert (task.kind, task.label_names, task.train[:]) == ("classification", ("0", "1"), named.train[:])


def test_the_seed_reaches_the_split(table):
    first, second = (load_task(str(table), label="stars", seed=seed).validation["text"][:] for seed in (0, 1))
    assert first != second


def test_text_without_labels_is_for_language_modelling(table, tmp_path):
    assert load_task(str(table), text="body", kind="language_modeling").train["text"][0].startswith("b")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    for kind in (None, "language_modeling"):
        assert load_task(str(tmp_path / "a.txt"), kind=kind).kind == "language_modeling"


def test_a_column_for_the_validation_of_plain_text(table, tmp_path, refused):
    book = tmp_path / "a.txt"
    book.write_text("one\n\ntwo\n\nthree")
    task = load_task(str(book), text="body", validation=table)
    assert (len(task.train), task.validation["text"][0]) == (3, "b0")
    refused(lambda: load_task(str(book), text="body", validation=book), "--text does not fit", "plain text")


def test_a_path_need_not_be_a_string(table):
    assert load_task(table, label="stars").name == "reviews.csv"


def test_a_file_is_found_next_door_and_at_home(table, monkeypatch):
    monkeypatch.chdir(table.parent)
    monkeypatch.setenv("HOME", str(table.parent))
    assert (
        load_task("reviews.csv", label="stars").name == load_task("~/reviews.csv", label="stars").name == "reviews.csv"
    )


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        ("SST-2", ["'SST-2'", "did you mean 'sst2'?", "'mnli'", "'stdlib'", ".csv", ".parquet", ".txt"]),
        ("wnli", ["'wnli'", "'qnli'"]),
        ("", ["unknown data ''"]),
        ("x" * 5000, ["unknown data"]),
        ("missing.csv", ["'missing.csv' does not exist"]),
        ("some/where", ["'some/where' is no file here, and no dataset that can be loaded"]),
        ("~nobody-here/a.csv", ["'~nobody-here/a.csv' does not exist"]),
        ("two\nlines/a.csv", [r"'two\nlines/a.csv' holds a line end", "give the path of a file"]),
        ("zero\0byte.csv", [r"'zero\x00byte.csv' holds", "a zero byte"]),
    ],
)
def test_data_that_are_nowhere_are_refused(refused, data, pieces):
    refused(lambda: load_task(data), *pieces)


def test_a_folder_and_a_strange_ending_are_refused(refused, tmp_path):
    refused(lambda: load_task(str(tmp_path)), f"'{tmp_path}' is a folder")
    path = tmp_path / "a.xlsx"
    path.write_text("x")
    refused(lambda: load_task(str(path)), "'.xlsx'", ".csv")


def test_columns_that_cannot_be_guessed_have_to_be_named(table, refused):
    columns = "'text', 'body', 'stars'"
    refused(lambda: load_task(str(table)), f"'{table}'", "give --label COLUMN", columns, "language_modeling")
    refused(lambda: load_task(str(table), text="body"), "give --label COLUMN", columns)
    table.write_text("body,stars\na,1\n")
    refused(lambda: load_task(str(table), label="stars"), "give --text COLUMN", "'body', 'stars'")
    table.write_text("text;stars\na;1\n")
    refused(lambda: load_task(str(table), label="stars"), "separated by ';'", "'text;stars'")


@pytest.mark.parametrize(
    ("data", "options", "pieces"),
    [
        ("rte", {"label": "x"}, ["--label does not fit 'rte'", "GLUE"]),
        ("rte", {"text": "x", "kind": "regression"}, ["--text and --kind do not fit 'rte'"]),
        ("rte", {"validation": "x.csv"}, ["--validation"]),
        ("stdlib", {"data_dir": "x"}, ["--data-dir does not fit 'stdlib'"]),
        ("stdlib", {"test": "x.csv"}, ["--test does not fit 'stdlib'"]),
        ("a.csv", {"data_dir": "x"}, ["--data-dir does not fit the file 'a.csv'"]),
        ("a.txt", {"label": "x"}, ["--label does not fit 'a.txt'"]),
        ("a.txt", {"kind": "regression"}, ["--kind regression does not fit 'a.txt'"]),
        ("a.csv", {"kind": "language_modeling", "label": "x"}, ["--label does not fit --kind language_modeling"]),
        ("a.csv", {"kind": "clasification"}, ["'clasification'", "did you mean 'classification'?"]),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(refused, data, options, pieces):
    refused(lambda: load_task(data, **options), *pieces)


def test_the_package_stands_low_and_imports_late():
    files = sorted(Path(loretta.tasks.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        tree = ast.parse(file.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            name: node
            for node in nodes
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        ours = {name.split(".")[1] for name in names if name.startswith("loretta.")}
        assert ours <= ALLOWED_HERE, file.name
        early = {name.split(".")[0] for name, node in names.items() if node in tree.body}
        assert not early & HEAVY, file.name


@pytest.mark.parametrize(
    ("name", "content", "kind", "labels", "column", "ids"),
    [
        ("a.csv", "text,label\na,10\nb,1.0\n", "classification", ("0", "1", "10"), "label", [2, 1]),
        ("b.csv", "text,label\na,1\nb,01\n", "classification", ("01", "1"), "label", [1, 0]),
        ("c.csv", "text,label\na,3\n", "regression", (), "label", [3.0]),
        ("d.jsonl", '{"text": "a", "label": ["y"]}\n', "multi_label", ("x", "y"), "label", [[0.0, 1.0]]),
        ("e.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n', "token_classification", ("B-X", "O"), "tags", [[1]]),
    ],
)
def test_known_labels_keep_their_ids_where_some_are_missing(name, content, kind, labels, column, ids, tmp_path):
    (tmp_path / name).write_text(content)
    file = str(tmp_path / name)
    task = load_task(file, kind=kind, validation=file, known=Known(data="train.csv", label_names=labels))
    assert (task.kind, task.label_names) == (kind, labels)
    assert task.validation[column] == ids


def test_a_tag_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "new.jsonl").write_text('{"tokens": ["a"], "tags": ["B-Y"]}\n')
    known = Known(data="train.jsonl", label_names=("B-X", "O"))
    with pytest.raises(InputError, match=r"'B-Y' is not in the training file 'train\.jsonl'"):
        load_task(str(tmp_path / "new.jsonl"), kind="token_classification", validation="x.jsonl", known=known)


def test_a_file_that_is_every_split_is_read_once(table, monkeypatch):
    """As `loretta eval --data FILE` gives it."""
    read_by, text_of = [], read.text_of
    monkeypatch.setattr(read, "text_of", lambda path: read_by.append(path) or text_of(path))
    task = load_task(table, text="text", label="stars", validation=str(table), test=table)
    assert read_by == [table]
    assert task.train.to_dict() == task.validation.to_dict() == task.test.to_dict()
