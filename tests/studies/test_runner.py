"""Runs are carried out once, in any number of attempts: finished ones stay, killed and failed ones go on."""

import json
import os
from pathlib import Path

import pytest
import torch
from study_data import options_for, states

from loretta.errors import InputError, OutOfMemory
from loretta.population.loop import Loop
from loretta.record import RunRecord
from loretta.studies import execution
from loretta.studies.configs import Options
from loretta.studies.expansion import expand
from loretta.studies.results import collect
from loretta.studies.runner import run_study, write_study
from loretta.studies.state import beside
from loretta.studies.study import load_study
from loretta.studies.workers import Processes, threads_each, visible_gpus


def test_a_finished_run_is_not_repeated_and_a_changed_one_is_refused(bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, tasks=("rte",), methods=("loretta_rep",), seeds=2)
    first = run_study(load_study("table1"), options, tmp_path, jobs=0, command="loretta reproduce table1")
    assert first.complete
    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    assert len(records) == 2
    assert not list(tmp_path.rglob("checkpoints"))
    again = run_study(load_study("table1"), options, tmp_path, jobs=0)
    assert again.complete
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")} == records
    longer = options_for(bert, data_dir, tasks=("rte",), methods=("loretta_rep",), seeds=2, sets={"epochs": 2})
    with pytest.raises(InputError, match=r"tiny-bert/rte/loretta_rep/s0' holds a run .*epochs was 1.0 and is 2.0"):
        run_study(load_study("table1"), longer, tmp_path, jobs=0)
    results = collect(tmp_path)
    assert results.commands == ("loretta reproduce table1",)
    (cell,) = results.cells
    assert (cell.finished, cell.asked, cell.seeds, cell.split) == (2, 2, "2 seeds", "validation")
    assert cell.parameters == RunRecord.load(tmp_path / cell.scores[0].folder / "run.json").parameters.trainable


def test_other_cells_of_a_study_stay_in_its_results(bert, data_dir, tmp_path):
    study = load_study("table1")
    for task in ("rte", "mrpc"):
        run_study(study, options_for(bert, data_dir, tasks=(task,), methods=("bitfit",), seeds=1), tmp_path, jobs=0)
    assert {cell.task for cell in collect(tmp_path).cells} == {"rte", "mrpc"}
    # another study in the same folder shares its runs, and has a file of its own
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=1)
    before = (tmp_path / "tiny-bert/rte/bitfit/s0/run.json").read_bytes()
    run_study(load_study("figure1"), options, tmp_path, jobs=0)
    assert (tmp_path / "tiny-bert/rte/bitfit/s0/run.json").read_bytes() == before
    assert collect(tmp_path, "figure1").study.view == "pareto"
    with pytest.raises(InputError, match=r"several studies \(figure1, table1\)"):
        collect(tmp_path)


def test_cells_of_other_options_in_one_table_are_named(bert, data_dir, tmp_path, capsys):
    """They stood side by side without a word."""

    def ask(task, method, **sets):
        options = options_for(bert, data_dir, tasks=(task,), methods=(method,), seeds=1, sets=sets)
        study = load_study("table1")
        write_study(tmp_path, study, options, expand(study, options, tmp_path).runs, f"{task} {method}")
        return capsys.readouterr().err

    assert ask("rte", "bitfit", epochs=1) == ""
    assert ask("mrpc", "bitfit", epochs=2) == "", "another column"
    assert ask("mrpc", "lora-r8", epochs=2) == ""
    words = "note: bitfit, lora-r8 of earlier commands had other options (epochs was 2 and is 3) and stay in its tables"
    assert ask("mrpc", "ia3", epochs=3).startswith(words)
    planned = json.loads((tmp_path / "study.json").read_text())["planned"]
    assert [(run["task"], run["row"]) for run in planned][1:] == [
        ("mrpc", "bitfit"), ("mrpc", "lora-r8"), ("mrpc", "ia3"),
    ]  # fmt: skip


def test_a_failed_run_is_written_down_and_the_others_go_on(bert, data_dir, tmp_path):
    sets = {"lora.target_modules": ["no_such_layer"]}
    options = options_for(bert, data_dir, tasks=("rte",), methods=("lora-r8", "bitfit"), seeds=1, sets=sets)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=0)
    assert not summary.complete
    assert [outcome.folder for outcome in summary.of("failed")] == ["tiny-bert/rte/lora-r8/s0"]
    error = json.loads((tmp_path / "tiny-bert/rte/lora-r8/s0/error.json").read_text())
    assert "the model has no module 'no_such_layer'" in error["error"]
    assert "Traceback" in error["traceback"]
    assert states(tmp_path) == {"tiny-bert/rte/lora-r8/s0": "failed", "tiny-bert/rte/bitfit/s0": "finished"}
    lora = next(cell for cell in collect(tmp_path).cells if cell.row == "lora-r8")
    assert (lora.finished, lora.seeds, lora.missing[0].state) == (0, "0 of 1 seed", "failed")
    # once mended it is tried again
    mended = options_for(bert, data_dir, tasks=("rte",), methods=("lora-r8", "bitfit"), seeds=1)
    assert run_study(load_study("table1"), mended, tmp_path, jobs=0).complete
    assert not (tmp_path / "tiny-bert/rte/lora-r8/s0/error.json").exists()


def test_a_sequence_is_scored_on_every_task_after_every_step(bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, methods=("lora",), seeds=2)
    assert run_study(load_study("table4"), options, tmp_path, jobs=0).complete
    results = collect(tmp_path)
    matrix = {(cell.stage, cell.task): cell for cell in results.cells if cell.task != "average"}
    assert set(matrix) == {(stage, task) for stage in (1, 2, 3) for task in ("sst2", "mrpc", "qnli")}
    assert all(cell.finished == 2 for cell in matrix.values())
    assert matrix[3, "sst2"].printed == 49.20
    final = {cell.task: cell for cell in results.final()}
    mean = sum(final[task].mean for task in ("sst2", "mrpc", "qnli")) / 3
    assert final["average"].mean == pytest.approx(mean)
    # what a step scores on its own task is what its training saw last
    last = RunRecord.load(tmp_path / matrix[3, "qnli"].scores[0].folder / "run.json")
    assert matrix[3, "qnli"].scores[0].value == pytest.approx(last.validation["accuracy"])
    assert last.config["start_from"].endswith("sst2-mrpc/lora-r8/s0")


def test_what_needs_a_failed_run_says_so(bert, data_dir, tmp_path, monkeypatch):
    def fail_on_mrpc(folder, run, graphs):
        if run.config["data"] == "mrpc":
            raise MemoryError("too much")
        return execution._train(folder, run, graphs)

    monkeypatch.setitem(execution._DO, "train", fail_on_mrpc)
    options = options_for(bert, data_dir, methods=("lora",), seeds=1)
    summary = run_study(load_study("table4"), options, tmp_path, jobs=0)
    assert [outcome.state for outcome in summary.outcomes] == ["finished", "failed", "waiting"]
    assert summary.outcomes[1].reason == "MemoryError: too much"
    assert "it needs 'tiny-bert/sst2-mrpc/lora-r8/s0'" in summary.outcomes[2].reason


def test_a_sweep_end_to_end(bert, data_dir, tmp_path):
    """At a rate of 1e-9 nothing is learnt; the words tell the label, so 3e-2 must win and serve every seed."""
    options = options_for(
        bert, data_dir, tasks=("sst2",), methods=("loretta_rep",), seeds=2, rates=(1e-9, 3e-2),
        sets={"epochs": 6, "select_by": "metric"},
    )  # fmt: skip
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete
    folder = tmp_path / "tiny-bert/sst2/loretta_rep"
    finished = {path.parent.name for path in folder.rglob("run.json")}
    assert finished == {"s0-lr1e-09", "s0-lr0.03", "s1-lr0.03"}
    (cell,) = collect(tmp_path).cells
    assert [score.learning_rate for score in cell.scores] == [3e-2, 3e-2]


def test_weights_that_cannot_be_had_are_named_before_anything_starts(tmp_path):
    options = Options(models=("deberta-base",), tasks=("rte",), methods=("lora",), seeds=1)
    with pytest.raises(InputError, match=r"the model 'microsoft/deberta-base' cannot be loaded .*give --model"):
        run_study(load_study("table1"), options, tmp_path / "runs", jobs=0)
    assert not (tmp_path / "runs").exists()


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert visible_gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert Processes(Path("runs"), 2).free == [(None, None)] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert Processes(Path("runs"), 3).free == [("0", None), ("1", None), ("0", None)]


def test_processes_share_the_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_each(jobs) for jobs in (1, 2, 5, 20)] == [12, 6, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert [threads_each(jobs) for jobs in (1, 2, 5)] == [4, 2, 1]


def test_runs_that_differ_in_seeds_are_trained_together(bert, data_dir, tmp_path):
    task = "mrpc"
    options = options_for(bert, data_dir, tasks=(task,), methods=("bitfit", "loretta_rep"), seeds=2)
    ended = []
    summary = run_study(
        load_study("table1"),
        options,
        tmp_path,
        jobs=0,
        population=8,
        watch=lambda folder, outcome, *_: ended.append(folder) if outcome else None,
    )
    assert summary.complete
    assert ended == [run.folder for run in summary.expansion.runs]
    for outcome in summary.outcomes:
        record = RunRecord.load(tmp_path / outcome.folder / "run.json")
        assert record.population == 2
        assert outcome.seconds > 0
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete


def test_what_fails_together_goes_on_one_by_one(bert, data_dir, tmp_path, monkeypatch):
    together = []

    def too_large(configs, **kwargs):
        together.append(len(configs))
        raise OutOfMemory("too small") if len(configs) > 2 else InputError("cannot be trained in a population")

    monkeypatch.setattr("loretta.population.training.train_together", too_large)
    options = options_for(bert, data_dir, tasks=("mrpc",), methods=("bitfit",), seeds=4)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=0, population=8)
    assert summary.complete
    assert together == [4, 2, 2]
    records = [RunRecord.load(tmp_path / outcome.folder / "run.json") for outcome in summary.outcomes]
    assert [record.population for record in records] == [None] * 4


def test_memory_that_is_used_up_in_the_middle_lets_a_group_go_on_in_halves(bert, data_dir, tmp_path, monkeypatch):
    losses = Loop.losses

    def small(self, part):
        if self.population.size > 2 and self.step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses(self, part)

    monkeypatch.setattr(Loop, "losses", small)
    options = options_for(bert, data_dir, tasks=("mrpc",), methods=("bitfit",), seeds=4)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=0, population=8)
    assert summary.complete
    records = [RunRecord.load(tmp_path / outcome.folder / "run.json") for outcome in summary.outcomes]
    assert [record.population for record in records] == [2] * 4
    assert "2 of 4 runs at once" in beside(tmp_path / summary.outcomes[0].folder, ".log").read_text()
