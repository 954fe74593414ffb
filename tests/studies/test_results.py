"""The numbers of a study against hand computation, and what is said of what is missing."""

import json
import math

import pytest
from study_data import finish

from loretta.errors import InputError
from loretta.studies.compare import comparison, verdict
from loretta.studies.configs import Options
from loretta.studies.expansion import expand
from loretta.studies.results import collect, collect_all, interval
from loretta.studies.runner import write_study
from loretta.studies.show import results_table
from loretta.studies.study import load_study
from loretta.wording import as_text


def test_interval_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2 degrees) = 4.302653: half width 4.302653 / sqrt(3)
    assert interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    # t(0.975, 1 degree) = 12.706205
    assert interval([0.0, 1.0]) == pytest.approx((0.5, 0.5 - 6.353102, 0.5 + 6.353102), abs=1e-6)
    assert interval([0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert interval([0.25]) == (0.25, None, None)
    assert interval([]) == (None, None, None)
    mean, *ends = interval([math.nan, 0.5, 0.25])
    assert math.isnan(mean)
    assert ends == [None, None]


def planned(name, root, **options):
    study, options = load_study(name), Options(**options)
    runs = expand(study, options, root).runs
    write_study(root, study, options, runs, f"loretta reproduce {name}")
    return runs


def test_cells_and_what_is_missing(tmp_path):
    runs = planned(
        "table1", tmp_path, models=("deberta-base",), tasks=("rte", "mrpc"), methods=("loretta_adp",), seeds=3
    )
    by_folder = {run.folder: run for run in runs}
    for seed, score in enumerate((0.70, 0.74, 0.78)):
        finish(tmp_path, by_folder[f"deberta-base/rte/loretta_adp/s{seed}"], validation={"accuracy": score, "loss": 1})
    for seed, score in enumerate((0.8, 0.9)):
        run = by_folder[f"deberta-base/mrpc/loretta_adp/s{seed}"]
        finish(tmp_path, run, validation={"f1": score, "accuracy": 0}, metric="f1")
    failed = tmp_path / "deberta-base/mrpc/loretta_adp/s2"
    failed.mkdir(parents=True)
    (failed / "error.json").write_text('{"error": "OutOfMemoryError: no room"}')
    results = collect(tmp_path)
    rte, mrpc = results.cells
    assert (rte.mean, rte.seeds, rte.printed) == (pytest.approx(0.74), "3 seeds", 75.50)
    # standard deviation 0.04
    assert rte.high == pytest.approx(0.74 + 4.302653 * 0.04 / 3**0.5, abs=1e-6)
    assert (mrpc.metric, mrpc.mean, mrpc.seeds, mrpc.printed) == ("f1", pytest.approx(0.85), "2 of 3 seeds", 93.53)
    assert [(missing.seed, missing.state, missing.reason) for missing in mrpc.missing] == [
        (2, "failed", "OutOfMemoryError: no room")
    ]
    assert (rte.parameters, rte.adapter_bytes, rte.printed_parameters) == (10, 40, "0.10M")
    shown = as_text(results_table(results)).splitlines()
    assert any(line.endswith("74.00 ± 9.94 [75.50]   85.00 ± 63.53 (2 of 3 seeds) [93.53]") for line in shown)
    assert rte.scores[0].repeat.startswith(f"loretta train --config {tmp_path}/deberta-base/rte/loretta_adp/s0/config")


def test_the_average_is_over_the_tasks_of_each_seed(tmp_path):
    runs = planned("table6", tmp_path, methods=("loretta_adp-r2",), seeds=2)
    values = {("sst2", 0): 0.9, ("sst2", 1): 0.92, ("qnli", 0): 0.8, ("qnli", 1): 0.7}
    for run in runs:
        finish(tmp_path, run, validation={"accuracy": values[run.task, run.seed]})
    average = collect(tmp_path).cells[-1]
    assert average.task == "average"
    assert [score.value for score in average.scores] == pytest.approx([0.85, 0.81])
    assert average.mean == pytest.approx(0.83)


def test_a_test_split_is_what_is_reported(tmp_path):
    (run,) = planned("table1", tmp_path, models=("deberta-base",), tasks=("rte",), methods=("lora-r8",), seeds=1)
    finish(tmp_path, run, validation={"accuracy": 0.9}, test={"accuracy": 0.6})
    (cell,) = collect(tmp_path).cells
    assert (cell.split, cell.mean, cell.low) == ("test", 0.6, None)


def test_the_printed_metric_is_taken_where_it_is_not_the_first(tmp_path):
    (run,) = planned("table2", tmp_path, tasks=("cb",), methods=("lora",), seeds=1)
    finish(tmp_path, run, validation={"f1": 0.1}, test={"f1": 0.2, "accuracy": 0.7}, metric="f1")
    (cell,) = collect(tmp_path).cells
    assert (cell.metric, cell.mean, cell.printed) == ("accuracy", 0.7, 67.86)


def test_a_folder_without_a_study_or_with_a_damaged_one(tmp_path):
    with pytest.raises(InputError, match="holds no study"):
        collect_all(tmp_path)
    (tmp_path / "study.json").write_text('{"study": {')
    with pytest.raises(InputError, match="damaged") as caught:
        collect_all(tmp_path)
    assert "\n" not in str(caught.value)


def compared(root, scores, *, ranks=(), higher_is_better=True):
    """Results of methods with (scores of seeds, parameters)."""
    root.mkdir(exist_ok=True)
    study = comparison("reviews.csv", list(scores), ranks=ranks, seeds=3, settings={"label": "mood", "max_steps": 9})
    options = Options(models=("bert-base",), seeds=3)
    runs = expand(study, options, root).runs
    write_study(root, study, options, runs, "")
    for run in runs:
        values, parameters = scores[run.row]
        if run.seed < len(values):
            finish(
                root, run, validation={"accuracy": values[run.seed]}, parameters=parameters,
                higher_is_better=higher_is_better,
            )  # fmt: skip
    return collect(root)


def test_the_smallest_method_that_reaches_the_best(tmp_path):
    found = verdict(
        compared(
            tmp_path,
            {"lora": ((0.90, 0.91, 0.92), 1000), "ia3": ((0.89, 0.91, 0.92), 50), "norms": ((0.5, 0.51, 0.5), 10)},
        )
    )
    assert (found.best, found.smallest) == ("lora", "ia3")
    assert "not proof" in found.words


def test_the_data_cannot_tell(tmp_path):
    found = verdict(compared(tmp_path, {"lora": ((0.5, 0.9, 0.6), 1000), "ia3": ((0.4, 0.8, 0.6), 50)}))
    assert (found.best, found.smallest) == ("lora", "ia3")
    assert "cannot tell the methods apart" in found.words


def test_no_smaller_method_reaches_the_best(tmp_path):
    found = verdict(compared(tmp_path, {"lora": ((0.9, 0.9, 0.9), 1000), "ia3": ((0.4, 0.41, 0.4), 50)}))
    assert (found.best, found.smallest) == ("lora", "lora")
    assert "No smaller method" in found.words


def test_too_few_seeds_say_little(tmp_path):
    found = verdict(compared(tmp_path, {"lora": ((0.9,), 1000), "ia3": ((0.4, 0.41, 0.4), 50)}))
    assert found.smallest is None
    assert "give --seeds 5" in found.words
    assert verdict(compared(tmp_path / "none", {"lora": ((), 1)})).best is None


def test_rows_of_a_comparison():
    study = comparison("my.csv", ["lora", "adp", "rep", "ia3", "compact"], ranks=[2, 20], seeds=5, settings={})
    assert {row.name: row.options for row in study.rows} == {
        "lora-r2": {"r": 2, "lora_alpha": 4},
        "lora-r20": {"r": 20, "lora_alpha": 40},
        "loretta_adp-r2": {"tensor_rank": 2},
        "loretta_adp-r20": {"tensor_rank": 20},
        "loretta_rep-r2": {"tensor_rank": 2, "r": 8},
        "loretta_rep-r20": {"tensor_rank": 20, "r": 20},
        "ia3": {},
        "compact-r2": {"tensor_rank": 2},
        "compact-r20": {"tensor_rank": 20},
    }
    with pytest.raises(InputError, match="unknown method 'lorra'"):
        comparison("my.csv", ["lorra"], settings={})


def test_study_json_says_what_was_asked_for(tmp_path):
    planned("table1", tmp_path, models=("deberta-base",), tasks=("rte",), methods=("lora-r8",), seeds=2)
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["study"]["name"] == "table1"
    assert content["options"]["tasks"] == ["rte"]
    assert {run["folder"] for run in content["planned"]} == {f"deberta-base/rte/lora-r8/s{k}" for k in (0, 1)}


@pytest.mark.parametrize("content", ['{"study": {', '{"students": 30}', '["a list"]'])
def test_a_study_json_that_is_no_study_is_set_aside_and_named(content, tmp_path, capsys):
    (tmp_path / "study.json").write_text(content)
    planned("table1", tmp_path, models=("deberta-base",), tasks=("rte",), methods=("lora-r8",), seeds=2)
    assert "study.json' is no study that can be read: set aside as 'broken-study.json'" in capsys.readouterr().err
    assert (tmp_path / "broken-study.json").read_text() == content
    assert collect(tmp_path).study.name == "table1"


def test_a_diverged_method_is_named_and_never_the_best(tmp_path):
    scores = {"lora": ((math.nan, 0.9, 0.9), 1000), "ia3": ((0.7, 0.8, 0.9), 50), "norms": ((0.2, 0.3, 0.2), 10)}
    found = verdict(compared(tmp_path, scores))
    assert (found.best, found.smallest) == ("ia3", "ia3")
    assert "A run of lora diverged" in found.words
    assert "fewer than two" not in found.words
    only = verdict(compared(tmp_path / "only", {"lora": ((math.nan,) * 3, 1000)}))
    assert (only.best, only.words) == (None, "A run of lora diverged, which leaves no mean to compare.")


@pytest.mark.parametrize("content", ["", '{"half', "[]", "{}"])
def test_a_damaged_record_is_a_missing_seed(content, tmp_path):
    runs = planned("table1", tmp_path, models=("deberta-base",), tasks=("rte",), methods=("lora-r8",), seeds=2)
    for run in runs:
        finish(tmp_path, run, validation={"accuracy": 0.5})
    (tmp_path / runs[1].folder / "run.json").write_text(content)
    (cell,) = collect(tmp_path).cells
    assert (cell.seeds, cell.mean) == ("1 of 2 seeds", 0.5)
    ((seed, state, reason),) = [(missing.seed, missing.state, missing.reason) for missing in cell.missing]
    assert (seed, state) == (1, "failed")
    assert "run.json" in reason


def test_the_last_task_of_a_narrowed_sequence_is_its_end(tmp_path):
    options = {"models": ("deberta-base",), "tasks": ("sst2", "mrpc"), "methods": ("lora-r8",), "seeds": 1}
    for run in planned("table4", tmp_path, **options):
        finish(tmp_path, run, validation={"accuracy": 0.5})
        scores = {task: {"accuracy": 0.25} for task in run.order}
        (tmp_path / run.folder / "evaluations.json").write_text(json.dumps(scores))
    assert [(cell.task, cell.stage) for cell in collect(tmp_path).final()] == [("sst2", 2), ("mrpc", 2)]
