"""A folder with a few rows of every task that the studies name."""

import gzip
import json

import pytest
from tasks.prompted_rows import ROWS as PROMPTED_ROWS
from training_data import BAD, GOOD, WORDS

from loretta.tasks.prompted import PROMPTED

PAIRS = {
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
ROWS = {"train": 24, "validation": 8}


def glue_row(task: str, k: int) -> dict:
    words = (GOOD, BAD)[k % 2]
    text = f"{words[k % 4]} {WORDS[8 + k % 10]} {WORDS[8 + k // 10 % 10]} {words[(k + 1) % 4]}"
    columns = PAIRS.get(task, ("sentence",))
    label = float(k % 6) if task == "stsb" else (k % 3 if task == "mnli" else k % 2)
    return {**dict.fromkeys(columns, text), "label": label}


def prompted_row(task: str, k: int) -> dict:
    field = PROMPTED[task].texts[0]
    return {**PROMPTED_ROWS[task], field: f"{PROMPTED_ROWS[task][field]} {k}", "idx": k}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A --data-dir with 24 training and 8 validation rows a task."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in dict.fromkeys([*PAIRS, "sst2", "cola", *PROMPTED]):
        make = prompted_row if task not in (*PAIRS, "sst2", "cola") else glue_row
        (folder / task).mkdir()
        for split, rows in ROWS.items():
            name = "validation_matched" if (task, split) == ("mnli", "validation") else split
            shift = 0 if split == "train" else 100
            lines = "\n".join(json.dumps(make(task, shift + k)) for k in range(rows))
            (folder / task / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return str(folder)
