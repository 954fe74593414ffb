"""A folder with a few rows of every task that the studies name, and runs on it."""

import gzip
import json

import pytest
from tasks.prompted_rows import ROWS as PROMPTED_ROWS
from training_data import BAD, GOOD, WORDS

from loretta.record import RunRecord
from loretta.studies.configs import Options
from loretta.studies.state import find_runs
from loretta.studies.study import Planned
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


QUICK = {"epochs": 1, "max_length": 16}


def options_for(model, data_dir, **more) -> Options:
    sets = {**QUICK, **more.pop("sets", {})}
    return Options(models=(model,), data_dir=data_dir, cpu=True, sets=sets, **more)


def states(root) -> dict[str, str]:
    return {str(folder.relative_to(root)): state for folder, state, _ in find_runs(root)}


def record(config, *, validation, test=None, metric="accuracy", higher_is_better=True, parameters=10, **more):
    """A finished run as `loretta train` would write it."""
    counts = {"cores": parameters, "biases": 0, "norms": 0, "head": 0, "other": 0, "total": 100}
    raw = {
        "config": config, "command": "loretta", "versions": {}, "model": "m", "task": "t", "method": "lora",
        "kind": "classification", "seed": 0, "device": "cpu", "sizes": {}, "metric": metric,
        "higher_is_better": higher_is_better, "parameters": counts, "adapter_bytes": 40,
        "train_seconds": 1.0, "peak_memory_bytes": 0, "history": [], "best_step": 1, "validation": validation,
        "test": test, "label_names": ["a", "b"], **more,
    }  # fmt: skip
    return RunRecord.model_validate(raw)


def finish(root, run: Planned, **known):
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(record(run.config, **known).model_dump_json())
    (folder / "config.json").write_text(json.dumps(run.config))
