"""Runs are carried out once, in any number of attempts: finished ones stay, killed and failed ones go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from loretta.errors import InputError, OutOfMemory, Stopped
from loretta.population import training
from loretta.record import RunRecord
from loretta.studies import execution, runner, workers
from loretta.studies.configs import Options
from loretta.studies.execution import carry_out, hold
from loretta.studies.expansion import expand
from loretta.studies.results import collect
from loretta.studies.runner import run_study
from loretta.studies.state import beside, find_runs, folder_state, held_by
from loretta.studies.study import load_study
from loretta.studies.unit import UnitProcess
from loretta.studies.workers import Processes, threads_each, visible_gpus

QUICK = {"epochs": 1, "max_length": 16}


def options_for(model, data_dir, **more) -> Options:
    sets = {**QUICK, **more.pop("sets", {})}
    return Options(models=(model,), data_dir=data_dir, cpu=True, sets=sets, **more)


def states(root) -> dict[str, str]:
    return {str(folder.relative_to(root)): state for folder, state, _ in find_runs(root)}


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
    assert cell.parameters == results.record(tmp_path, cell.scores[0]).parameters.trainable


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


def test_a_failed_run_is_written_down_and_the_others_go_on(bert, data_dir, tmp_path):
    sets = {"lora.target_modules": ["no_such_layer"]}
    options = options_for(bert, data_dir, tasks=("rte",), methods=("lora-r8", "bitfit"), seeds=1, sets=sets)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=0)
    assert not summary.complete
    assert [outcome.folder for outcome in summary.of("failed")] == ["tiny-bert/rte/lora-r8/s0"]
    error = json.loads((tmp_path / "tiny-bert/rte/lora-r8/s0/error.json").read_text())
    assert "No modules were targeted" in error["error"]
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
    last = results.record(tmp_path, matrix[3, "qnli"].scores[0])
    assert matrix[3, "qnli"].scores[0].value == pytest.approx(last.validation["accuracy"])
    assert last.config["start_from"].endswith("sst2-mrpc/lora-r8/s0")


def test_what_needs_a_failed_run_says_so(bert, data_dir, tmp_path, monkeypatch):
    def fail_on_mrpc(folder, run):
        if run.config["data"] == "mrpc":
            raise MemoryError("too much")
        return execution._train(folder, run)

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


def test_two_runners_never_work_on_the_same_run(bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=1)
    (run,) = expand(load_study("table1"), options, tmp_path).runs
    folder = tmp_path / run.folder
    with hold(folder) as mine:
        assert mine
        # as another process would find it
        assert held_by(folder).pid == os.getpid()
        assert folder_state(folder) == ("running", f"in process {os.getpid()} on {held_by(folder).host}")
        assert carry_out(tmp_path, run).state == "running"
        summary = run_study(load_study("table1"), options, tmp_path, jobs=0)
        assert [outcome.state for outcome in summary.outcomes] == ["running"]
        assert not summary.complete
        assert not folder.exists()
    assert held_by(folder) is None
    assert carry_out(tmp_path, run).state == "finished"


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    folder = tmp_path / "s0"
    lock = (
        f"from filelock import FileLock; FileLock({str(beside(folder, '.lock'))!r}).acquire(); import os; os._exit(1)"
    )
    process = subprocess.Popen([sys.executable, "-c", lock])
    process.wait()
    beside(folder, ".holder").write_text(json.dumps({"pid": process.pid, "host": os.uname().nodename}))
    assert held_by(folder) is None
    with hold(folder) as mine:
        assert mine
        assert not FileLock(beside(folder, ".lock")).is_locked


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
    assert Processes(Path("runs"), 2).free == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert Processes(Path("runs"), 3).free == ["0", "1", "0"]


def test_processes_share_the_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_each(jobs) for jobs in (1, 2, 5, 20)] == [12, 6, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert [threads_each(jobs) for jobs in (1, 2, 5)] == [4, 2, 1]


def command(bert, data_dir, root, *more):
    sets = [
        word for key, value in {**QUICK, "epochs": 40, "eval_steps": 3}.items() for word in ("--set", f"{key}={value}")
    ]
    fixed = ["--model", bert, "--data-dir", data_dir, "--tasks", "rte", "--methods", "loretta_adp", "--seeds", "2"]
    code = "import sys; from loretta.cli.main import main; main()"
    return [sys.executable, "-c", code, "reproduce", "table1", *fixed, "--cpu", "-o", str(root), *sets, *more]


def wait_for(condition, process):
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_killed_half_way_and_resumed(bert, data_dir, tmp_path):
    """kill -9 of the runner ends its workers too, frees their locks, and the next start goes on from a checkpoint."""
    process = subprocess.Popen(command(bert, data_dir, tmp_path, "--jobs", "2"), stderr=subprocess.DEVNULL)
    folders = [tmp_path / f"tiny-bert/rte/loretta_adp/s{seed}" for seed in (0, 1)]
    wait_for(lambda: all(list(folder.glob("checkpoints/*/trainer_state.json")) for folder in folders), process)
    workers = [held_by(folder).pid for folder in folders if held_by(folder)]
    assert len(set(workers)) == 2, "two processes at once"
    process.kill()
    process.wait()
    wait_for_end(workers)
    assert set(states(tmp_path).values()) == {"killed"}
    before = [json.loads(max(folder.glob("checkpoints/*/trainer_state.json")).read_text()) for folder in folders]

    # in this process and quick: the numbers must be those of a run that nobody killed
    sets = {"epochs": 40, "eval_steps": 3}
    options = options_for(bert, data_dir, tasks=("rte",), methods=("loretta_adp",), seeds=2, sets=sets)
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete
    (cell,) = collect(tmp_path).cells
    for score, state in zip(cell.scores, before, strict=True):
        record = collect(tmp_path).record(tmp_path, score)
        history = [point for point in record.history if point.split == "validation"]
        known = [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry]
        assert [(point.step, point.values["loss"]) for point in history][: len(known)] == known
        assert history[-1].step == 80


def wait_for_end(pids):
    for _ in range(200):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {pids}")


@pytest.mark.parametrize(("number", "together"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_stops_the_processes_behind_a_checkpoint(number, together, bert, data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "tiny-bert/rte/loretta_adp/s0"
    children, before, waited = [], set(), 0

    def trains():
        log = beside(folder, ".log")
        return log.is_file() and f"{together} runs together, step" in log.read_text() if together > 1 else before

    def interrupt(seconds):
        nonlocal waited
        waited += 1
        time.sleep(seconds)
        before.update(folder.glob("checkpoints/*-*"))
        if trains():
            children.append(held_by(folder).pid)
            signal.raise_signal(number)
        assert waited < 6000

    monkeypatch.setattr(workers, "sleep", interrupt)
    sets = {"epochs": 40, "eval_steps": 3}
    options = options_for(bert, data_dir, tasks=("rte",), methods=("loretta_adp",), seeds=together, sets=sets)
    with pytest.raises(Stopped, match=f"{number.name} before the end of the study: go on with the same") as stopped:
        run_study(load_study("table1"), options, tmp_path, jobs=1, population=together)
    assert stopped.value.exit_status == 128 + number
    wait_for_end(children)
    assert set(states(tmp_path).values()) == {"killed"}
    assert set(folder.glob("checkpoints/*-*")) - before, "it saved before it ended"
    assert "stopped by SIGTERM" in beside(folder, ".log").read_text()


def test_a_process_that_dies_fails_its_run_and_no_other(bert, data_dir, tmp_path, monkeypatch):
    """The first of two is killed, as by a system without memory; it is tried again by the next call."""
    started = []

    class Killed(UnitProcess):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if not started:
                self.process.kill()
            assert os.getsid(self.process.pid) != os.getsid(0), "an interrupt at the terminal would end it at once"
            started.append(kwargs["environment"]["OMP_NUM_THREADS"])

    monkeypatch.setattr(workers, "UnitProcess", Killed)
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=2)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=1)
    first, second = summary.outcomes
    assert (first.state, second.state) == ("failed", "finished")
    assert "ended by SIGKILL, as when the memory is used up" in first.reason
    assert folder_state(tmp_path / first.folder) == ("failed", first.reason)
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete


def test_a_run_that_stops_itself_is_a_failed_run(bert, data_dir, tmp_path, monkeypatch):
    """A loss that is not finite ends one run, and none of the others."""

    def diverge(folder, run):
        if run.seed == 0:
            raise Stopped("the loss is not finite at step 3", exit_status=3)
        return execution._train(folder, run)

    monkeypatch.setitem(execution._DO, "train", diverge)
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=2)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=0)
    assert [outcome.state for outcome in summary.outcomes] == ["failed", "finished"]
    assert summary.outcomes[0].reason == "the loss is not finite at step 3"


@pytest.mark.parametrize("host", [os.uname().nodename, "a-container-that-is-gone"])
def test_the_note_of_a_dead_holder_stops_no_run(host, bert, data_dir, tmp_path):
    """Its number belongs to another process now, or its machine is not this one: the lock is free."""
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=1)
    (run,) = expand(load_study("table1"), options, tmp_path).runs
    (tmp_path / run.folder).parent.mkdir(parents=True)
    beside(tmp_path / run.folder, ".holder").write_text(json.dumps({"pid": os.getppid(), "host": host}))
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete


def test_a_kill_in_the_first_file_does_not_bar_the_folder(bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=1)
    (run,) = expand(load_study("table1"), options, tmp_path).runs
    (tmp_path / run.folder).mkdir(parents=True)
    (tmp_path / run.folder / f".{'0f' * 8}.tmp").write_text('{"half')
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete


@pytest.mark.parametrize("content", ["", '{"half', "[]"])
def test_damaged_results_are_made_again(content, bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, tasks=("sst2", "mrpc"), methods=("loretta_rep",), seeds=1)
    study = load_study("table4")
    assert run_study(study, options, tmp_path, jobs=0).complete
    before = [cell.mean for cell in collect(tmp_path).cells]
    first = tmp_path / "tiny-bert/sst2/loretta_rep/s0"
    for name in ("evaluations.json", "run.json"):
        (first / name).write_text(content)
        assert states(tmp_path)[str(first.relative_to(tmp_path))] == ("finished" if name != "run.json" else "failed")
        assert run_study(study, options, tmp_path, jobs=0).complete
        assert [cell.mean for cell in collect(tmp_path).cells] == before
        assert (first / "broken-run.json").exists() == (name == "run.json")
    (first / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config.json' is damaged"):
        run_study(study, options, tmp_path, jobs=0)


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


def test_a_group_that_is_too_large_for_the_memory_is_split(bert, data_dir, tmp_path, monkeypatch):
    """Three of four fit, as a stand-in for the free memory says; nobody asks where the size is given."""
    asked, together = [], []

    def fits(configs, share):
        asked.append((len(configs), share))
        return 3

    monkeypatch.setattr("loretta.population.memory.members_that_fit", fits)
    monkeypatch.setattr(runner, "visible_gpus", lambda: ["0"])
    train_together = training.train_together
    monkeypatch.setattr(
        training, "train_together", lambda c, **kwargs: (together.append(len(c)), train_together(c, **kwargs))[1]
    )
    options = options_for(bert, data_dir, tasks=("mrpc",), methods=("bitfit",), seeds=4)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=0, population=None)
    assert summary.complete
    assert (asked, together) == ([(4, 1.0)], [3])
    records = [RunRecord.load(tmp_path / outcome.folder / "run.json") for outcome in summary.outcomes]
    assert [record.population for record in records] == [3, 3, 3, None]
    assert "the memory holds 3 of 4 runs at once" in beside(tmp_path / summary.outcomes[0].folder, ".log").read_text()
