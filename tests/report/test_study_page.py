"""The report on studies says what their runs say, in every format, and beside it what the paper prints."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_runs import Page

from loretta.cli import main as cli
from loretta.errors import InputError
from loretta.record import RunRecord
from loretta.report.folder import FORMATS, report_on
from loretta.report.study import section_of
from loretta.report.study_figures import count_of, pareto, smooth
from loretta.studies.configs import Options
from loretta.studies.results import collect
from loretta.studies.runner import write_study
from loretta.studies.study import Planned, parse_study

SIZES = {"big": 1000, "small": 100}
SST2 = (0.70, 0.74, 0.78)
# mean 0.74, standard deviation 0.04, t(0.975, 2 degrees) = 4.302653
HALF = 4.302653 * 0.04 / 3**0.5
NASTY = """<script>alert(1)</script> & "' | \\ $x_1^2$ % # ~ {{ 1 }} `code` [l](u)"""


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Folder(tmp_path)
    made.score("big", "sst2", SST2)
    made.score("big", "mrpc", (0.8, 0.9, None))
    made.score("small", "sst2", (0.6, 0.6, 0.6))
    made.score("small", "mrpc", (0.5, 0.6, 0.7))
    return made.write()


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


def test_the_page_has_the_numbers_by_hand(folder: Path):
    page = Page(report_on(folder, "html"))
    big = next(row for row in page.rows if row[0][0] == "Big")
    assert [text for text, _ in big][1:] == [
        "1,000", "0.10M", "74.00 ± 9.94paper 75.50", "85.00 ± 63.53paper 88.002 of 3 seeds",
        # seeds 0 and 1: 75 and 82
        "78.50 ± 44.47paper 81.752 of 3 seeds", "3.9 KiB", "2.0",
    ]  # fmt: skip
    exact = big[3][1]
    assert exact is not None
    assert exact.startswith("accuracy: mean 0.74, 95% interval 0.640634 to 0.839366; 0.7 (seed 0)")


def test_markdown_has_them_too(folder: Path):
    text = report_on(folder, "md")
    row = next(line for line in text.splitlines() if line.startswith("| Big"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == [r"74.00 ± 9.94 \[paper 75.50\]", r"85.00 ± 63.53 (2 of 3 seeds) \[paper 88.00\]"]
    assert "loretta reproduce mine --seeds 3" in text
    assert f"loretta train --config {folder}/tiny/sst2/big/s2/config.json" in text


def test_latex_has_them_too(folder: Path):
    text = report_on(folder, "latex")
    (row,) = [line for line in text.splitlines() if line.startswith("Big")]
    assert r"& 74.00 $\pm$ 9.94 [paper 75.50] & 85.00 $\pm$ 63.53 (2 of 3 seeds) [paper 88.00] &" in row
    assert row.endswith(r"\\")
    columns = text.split(r"\begin{tabular}{")[1].partition("}")[0]
    assert row.count("&") == len(columns) - 1
    assert text.count(r"\begin{") == text.count(r"\end{")


def test_csv_and_json_have_them_in_full(folder: Path):
    lines = list(csv.DictReader(io.StringIO(report_on(folder, "csv"))))
    content = json.loads(report_on(folder, "json"))
    (study,) = content["studies"]
    assert (study["name"], study["commands"]) == ("mine", ["loretta reproduce mine --seeds 3"])
    for cells in (lines, study["cells"]):
        big = next(cell for cell in cells if (cell["row"], cell["task"]) == ("big", "sst2"))
        numbers = [float(big[name]) for name in ("mean", "low", "high", "printed", "finished", "asked", "parameters")]
        assert numbers == pytest.approx([0.74, 0.74 - HALF, 0.74 + HALF, 75.5, 3, 3, 1000], abs=1e-6)
        few = next(cell for cell in cells if (cell["row"], cell["task"]) == ("big", "mrpc"))
        assert (int(few["finished"]), int(few["asked"])) == (2, 3)
    first = lines[0]
    assert [float(value) for value in first["values"].split()] == list(SST2)
    assert first["commands"].count("loretta train --config") == 3
    assert next(line for line in lines if line["missing"])["missing"] == "seed 2 failed: OutOfMemoryError: no room"


def test_what_is_missing_is_listed_with_its_reason(folder: Path):
    page = Page(report_on(folder, "html"))
    assert ["Big", "tiny", "mrpc", "2", "failed", "OutOfMemoryError: no room", "tiny/mrpc/big/s2"] in [
        [text for text, _ in row] for row in page.rows
    ]
    assert "1 of 4 numbers are of fewer seeds than were asked for." in page.texts["li"]
    assert "11 of 12 finished, 1 failed" in page.texts["dd"]
    assert "OutOfMemoryError: no room" in report_on(folder, "md")


def test_what_misses_alike_is_one_row(tmp_path: Path):
    made = Folder(tmp_path)
    for task in ("sst2", "mrpc"):
        made.score("big", task, (0.9, None))
        made.score("small", task, (None,))
        shutil.rmtree(tmp_path / f"tiny/{task}/small/s0")
    rows = [[text for text, _ in row] for row in Page(report_on(made.write(), "html")).rows]
    assert rows[-2:] == [
        ["Big", "tiny", "sst2, mrpc", "1", "failed", "OutOfMemoryError: no room", "tiny/sst2/big/s1, tiny/mrpc/big/s1"],
        ["Small", "tiny", "sst2, mrpc", "0", "waiting", "not started", "–"],
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_record_is_missing_and_the_rest_is_shown(form: str, folder: Path):
    (folder / "tiny/sst2/small/s0/run.json").write_text("{}")
    text = report_on(folder, form)
    assert "is not a run.json" in text or form == "latex"
    assert "78.50" in text or form in ("csv", "json")


def test_a_study_without_a_finished_run_is_a_page_of_dashes(tmp_path: Path):
    made = Folder(tmp_path)
    made.score("big", "sst2", (None, None))
    page = Page(report_on(made.write(), "html"))
    assert [text for text, _ in next(row for row in page.rows if row[0][0] == "Big")][-3] == "–paper 75.500 of 2 seeds"
    assert page.figures == []


def test_every_number_leads_to_its_commands(folder: Path):
    html = report_on(folder, "html")
    page = Page(html)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = [str(a["href"]) for tag, a in page.tags if tag == "a"]
    assert len(targets) == 4  # an average has no runs of its own
    used = targets + [str(a[key]) for _, a in page.tags for key in ("clip-path", "aria-describedby") if a.get(key)]
    assert {value.removeprefix("url(").strip("#)") for value in used} <= set(ids)
    assert len(page.texts["pre.command"]) == 1 + 11
    assert (
        f"loretta train --config {folder}/tiny/sst2/big/s0/config.json --output {folder}/tiny/sst2/big/s0-again"
        in (page.texts["pre.command"])
    )


def test_the_page_needs_nothing_from_outside_and_speaks(folder: Path):
    page = Page(report_on(folder, "html"))
    assert page.open == []
    assert not {"link", "script", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.endswith(("src", "href")) or str(value).startswith("#")
            assert "http" not in str(value)
    assert "http" not in page.texts["style"][0]
    assert all(a.get("scope") for tag, a in page.tags if tag == "th")
    images = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(images) == len(page.figures) == 5
    assert all(a["aria-label"] and a["aria-describedby"] for a in images)


def test_the_figure_of_the_average_and_its_front(folder: Path):
    page = Page(report_on(folder, "html"))
    words = page.texts["desc"][0]
    # means of the tasks: (0.6 + 0.5, 0.6, 0.7) / 2 and, for two seeds, 0.75 and 0.82
    assert "Small: 60 at 100" in words
    assert "Big: 78.5 at 1,000" in words
    assert "Big, paper: 81.75 at 100,000" in words
    assert "Pareto front: 60 at 100, 78.5 at 1,000" in words


def test_a_printed_point_alone_is_in_the_legend(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2"])
    made.score("big", "sst2", (None,))
    made.score("small", "sst2", (0.6,))
    page = Page(report_on(made.write(), "html"))
    assert "Big, paper" in page.figures[0]


def test_pareto_by_hand():
    points = [(10, 0.5), (20, 0.4), (30, 0.7), (30, 0.8), (40, 0.8), (5, 0.1)]
    assert pareto(points) == [5, 0, 3]
    assert pareto(points, higher=False) == [5]
    assert pareto([(1, 3.0), (2, 2.0), (3, 2.0)], higher=False) == [0, 1]
    assert pareto([]) == []


@pytest.mark.parametrize(
    ("printed", "count"),
    [("0.10M", 1e5), ("6738.42M", 6.73842e9), ("12K", 12e3), (None, None), ("?", None), ("", None)],
)
def test_printed_counts_are_read(printed: str | None, count: float | None):
    assert count_of(printed) == (None if count is None else pytest.approx(count))


def test_smoothing_by_hand():
    curve, window = smooth([[(1, 1.0), (2, 3.0)], [(1, 2.0)]])
    assert window == 1
    assert curve == [(1, 1.5, pytest.approx(0.5**0.5)), (2, 3.0, 0.0)]
    # 400 evaluations: windows of 20, from 10 before to 9 after
    curve, window = smooth([[(step, float(step)) for step in range(400)]])
    assert window == 20
    assert curve[200][:2] == (200, 199.5)
    assert curve[0][:2] == (0, 4.5)
    assert curve[200][2] == pytest.approx(35**0.5)  # of 20 neighbouring integers: 20 * 21 / 12
    assert smooth([]) == ([], 1)


def test_what_is_forgotten_is_counted_seed_by_seed(tmp_path: Path):
    made = Folder(tmp_path, view="sequence", sequence=True)
    scores = [  # of each seed after sst2, then after sst2 and mrpc
        ({"sst2": 0.9, "mrpc": 0.5}, {"sst2": 0.6, "mrpc": 0.8}),
        ({"sst2": 0.8, "mrpc": 0.5}, {"sst2": 0.6, "mrpc": 0.8}),
    ]
    order = ("sst2", "mrpc")
    for seed, stages in enumerate(scores):
        for task, values in zip(("sst2", "sst2-mrpc"), stages, strict=True):
            made.add("big", task, seed, run_record({}), order=order, evaluate=order)
            evaluated = {name: {"accuracy": value} for name, value in values.items()}
            (tmp_path / f"tiny/{task}/big/s{seed}/evaluations.json").write_text(json.dumps(evaluated))
    page = Page(report_on(made.write(), "html"))
    rows = {tuple(text for text, _ in row[:2]): [text for text, _ in row[2:]] for row in page.rows}
    # differences 0.3 and 0.2: mean 0.25, half width 12.706205 * 0.05
    assert rows["Big", "forgotten"] == ["25.00 ± 63.53", "–"]
    assert rows["Big", "after sst2"] == ["85.00 ± 63.53", "50.00 ± 0.00"]
    assert rows["Big", "after sst2 → mrpc"] == ["60.00 ± 0.00", "80.00 ± 0.00"]
    assert rows["Big", "sst2 → mrpc"][-5:-2] == [
        "60.00 ± 0.00paper 75.50", "80.00 ± 0.00paper 88.00", "70.00 ± 0.00paper 81.75",
    ]  # fmt: skip
    assert any("Big: 85 at sst2, 60 at mrpc" in words for words in page.texts["desc"])
    shades = [a["style"] for tag, a in page.tags if tag == "td" and a.get("style")]
    assert shades[0] == "background: rgba(var(--heat), 0.34)"


def test_a_sequence_may_be_cut_to_some_of_its_tasks(tmp_path: Path):
    made = Folder(tmp_path, view="sequence", sequence=True)
    order = ("mrpc",)
    made.add("big", "mrpc", 0, run_record({}), order=order, evaluate=order)
    (tmp_path / "tiny/mrpc/big/s0/evaluations.json").write_text('{"mrpc": {"accuracy": 0.7}}')
    page = Page(report_on(made.write(), "html"))
    rows = {tuple(text for text, _ in row[:2]): [text for text, _ in row[2:]] for row in page.rows}
    assert rows["Big", "after mrpc"] == ["70.00"]
    assert rows["Big", "forgotten"] == ["–"]


def test_the_notes_of_an_adapter_are_of_the_task_that_it_was_trained_on(tmp_path: Path):
    made = Folder(tmp_path, view="sequence", sequence=True)
    order = ("sst2", "mrpc")
    for task, note in (("sst2", "of sst2"), ("sst2-mrpc", "of mrpc")):
        made.add("small", task, 0, run_record({}, notes=[note]), order=order, evaluate=order)
        evaluated = {name: {"accuracy": 0.5} for name in order}
        (tmp_path / f"tiny/{task}/small/s0/evaluations.json").write_text(json.dumps(evaluated))
    assert Page(report_on(made.write(), "html")).texts["li"] == ["sst2: of sst2", "mrpc: of mrpc"]


def test_scores_that_no_method_changes_are_said(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2", "mrpc"])
    for method in ("small", "big"):
        made.score(method, "sst2", (0.5, 0.5))
        made.score(method, "mrpc", (0.5, 0.5 if method == "small" else 0.6))
    notes = Page(report_on(made.write(), "html")).texts["li"]
    assert [note for note in notes if "score the same" in note] == [
        "sst2: all methods score the same with tiny, as where each gives every row one answer."
    ]


def test_bars_end_where_scores_do(tmp_path: Path):
    made = Folder(tmp_path, view="ranks", tasks=["sst2"])
    made.score("small", "sst2", (0.8, 0.9), args={"tensor_rank": 2})
    made.score("big", "sst2", (0.500, 0.501), args={"tensor_rank": 2})
    (group, _) = section_of(collect(made.write()), tmp_path).groups
    (chart,) = group.charts
    small, big = chart.lines[:2]
    # half widths 12.706205 * 0.05 and 12.706205 * 0.0005
    assert (small.low, small.high) == (pytest.approx([85 - 63.531], abs=1e-3), [100.0])
    assert (big.low, big.high) == (pytest.approx([50.05 - 0.635], abs=1e-3), pytest.approx([50.05 + 0.635], abs=1e-3))
    assert chart.note.startswith("Bars: 95% interval over seeds, cut off where no score can be.")


def test_ranks_are_those_of_the_runs(tmp_path: Path):
    rows = [
        {"name": "r2", "label": "Adp, rank 2", "method": "loretta_adp", "model": "tiny", "printed": {"sst2": 91}},
        {"name": "r5", "label": "Adp, rank 5", "method": "loretta_adp", "model": "tiny"},
        {"name": "ia3", "label": "IA3", "method": "ia3"},
    ]
    made = Folder(tmp_path, view="ranks", tasks=["sst2"], rows=rows)
    made.score("r2", "sst2", (0.9,), args={"tensor_rank": 2})
    made.score("r5", "sst2", (0.8,))  # the default
    made.score("ia3", "sst2", (0.7,))
    words = Page(report_on(made.write(), "html")).texts["desc"][0]
    assert words == "Adp: 90 at 2, 80 at 5; Adp, paper: 91 at 2"


def test_norms_and_classifier_are_two_factors(tmp_path: Path):
    options = [{}, {"train_norms": False}, {"train_head": "dense"}]
    rows = [
        {"name": f"row{k}", "label": f"Adp, {k}", "method": "loretta_adp", "options": given}
        for k, given in enumerate(options)
    ]
    made = Folder(tmp_path, view="norms", tasks=["sst2"], rows=rows)
    for k in range(3):
        made.score(f"row{k}", "sst2", (0.1 * (k + 1),))
    tables = tables_in(Page(report_on(made.write(), "html")))
    assert tables["Adp / tensorised"] == {"norms frozen": "20.00", "norms trained": "10.00"}
    assert tables["Adp / dense"] == {"norms frozen": "", "norms trained": "30.00"}


def test_shapes_are_shown_with_the_trains_of_their_runs(tmp_path: Path):
    train = {"at": "adapter.down", "count": 2, "in_features": 6, "out_features": 2, "modes": [3, 2, 2],
             "ranks": [1, 2, 2, 1], "n_in": 2, "split": 1}  # fmt: skip
    made = Folder(tmp_path, view="shapes", tasks=["sst2"])
    made.score("small", "sst2", (0.9,), trains=[train])
    made.score("big", "sst2", (0.8,))
    page = Page(report_on(made.write(), "html"))
    # entries: 1*3*2 + 2*2*2 + 2*2*1
    assert ["Small", "2 × adapter.down", "6 × 2", "3 × 2 × 2", "1, 2, 2, 1", "18"] in [
        [text for text, _ in row] for row in page.rows
    ]
    assert page.texts["desc"][0] == "measured: 90 at Small, 80 at Big; paper: 75.5 at Big"


def test_costs_are_compared_with_the_first_row(tmp_path: Path):
    rows = [
        {"name": "a", "label": "A", "method": "lora", "printed": {"flops": 6e15, "memcpy_us": 1000}},
        {"name": "b", "label": "B", "method": "ia3", "printed": {"flops": 3e15, "memcpy_us": 4000}},
    ]
    made = Folder(tmp_path, view="cost", kind="cost", scale=1, tasks=["sst2"], rows=rows)
    timed = {"flops": 10**9, "memcpy_us": 200.0, "parameters": 7, "bytes": 28, "notes": ["n"], "device": "a CPU"}
    made.add("a", "sst2", 0, timed)
    made.add("b", "sst2", 0, {"flops": 2 * 10**9, "memcpy_us": None, "parameters": 8, "bytes": 32, "notes": ["no GPU"]})
    page = Page(report_on(made.write(limit=20), "html"))
    assert "a CPU" in page.texts["dd"]
    assert {"memory copies (µs): 200, 1 seed", "FLOPs: 1e+09, 1 seed"} <= set(page.texts["h4"])
    assert not any("rows of each split" in note for note in page.texts["li"]), "no data is read"
    rows_of = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows}
    assert rows_of["A"][:5] == ["7", "200", "1.000", "1,000", "1.000"]
    found = {row[0][0]: [text for text, _ in row[1:]] for row in page.rows if len(row) == 10}
    assert found["B"] == ["8", "–0 of 1 seed", "–", "4,000", "4.000", "2e+09", "2.000", "3e+15", "0.500"]
    assert ["B", "tiny", "memcpy_us", "0", "finished", "no GPU"] in [[text for text, _ in row[:6]] for row in page.rows]


def test_bytes_are_compared_with_the_smallest(tmp_path: Path):
    made = Folder(tmp_path, view="bytes", kind="count", scale=1, tasks=["sst2"])
    made.add("big", "sst2", 0, {"parameters": 1024, "bytes": 4096, "notes": []})
    made.add("small", "sst2", 0, {"parameters": 256, "bytes": 1024, "notes": []})
    page = Page(report_on(made.write(), "html"))
    tables = tables_in(page)
    assert list(tables["Big"].values()) == ["1,024", "4,096", "4.0 KiB", "4.000"]
    assert list(tables["Small"].values()) == ["256", "1,024", "1.0 KiB", "1.000"]
    assert page.texts["desc"] == ["Big: 4.0 KiB; Small: 1.0 KiB"]


def test_curves_are_of_all_seeds(tmp_path: Path):
    made = Folder(tmp_path, view="curves", tasks=["sst2"])
    made.score("big", "sst2", (0.9, 0.9))
    (group,) = section_of(collect(made.write()), tmp_path).groups
    assert group.opened
    (chart,) = group.charts
    (line,) = chart.lines
    assert (line.x, line.y) == ([1, 2, 4], [1.0, 0.5, 0.25])
    assert line.low == line.high == line.y  # both seeds are equal


def test_what_a_sweep_tried_is_shown_and_not_averaged(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2"])
    for seed, (rate, value) in enumerate(((1e-4, 0.6), (5e-4, 0.9))):
        made.add("big", "sst2", seed, run_record({}, validation={"accuracy": value}), candidate=rate == 1e-4)
        changes = {"seed": 0, "config": {"learning_rate": rate, "batch_size": 16}}
        made.runs[-1] = made.runs[-1].model_copy(update=changes)
    rows = [[text for text, _ in row] for row in Page(report_on(made.write(), "html")).rows]
    assert ["Big", "tiny", "sst2", "0.0001 and 16: accuracy 0.6000; 0.0005 and 16: accuracy 0.9000, chosen"] in rows
    assert "90.00paper 75.50" in next(row for row in rows if row[0] == "Big")


def test_a_comparison_begins_with_its_answer(tmp_path: Path):
    made = Folder(tmp_path, view="compare", scale=1, tasks=["sst2"])
    made.score("big", "sst2", (0.90, 0.91))
    made.score("small", "sst2", (0.90, 0.92))
    page = Page(report_on(made.write(), "html"))
    assert page.texts["p.verdict"][0].startswith("Small has the best mean accuracy (0.9100, 95% interval")
    assert "0.9050 ± 0.0635paper 75.5000" in [text for row in page.rows for text, _ in row]


def test_other_models_and_cut_data_are_said(tmp_path: Path):
    made = Folder(tmp_path, models={"tiny": {"hub": "a/b"}, "large": {"hub": "c/d"}}, rows=[
        {"name": "big", "label": "Big", "method": "lora", "model": "large", "printed": {"sst2": 75.5}},
    ])  # fmt: skip
    made.score("big", "sst2", (0.9,), notes=["one", "two"])
    made.score("big", "mrpc", (0.9,), notes=["one", "two"])
    page = Page(report_on(made.write(limit=20), "html"))
    assert page.texts["li"] == [
        "The paper's numbers are for large, these runs are of tiny.",
        "At most 20 rows of each split were used, so the scores are not those of the whole task.",
        "sst2, mrpc: one; two",
    ]
    assert "% sst2, mrpc: one; two" in report_on(tmp_path, "latex").splitlines()
    assert "paper" not in page.texts["desc"][0], "the paper's point is of another model"


def test_several_studies_are_one_page(folder: Path):
    other = Folder(folder, name="other", title="Another")
    other.runs = [run.model_copy(update={"kind": "train"}) for run in Folder(folder).runs]
    other.write()
    page = Page(report_on(folder, "html"))
    assert page.texts["h1"] == ["other, mine"] or page.texts["h1"] == ["mine, other"]
    assert {"Mine", "Another"} == set(page.texts["h2.study"])
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_nothing_is_interpreted(tmp_path: Path):
    rows = [{"name": "big", "label": NASTY, "method": "lora"}, {"name": "small", "label": "Small", "method": "lora"}]
    made = Folder(tmp_path, title=NASTY, tasks=["sst2"], rows=rows, notes=[NASTY])
    made.score("big", "sst2", (0.9,), notes=[NASTY], device=NASTY)
    made.score("small", "sst2", (0.8, None))
    (tmp_path / "tiny/sst2/small/s1/error.json").write_text(json.dumps({"error": NASTY}))
    root = made.write()
    page = Page(report_on(root, "html"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts["h1"] == [NASTY]
    assert NASTY in page.texts["li"]
    assert NASTY in [text for row in page.rows for text, _ in row]
    (line,) = [line for line in report_on(root, "md").splitlines() if "90.00" in line and line.startswith("|")]
    assert r"\<script\>" in line
    assert line.replace(r"\|", "").count("|") == 5 + 1
    (line,) = [line for line in report_on(root, "latex").splitlines() if "90.00" in line]
    assert r"\& \"' \textbar{} \textbackslash{} \$x\_1\textasciicircum{}2\$ \% \#".replace('\\"', '"') in line
    assert line.replace(r"\&", "").count("&") == 4
    (study,) = json.loads(report_on(root, "json"))["studies"]
    assert study["cells"][0]["label"] == NASTY
    assert next(csv.DictReader(io.StringIO(report_on(root, "csv"))))["label"] == NASTY


def test_json_is_strict_where_a_score_is_not_finite(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2"])
    made.score("big", "sst2", (float("nan"),))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(report_on(made.write(), "json"), parse_constant=refuse)
    assert content["studies"][0]["cells"][0]["mean"] is None
    assert any(text.startswith("NaN") for row in Page(report_on(tmp_path, "html")).rows for text, _ in row)


def test_a_folder_of_runs_without_a_study(tmp_path: Path):
    for name, seed, score in (("a", 1, 0.25), ("b", 2, 0.5)):
        (tmp_path / name).mkdir()
        record = run_record({}, seed=seed, validation={"accuracy": score}, notes=["a remark"])
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "error.json").write_text('{"error": "no room"}')
    page = Page(report_on(tmp_path, "html"))
    table = page.table()
    assert table["lora · seed 1"]["Validation at the best step/accuracy"] == ("0.2500", "0.25")
    assert page.texts["li"] == ["a remark", "c: failed, no room"]
    text = report_on(tmp_path, "md")
    assert "| lora · seed 2 | 0.5000 |" in " ".join(text.split())
    assert "- c: failed, no room" in text
    assert r"lora $\cdot$ seed 2 & 0.5000 &" in report_on(tmp_path, "latex")
    lines = list(csv.DictReader(io.StringIO(report_on(tmp_path, "csv"))))
    assert [(line["label"], float(line["validation.accuracy"])) for line in lines] == [
        ("lora · seed 1", 0.25),
        ("lora · seed 2", 0.5),
    ]
    content = json.loads(report_on(tmp_path, "json"))
    assert [run["validation"]["accuracy"] for run in content["runs"]] == [0.25, 0.5]
    assert Page(report_on(tmp_path / "a", "html")).texts["h1"] == ["sst2 · m · lora"]


def test_what_cannot_be_reported_is_refused(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    for given, form, words in (
        (tmp_path / "none", "html", "there is no folder"),
        (tmp_path / "empty", "md", "neither a study nor a finished run"),
        (folder, "pdf", "unknown format 'pdf': choose one of html, md"),
    ):
        with pytest.raises(InputError, match=words):
            report_on(given, form)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["loretta", "report", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("suffix", ["html", "md", "csv", "json", "tex"])
def test_the_command_writes_by_the_ending(
    suffix: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / f"out.{suffix}"
    assert call(monkeypatch, folder, "-o", file) == 0
    assert file.read_text() == report_on(folder, {"tex": "latex"}.get(suffix, suffix))
    assert capsys.readouterr().out == ""


def test_the_command_replaces_its_own_file_and_no_other_without_being_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "out.md"
    assert call(monkeypatch, folder, "-o", file) == 0
    assert call(monkeypatch, folder, "-o", file) == 0
    file.write_text("mine")
    assert call(monkeypatch, folder, "-o", file) == 2
    refusal = "is not as loretta wrote it: give another file with --output, or replace it with --overwrite"
    assert refusal in capsys.readouterr().err
    assert file.read_text() == "mine"
    for more in (["--overwrite"], []):
        assert call(monkeypatch, folder, "-o", file, *more) == 0
        assert file.read_text() == report_on(folder, "md")

    other = tmp_path / "thesis.md"
    other.write_text("mine")
    for more in ([], ["--overwrite"]):
        assert call(monkeypatch, folder, "-o", other, *more) == 2
        assert "was not written by this command, and is not replaced" in capsys.readouterr().err
        assert other.read_text() == "mine"


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_prints(
    form: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, folder, "--format", form, "-o", "-") == 0
    assert capsys.readouterr().out == report_on(folder, form)


def test_the_command_refuses_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for arguments in ((folder, "--format", "pdf"), (folder, "-o", folder / "no" / "page.html"), (folder / "no",)):
        assert call(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no `chromium` on PATH")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_lays_the_page_out_without_scrolling_sideways(folder: Path, tmp_path: Path, width: int):
    html = report_on(folder, "html")
    assert "content=\"default-src 'none'" in html
    # the page allows no script, the copy that is measured does; all that is folded is open
    measured = html.replace("default-src 'none'", "default-src 'unsafe-inline'").replace("<details>", "<details open>")
    script = (
        "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(), '*')</script></body>"
    )
    (tmp_path / "inner.html").write_text(measured.replace("</body>", script))
    # in a frame, since windows are not made as narrow as a telephone
    frame = f'<iframe src="inner.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    heard = "<script>onmessage = event => document.title = event.data</script>"
    (tmp_path / "page.html").write_text(f"<title></title>{heard}{frame}")
    dom = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--hide-scrollbars",
            "--dump-dom", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert f"<title>{width},{width}</title>" in dom


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no `chromium` on PATH")
@pytest.mark.parametrize(("look", "page", "line"), [(1, (255, 255, 255), "0072b2"), (0, (21, 24, 28), "4da3e0")])
def test_a_browser_paints_it_light_and_dark(folder: Path, tmp_path: Path, look: int, page: tuple[int, ...], line: str):
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(report_on(folder, "html"))
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            f"--blink-settings=preferredColorScheme={look}", f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,1600", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels_YXC = (imread(tmp_path / "shot.png")[..., :3] * 255).round()
    assert tuple(pixels_YXC[2, 2]) == page
    rgb = [int(line[i : i + 2], 16) for i in (0, 2, 4)]
    assert (pixels_YXC == rgb).all(axis=-1).sum() > 20
