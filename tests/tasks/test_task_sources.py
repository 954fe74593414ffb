import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from loretta.tasks import load_task
from loretta.tasks.sources import is_hub_id, names_files


@pytest.fixture
def folder(tmp_path):
    """a.csv with 6 rows and b.tsv with 4, of the columns text and label, and a file of another kind."""
    for name, mark, numbers in (("a.csv", ",", range(6)), ("b.tsv", "\t", range(6, 10))):
        lines = [mark.join(("text", "label")), *(mark.join((f"text {k}", "ab"[k % 2])) for k in numbers)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "notes.pdf").write_text("no data")
    return tmp_path


def texts(task):
    return sorted([*task.train["text"], *task.validation["text"]])


def test_files_follow_each_other(folder):
    """In a list, by a pattern, in a folder; on every side of the split."""
    expected = [f"text {k}" for k in range(10)]
    names = {
        f"{folder}/a.csv,{folder}/b.tsv": "a.csv and 1 more",
        f"{folder}/a.csv,{folder}/b*": "a.csv and 1 more",
        f"{folder}/*.?sv": "*.?sv",
        f"{folder}": folder.name,
        f"{folder}/**/*.?sv": "*.?sv",
    }
    for given, name in names.items():
        task = load_task(given, label="label")
        assert (texts(task), task.name) == (expected, name)
        assert f" of the 10 rows of '{name}' were held out" in task.notes[0]
    task = load_task(f"{folder}/a.csv", label="label", validation=f"{folder}/*.tsv")
    assert list(task.validation["text"]) == expected[6:]
    odd = folder / "a,b.csv"
    odd.write_bytes((folder / "a.csv").read_bytes())
    assert texts(load_task(odd, label="label")) == expected[:6], "a file whose name has a comma"
    (folder / "x.txt").write_text("One.\n\nTwo.")
    (folder / "y.txt").write_text("Three.")
    task = load_task(f"{folder}/*.txt")
    assert (task.kind, texts(task)) == ("language_modeling", ["One.", "Three.", "Two."])


def test_a_mistake_is_told_with_its_own_file_and_row(folder, refused):
    given = f"{folder}/a.csv,{folder}/c.csv"
    (folder / "c.csv").write_text("text,label\ngood,a\n,b\n")
    refused(lambda: load_task(given, label="label"), f"first in row 2 of '{folder}/c.csv'", "1 of 8 rows")
    (folder / "c.csv").write_text("text,label\nx,1\ny,2\nz,odd\n")
    (folder / "d.csv").write_text("text,label\nx,1\ny,2\n")
    given = f"{folder}/d.csv,{folder}/c.csv"
    refused(lambda: load_task(given, label="label"), f"row 3 of '{folder}/c.csv'", "'odd'")
    refused(lambda: load_task(given, label="label", kind="regression"), f"row 3 of '{folder}/c.csv'", "'odd'")
    rows = [{"messages": [{"role": "assistant", "content": "Hi"}]}, {"messages": []}]
    for name, some in (("1.jsonl", rows[:1]), ("2.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    refused(lambda: load_task(f"{folder}/?.jsonl"), f"row 2 of '{folder}/2.jsonl', column 'messages'")


def test_files_that_do_not_fit_together_are_refused(folder, refused):
    (folder / "c.csv").write_text("words,label\nx,1\n")
    refused(
        lambda: load_task(f"{folder}/a.csv,{folder}/c.csv", label="label"), f"'{folder}/c.csv' has the columns 'words'"
    )
    refused(lambda: load_task(f"{folder}/*.parquet", label="label"), "matches no file")
    (folder / "x.txt").write_text("One.")
    refused(lambda: load_task(f"{folder}", label="label"), "has tables and plain text", "'.csv', '.tsv', '.txt'")
    (folder / "sub").mkdir()
    refused(lambda: load_task(f"{folder}/sub", label="label"), "is a folder without a data file")
    (folder / "sub" / "deep.csv").write_text("text,label\nx,1\n")
    words = [
        f"such as '{folder}/sub/deep.csv'",
        f"give '{folder}/*.csv' for those in it alone, '{folder}/**/*.csv' for all",
    ]
    refused(lambda: load_task(f"{folder}", label="label"), *words)
    refused(lambda: load_task(f"{folder}/a.csv,nowhere.csv", label="label"), "'nowhere.csv' does not exist")


def test_another_separator(folder, refused):
    path = folder / "s.csv"
    path.write_text('text;label\ngood, really;"a;b"\nbad;c\nfine;c\nugly;a;b\n'.replace("ugly;a;b", 'ugly;"a;b"'))
    task = load_task(path, label="label", separator=";")
    assert task.label_names == ("a;b", "c")
    assert "good, really" in texts(task)
    (folder / "t.csv").write_bytes((folder / "b.tsv").read_bytes())
    assert texts(load_task(folder / "t.csv", label="label", separator="tab")) == [f"text {k}" for k in range(6, 10)]
    for columns in ({"label": "label", "text": "text"}, {"text": "text"}, {}):
        refused(lambda given=columns: load_task(path, **given), "separated by ';'", "give --separator ';'")
    refused(lambda: load_task(path, label="label", separator=";;"), "';;' is not one character")
    (folder / "x.txt").write_text("One.")
    refused(lambda: load_task(folder / "x.txt", separator=";"), "--separator is for .csv and .tsv")


def test_what_words_for_data_mean(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "org").mkdir()
    (folder / "org" / "here").mkdir()
    assert [names_files(given) for given in ("a.csv", "no.csv", "*", "org/here", "./x/y", "a,b")] == [True] * 6
    assert [is_hub_id(given) for given in ("org/name", "org/name:config", "org/here", "sst2", "a/b/c", "")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds org/moods with the config small, of which the dataset's own loader is asked."""
    features = Features({"text": Value("string"), "mood": ClassLabel(names=["low", "high"])})

    def rows(first, last):
        return Dataset.from_dict(
            {"text": [f"text {k}" for k in range(first, last)], "mood": [k % 2 for k in range(first, last)]},
            features=features,
        )

    splits = DatasetDict({"train": rows(0, 8), "dev": rows(8, 12), "extra": rows(12, 15)})

    def load_dataset(name, config=None):
        if (name, config) != ("org/moods", "small"):
            raise FileNotFoundError(f"Couldn't find {name}")
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_dataset_on_the_hub(hub, folder, refused):
    task = load_task("org/moods:small", label="mood")
    assert (task.name, task.label_names) == ("org/moods:small", ("high", "low")), "classes by their names"
    assert (list(task.train["text"]), len(task.validation), task.test) == ([f"text {k}" for k in range(8)], 4, None)
    other = load_task("org/moods:small", label="mood", split="train=dev,test=extra", validation=None)
    assert (len(other.train), len(other.validation), len(other.test)) == (2, 2, 3), "dev is not validated on too"
    part = load_task("org/moods:small", label="mood", split="train=train[:6],validation=train[75%:]+dev[:1]")
    assert list(part.train["text"]) == [f"text {k}" for k in range(6)]
    assert list(part.validation["text"]) == ["text 6", "text 7", "text 8"]
    refused(lambda: load_task("org/moods", label="mood"), "no dataset that can be loaded", "Couldn't find org/moods")
    for split in ("none", "none[:2]", "train[:x]"):
        refused(lambda split=split: load_task("org/moods:small", label="mood", split=split), f"no split '{split}'")
    refused(lambda: load_task("org/moods:small", label="mood", split="vali=dev"), "'vali'", "is none of 'train'")
    refused(lambda: load_task("org/moods:small", label="mood", text="words"), "has no column 'words'", "'text', 'mood'")
    refused(lambda: load_task("org/moods:small", label="mood", separator=";"), "--separator does not fit")
    refused(lambda: load_task(f"{folder}/a.csv", label="label", split="x"), "--split does not fit")


@pytest.mark.parametrize(
    ("names", "given", "shown"),
    [
        (("train.csv", "test.csv"), "", ["--data '{}/train.csv'", "--test '{}/test.csv'"]),
        (("Train-0.csv", "Train-1.csv", "dev.csv"), "*.csv", ["--data '{}/Train-0.csv'", "--validation '{}/dev.csv'"]),
        (("train/x.csv", "test/x.csv"), "**/*.csv", ["--data '{}/train/x.csv'", "--test '{}/test/x.csv'"]),
        (("my_val.csv", "my_test_2.csv"), "*", ["--validation '{}/my_val.csv'", "--test '{}/my_test_2.csv'"]),
    ],
)
def test_files_of_several_splits_are_not_one(names, given, shown, tmp_path, refused):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text,label\n" + "".join(f"{name} {k},{k % 2}\n" for k in range(4)))
    refused(lambda: load_task(tmp_path / given, label="label"), *(words.format(tmp_path) for words in shown))
    all_of_them = ",".join(str(tmp_path / name) for name in names)
    assert len(texts(load_task(all_of_them, label="label"))) == 4 * len(names)


def test_files_whose_names_only_resemble_those_of_splits_are_read_together(tmp_path):
    for name in ("latest.csv", "trained.csv", "evaluation.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\n" + "".join(f"{name} {k},{k % 2}\n" for k in range(4)))
    assert len(texts(load_task(tmp_path, label="label"))) == 16


def test_a_dataset_of_save_to_disk(tmp_path, refused):
    features = Features({"text": Value("string"), "mood": ClassLabel(names=["low", "high"])})
    rows = {"text": [f"text {k}" for k in range(12)], "mood": [k % 2 for k in range(12)]}
    data = Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    hidden = data.select(range(2)).map(lambda row: {"mood": -1})
    DatasetDict(train=data.select(range(8)), dev=data.select(range(8, 12)), test=hidden).save_to_disk(
        tmp_path / "parts"
    )
    task = load_task(tmp_path / "one", label="mood")
    assert (texts(task), task.label_names) == (sorted(rows["text"]), ("high", "low"))
    task = load_task(tmp_path / "parts", label="mood")
    assert (list(task.train["text"]), list(task.validation["text"])) == (rows["text"][:8], rows["text"][8:])
    assert task.test is None
    assert task.notes == (f"the test split of '{tmp_path / 'parts'}' has no labels: left out",)
    task = load_task(tmp_path / "parts", label="mood", split="dev")
    assert texts(task) == sorted(rows["text"][8:]), "each row on one side"
    assert list(load_task(tmp_path / "parts", label="mood", split="train[4:]").train["text"]) == rows["text"][4:8]
    refused(lambda: load_task(tmp_path / "parts", label="mood", split="none"), "no split 'none'", "'train', 'dev'")
    refused(lambda: load_task(tmp_path / "parts", label="mood", split="train[9:]"), "has no rows in 'train[9:]'")
    refused(lambda: load_task(tmp_path / "one", label="mood", test=tmp_path / "parts"), "give it alone, as --data")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"no Arrow")
    refused(lambda: load_task(tmp_path / "one", label="mood"), "is a damaged dataset")
