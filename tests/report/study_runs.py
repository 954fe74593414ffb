"""Folders of runs of a study, written without a training, and the tables of its page."""

import json
from pathlib import Path
from typing import Any

from report.pages import Page

from loretta.record import RunRecord
from loretta.studies.configs import Options
from loretta.studies.runner import write_study
from loretta.studies.study import Planned, parse_study

SIZES = {"big": 1000, "small": 100}


SST2 = (0.70, 0.74, 0.78)


# mean 0.74, standard deviation 0.04, t(0.975, 2 degrees) = 4.302653
HALF = 4.302653 * 0.04 / 3**0.5


def run_record(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    cores = changes.pop("cores", 90)
    plain: dict[str, Any] = {
        "config": config, "command": "loretta train", "versions": {"torch": "2.13.0"}, "model": "m", "task": "sst2",
        "method": "lora", "kind": "classification", "seed": 0, "device": "cpu", "sizes": {"train": 10},
        "metric": "accuracy", "higher_is_better": True, "adapter_bytes": 4 * cores, "train_seconds": 2.0,
        "peak_memory_bytes": 0,
        "parameters": {"cores": cores - 10, "biases": 0, "norms": 0, "head": 10, "other": 0, "total": 10**6},
        "history": [
            {"step": step, "epoch": 1.0, "split": "validation", "values": {"loss": 1 / step}} for step in (1, 2, 4)
        ],
        "best_step": 1, "validation": {"accuracy": 0.5, "loss": 0.1}, "test": None, "label_names": ["a", "b"],
    }  # fmt: skip
    return RunRecord.model_validate(plain | changes).model_dump(mode="json")


class Folder:
    """A folder of runs in which a study is written, run by run."""

    def __init__(self, root: Path, **study: Any) -> None:
        self.root, self.runs = root, []
        tasks = study.get("tasks", ("sst2", "mrpc"))
        printed = {"sst2": 75.5, "mrpc": 88, "average": 81.75}
        big = {
            "name": "big",
            "label": "Big",
            "method": "lora",
            "model": "tiny",
            "parameters": "0.10M",
            "note": "a remark",
        }
        plain = {
            "name": "mine",
            "title": "Mine",
            "source": "Table 0",
            "models": {"tiny": {"hub": "some/tiny"}},
            "tasks": tasks,
            "rows": [
                {**big, "printed": {name: value for name, value in printed.items() if name in (*tasks, "average")}},
                {"name": "small", "label": "Small", "method": "loretta_adp"},
            ],
        }
        self.study = parse_study(plain | study)

    def add(self, row: str, task: str, seed: int, content: dict[str, Any] | None, **planned: Any) -> None:
        """A run with the file that its kind leaves behind; None: one that failed."""
        kind = self.study.kind
        file = {"train": "run.json", "cost": "cost.json", "count": "count.json"}[kind]
        config = {"method_args": planned.pop("args", {})}
        (known,) = [given for given in self.study.rows if given.name == row]
        run = Planned(
            folder=f"tiny/{task}/{row}/s{seed}", kind=kind, model="tiny", sizes="tiny", task=task, row=row,
            label=known.label, method=known.method, seed=seed, config=config, learning_rate=1e-3, **planned,
        )  # fmt: skip
        folder = self.root / run.folder
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        if content is None:
            (folder / "error.json").write_text('{"error": "OutOfMemoryError: no room"}')
        else:
            (folder / file).write_text(json.dumps(content))
        self.runs.append(run)

    def score(self, row: str, task: str, values: tuple[float | None, ...], **changes: Any) -> None:
        planned = {key: changes.pop(key) for key in ("args",) if key in changes}
        for seed, value in enumerate(values):
            record = run_record({}, cores=SIZES.get(row, 90), seed=seed, task=task, **changes)
            record["validation"]["accuracy"] = value
            self.add(row, task, seed, record if value is not None else None, **planned)

    def write(self, **options: Any) -> Path:
        write_study(self.root, self.study, Options(**options), self.runs, "loretta reproduce mine --seeds 3")
        return self.root


def tables_in(page: Page) -> dict[str, dict[str, str]]:
    """Row heading (joined) -> column -> text, of all tables; a later one with the same headings wins."""
    found: dict[str, dict[str, str]] = {}
    names: list[str] = []
    for row in page.rows:
        texts = [text for text, _ in row]
        if texts[0] in ("Method",):
            names = texts
        elif names and texts[0]:
            stubs = len(names) - len([name for name in names if name not in ("Method", "State", "Classifier")])
            found[" / ".join(texts[:stubs])] = dict(zip(names[stubs:], texts[stubs:], strict=True))
    return found
