import gzip
import json
import os
from pathlib import Path

import pytest

from loretta.tasks import glue, metrics

DATA_DIR = os.environ.get("LORETTA_DATA_DIR")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def rows_of(name, n):
    """n rows with the Hub's fields: texts that name their column, labels in turn."""
    task = glue.GLUE[name]
    labels = [row % len(task.label_names) if task.label_names else row / 2 for row in range(n)]
    return [{**{c: f"{c} {row}" for c in task.columns}, "label": labels[row], "idx": row} for row in range(n)]


@pytest.fixture
def folder(tmp_path):
    for name in glue.GLUE:
        write_rows(tmp_path / name / "train.jsonl.gz", rows_of(name, 6))
        split = "validation_matched" if name == "mnli" else "validation"
        write_rows(tmp_path / name / f"{split}.jsonl.gz", rows_of(name, 4))
    return tmp_path


def test_the_eight_tasks_of_the_paper():
    assert set(glue.GLUE) == {"mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"}
    assert [glue.GLUE[name].metrics[0] for name in ("mnli", "sst2", "qnli", "rte")] == ["accuracy"] * 4
    assert [glue.GLUE[name].metrics[0] for name in ("cola", "mrpc", "qqp", "stsb")] == ["mcc", "f1", "f1", "spearman"]
    assert all(metrics.higher_is_better(name) for task in glue.GLUE.values() for name in task.metrics)


@pytest.mark.parametrize("name", glue.GLUE)
def test_rows_of_a_folder_become_the_official_task(folder, name):
    official, task = glue.GLUE[name], glue.load(name, data_dir=folder)
    assert (task.name, task.metrics, task.label_names, task.test) == (
        name,
        official.metrics,
        official.label_names,
        None,
    )
    assert task.kind == ("regression" if name == "stsb" else "classification")
    assert task.columns == ("text", "text_pair")[: len(official.columns)]
    assert task.train.column_names == [*task.columns, "label"]
    assert task.train[5]["text"] == f"{official.columns[0]} 5"
    assert task.validation[3].get("text_pair", "no pair") == (
        f"{official.columns[1]} 3" if len(official.columns) == 2 else "no pair"
    )
    assert task.train["label"][:] == [row["label"] for row in rows_of(name, 6)]
    assert task.notes == (
        f"train has 6 of the official {official.train_rows} rows",
        f"validation has 4 of the official {official.validation_rows} rows",
    )


def test_scores_are_floats_even_if_written_as_whole_numbers(tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "stsb" / f"{split}.jsonl.gz", [{**row, "label": 3} for row in rows_of("stsb", 2)])
    task = glue.load("stsb", data_dir=tmp_path)
    assert [type(score) for score in (*task.train["label"], *task.validation["label"])] == [float] * 4


def test_official_sizes_need_no_note(tmp_path):
    write_rows(tmp_path / "rte" / "train.jsonl.gz", rows_of("rte", 2490))
    write_rows(tmp_path / "rte" / "validation.jsonl.gz", rows_of("rte", 277))
    assert glue.load("rte", data_dir=tmp_path).notes == ()


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_rows_from_the_hub_are_those_of_a_folder(hub, folder, name):
    asked = hub(rows_of(name, 6), rows_of(name, 4))
    task, from_folder = glue.load(name), glue.load(name, data_dir=folder)
    split = "validation_matched" if name == "mnli" else "validation"
    assert asked == [("nyu-mll/glue", name, ["train", split])]
    assert task.train.to_dict() == from_folder.train.to_dict()
    assert task.validation.to_dict() == from_folder.validation.to_dict()


def test_a_hub_that_cannot_be_reached_is_one_sentence(why_no_hub, refused):
    refused(lambda: glue.load("rte"), "'rte'", why_no_hub, "network", "--data-dir", "rte/train.jsonl.gz")


def test_an_unknown_task_is_refused_with_the_nearest_name(refused):
    refused(lambda: glue.load("SST-2"), "'SST-2'", "did you mean 'sst2'?", "'mnli'")


def test_a_missing_folder_or_file_is_named(folder, refused):
    elsewhere = folder / "elsewhere"
    refused(lambda: glue.load("rte", data_dir=elsewhere), f"'{elsewhere}/rte/train.jsonl.gz'", "give a --data-dir with")
    path = folder / "mnli" / "validation_matched.jsonl.gz"
    path.unlink()
    refused(lambda: glue.load("mnli", data_dir=folder), f"no file '{path}'", "mnli/validation_matched.jsonl.gz in it")


@pytest.mark.parametrize(
    ("name", "change", "pieces"),
    [
        ("rte", {"label": 2}, ["2 as 'label'", "row 2", "a class id from 0 to 1"]),
        ("rte", {"label": -1}, ["-1 as 'label'", "row 2"]),
        ("rte", {"label": "entailment"}, ["'entailment' as 'label'"]),
        ("rte", {"label": None}, ["None as 'label'"]),
        ("stsb", {"label": 5.5}, ["5.5 as 'label'", "a score from 0 to 5"]),
        ("stsb", {"sentence2": None}, ["None as 'sentence2'", "row 2", "a text"]),
    ],
)
def test_a_cell_that_is_no_label_or_text_is_named_with_its_row(folder, refused, name, change, pieces):
    path = folder / name / "train.jsonl.gz"
    rows = rows_of(name, 3)
    rows[1].update(change)
    write_rows(path, rows)
    refused(lambda: glue.load(name, data_dir=folder), f"'{path}'", *pieces)


def test_a_missing_field_is_named(folder, refused):
    path = folder / "cola" / "train.jsonl.gz"
    write_rows(path, [{"text": "a", "label": 0}])
    refused(lambda: glue.load("cola", data_dir=folder), f"'{path}'", "no column 'sentence'", "'text', 'label'")


@pytest.mark.skipif(DATA_DIR is None, reason="LORETTA_DATA_DIR, a folder with GLUE's files, is not set")
@pytest.mark.parametrize("name", glue.GLUE)
def test_real_files_have_the_official_rows_and_labels(name):
    task = glue.load(name, data_dir=Path(DATA_DIR))
    assert len(task.validation) == glue.GLUE[name].validation_rows
    if task.kind == "classification":
        assert set(task.train["label"]) == set(range(len(task.label_names)))
