"""Studies that are killed, signalled or held by another process go on where they were."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from forked import ForkedPopen, fork_units, status_of
from interrupts import held_by_another
from study_data import QUICK, options_for, states

from loretta.errors import InputError, NotRecorded, Stopped
from loretta.folders import is_temporary
from loretta.population.loop import Loop
from loretta.population.training import train_together
from loretta.record import RunRecord
from loretta.studies import execution, workers
from loretta.studies.execution import carry_out, hold
from loretta.studies.expansion import expand
from loretta.studies.results import collect
from loretta.studies.runner import run_study
from loretta.studies.state import beside, folder_state, held_by
from loretta.studies.study import load_study
from loretta.studies.unit import DONE, UnitProcess, _read_units
from loretta.training import arguments
from loretta.training.config import RunConfig
from loretta.training.run import train


def test_two_runners_never_work_on_the_same_run(bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=1)
    (run,) = expand(load_study("table1"), options, tmp_path).runs
    folder = tmp_path / run.folder
    with held_by_another(folder) as other:
        assert carry_out(tmp_path, run).state == "running"
        summary = run_study(load_study("table1"), options, tmp_path, jobs=0)
        assert [outcome.state for outcome in summary.outcomes] == ["running"]
        assert not summary.complete
        other.kill()
    with hold(folder) as mine:
        assert mine
        # as another process would find it
        assert held_by(folder).pid == os.getpid()
        assert folder_state(folder) == ("running", f"in process {os.getpid()} on {held_by(folder).host}")
    assert held_by(folder) is None
    assert carry_out(tmp_path, run).state == "finished"
    assert not any(is_temporary(path.name) for path in folder.parent.iterdir()), "nothing is left beside the run"


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    folder = tmp_path / "s0"
    with held_by_another(folder) as other:
        beside(folder, ".holder").write_text(json.dumps({"pid": other.pid, "host": os.uname().nodename}))
        with hold(folder) as mine:
            assert not mine
        other.kill()
    assert held_by(folder) is None
    with hold(folder) as mine:
        assert mine


def command(bert, data_dir, root, *more):
    sets = [
        word for key, value in {**QUICK, "epochs": 24, "eval_steps": 3}.items() for word in ("--set", f"{key}={value}")
    ]
    fixed = ["--model", bert, "--data-dir", data_dir, "--tasks", "rte", "--methods", "loretta_adp", "--seeds", "2"]
    return [sys.executable, "-m", "loretta", "reproduce", "table1", *fixed, "--cpu", "-o", str(root), *sets, *more]


def wait_for(condition, process):
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_killed_half_way_and_resumed(bert, data_dir, tmp_path, monkeypatch):
    """kill -9 of the runner ends its workers too, frees their locks, and the next start goes on from a checkpoint."""
    fork_units(monkeypatch)
    process = ForkedPopen(command(bert, data_dir, tmp_path, "--jobs", "2"), stderr=subprocess.DEVNULL)
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
    sets = {"epochs": 24, "eval_steps": 3}
    options = options_for(bert, data_dir, tasks=("rte",), methods=("loretta_adp",), seeds=2, sets=sets)
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete
    (cell,) = collect(tmp_path).cells
    for score, state in zip(cell.scores, before, strict=True):
        record = RunRecord.load(tmp_path / score.folder / "run.json")
        history = [point for point in record.history if point.split == "validation"]
        known = [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry]
        assert [(point.step, point.values["loss"]) for point in history][: len(known)] == known
        assert history[-1].step == 48


def wait_for_end(pids):
    for _ in range(2000):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {pids}")


@pytest.mark.parametrize(("number", "together"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_stops_the_processes_behind_a_checkpoint(number, together, bert, data_dir, tmp_path, monkeypatch):
    fork_units(monkeypatch)
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


@pytest.fixture
def given(monkeypatch):
    """The units that each process of a runner was given, as lists of folders."""
    processes = []

    class Noted(UnitProcess):
        def __init__(self, *args, **kwargs):
            processes.append([])
            super().__init__(*args, **kwargs)

        def start(self, unit):
            processes[-1].append(unit.runs[0].folder.removeprefix("tiny-bert/rte/"))
            super().start(unit)

    monkeypatch.setattr(workers, "UnitProcess", Noted)
    return processes


@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_that_dies_fails_its_run_and_no_other(seed, given, bert, data_dir, tmp_path, monkeypatch):
    """It is killed, as by a system without memory, in its first unit or the next; a later call tries that again."""
    if seed:
        fork_units(monkeypatch)
    start = workers.UnitProcess.start

    def killed(self, unit):
        start(self, unit)
        own_session = seed or os.getsid(self.process.pid) != os.getsid(0)
        assert own_session, "an interrupt at the terminal would end it at once"
        if unit.runs[0].seed == seed:
            self.process.kill()

    monkeypatch.setattr(workers.UnitProcess, "start", killed)
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=3)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=1)
    assert [outcome.state == "failed" for outcome in summary.outcomes] == [k == seed for k in range(3)]
    dead = summary.outcomes[seed]
    assert "ended by SIGKILL, as when the memory is used up" in dead.reason
    assert folder_state(tmp_path / dead.folder) == ("failed", dead.reason)
    assert given == [[f"bitfit/s{k}" for k in each] for each in ([*range(seed + 1)], [*range(seed + 1, 3)])]
    assert run_study(load_study("table1"), options, tmp_path, jobs=0).complete


def test_a_process_goes_on_to_the_next_unit_until_a_run_fails(given, bert, data_dir, tmp_path, monkeypatch):
    fork_units(monkeypatch)
    sets = {"lora.target_modules": ["no_such_layer"]}
    methods = ("bitfit", "lora-r8", "loretta_adp")
    options = options_for(bert, data_dir, tasks=("rte",), methods=methods, seeds=2, sets=sets)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=1)
    assert given == [["bitfit/s0", "bitfit/s1", "lora-r8/s0"], ["lora-r8/s1"], ["loretta_adp/s0", "loretta_adp/s1"]]
    assert [outcome.folder.partition("rte/")[2] for outcome in summary.of("failed")] == ["lora-r8/s0", "lora-r8/s1"]
    for outcome in summary.of("finished"):
        assert beside(tmp_path / outcome.folder, ".log").read_text().count("step 2: validation loss") == 1
        alone = RunConfig(**RunRecord.load(tmp_path / outcome.folder / "run.json").config)
        alone = train(alone.model_copy(update={"output": str(tmp_path / "alone" / outcome.folder)}))
        assert alone.history == RunRecord.load(tmp_path / outcome.folder / "run.json").history


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_process_that_spoils_a_recording_is_followed_by_one_without(
    seeds, given, bert, data_dir, tmp_path, monkeypatch
):
    """As on a GPU: a population goes on from its checkpoint, and so does a run that is the last one of its own."""
    fork_units(monkeypatch)
    sets = {"epochs": 2, "batch_size": 4, "eval_steps": 2}
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=seeds, sets=sets)
    study, root, whole = load_study("table1"), tmp_path / "spoiled", tmp_path / "whole"
    for folder in (root, whole):
        train_together([run.run_config() for run in expand(study, options, folder).runs], until=0.5)
    assert run_study(study, options, whole, jobs=0, population=2).complete
    losses = Loop.losses

    def spoiled(self, part):
        if self.members[0].config.cuda_graph and self.step == 9:
            raise NotRecorded("a step of this model waits for the GPU and spoils its recording")
        return losses(self, part)

    monkeypatch.setattr(Loop, "losses", spoiled)
    assert run_study(study, options, root, jobs=1, population=2).complete
    assert given == [["bitfit/s0-b4"] * 2], "one place for processes, and two of them"
    log = beside(root / "tiny-bert/rte/bitfit/s0-b4", ".log").read_text()
    assert "this process ends, and a new one goes on without CUDA graphs: a step of this model waits" in log
    for seed in range(seeds):
        got, expected = (
            RunRecord.load(folder / f"tiny-bert/rte/bitfit/s{seed}-b4/run.json") for folder in (root, whole)
        )
        assert got.history == expected.history


def test_a_process_whose_run_was_reported_to_a_service_takes_no_other(given, bert, data_dir, tmp_path, monkeypatch):
    """Else the next run would be written into the open run of wandb."""
    fork_units(monkeypatch)
    monkeypatch.setattr(arguments, "reporters", lambda config: [])
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=2, sets={"report_to": "wandb"})
    assert run_study(load_study("table1"), options, tmp_path, jobs=1).complete
    assert given == [["bitfit/s0"], ["bitfit/s1"]]


def test_a_run_may_have_workers_that_are_forks(bert, data_dir, tmp_path, monkeypatch):
    """As the loader of data has beside recorded steps: a fork begins by closing the input, which a thread reads."""
    fork_units(monkeypatch)

    def with_worker(folder, run, graphs):
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join(20)
        if worker.exitcode is None:
            worker.kill()
            raise RuntimeError("the worker hangs")
        return execution._train(folder, run, graphs)

    monkeypatch.setitem(execution._DO, "train", with_worker)
    options = options_for(bert, data_dir, tasks=("rte",), methods=("bitfit",), seeds=1)
    summary = run_study(load_study("table1"), options, tmp_path, jobs=1)
    assert summary.complete, summary.outcomes


def test_a_process_ends_with_a_starter_that_died_before_it_read_the_answer():
    def work():
        ours, its_end = socket.socketpair()
        sys.stdin = its_end.makefile()
        its_end.sendall(DONE)
        ours.close()
        _read_units(SimpleQueue())

    assert status_of(work) == -signal.SIGTERM


def test_a_process_that_died_while_it_waited_is_closed(tmp_path, monkeypatch):
    runners, closed = workers.Processes(tmp_path, 1), []
    runners.free = [(None, SimpleNamespace(alive=False, close=lambda: closed.append(True)))]
    monkeypatch.setattr(workers, "UnitProcess", lambda root, unit, environment: unit)
    runners.start("unit")
    assert (closed, runners.started) == ([True], [(None, "unit")])


def test_a_run_that_stops_itself_is_a_failed_run(bert, data_dir, tmp_path, monkeypatch):
    """A loss that is not finite ends one run, and none of the others."""

    def diverge(folder, run, graphs):
        if run.seed == 0:
            raise Stopped("the loss is not finite at step 3", exit_status=3)
        return execution._train(folder, run, graphs)

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


def test_damaged_results_are_made_again(bert, data_dir, tmp_path):
    options = options_for(bert, data_dir, tasks=("sst2", "mrpc"), methods=("loretta_rep",), seeds=1)
    study = load_study("table4")
    assert run_study(study, options, tmp_path, jobs=0).complete
    before = [cell.mean for cell in collect(tmp_path).cells]
    first = tmp_path / "tiny-bert/sst2/loretta_rep/s0"
    config = (first / "config.json").read_text()
    for content in ("", '{"half', "[]"):
        for name in ("evaluations.json", "run.json"):
            (first / name).write_text(content)
            state = "finished" if name != "run.json" else "failed"
            assert states(tmp_path)[str(first.relative_to(tmp_path))] == state
            assert run_study(study, options, tmp_path, jobs=0).complete
            assert [cell.mean for cell in collect(tmp_path).cells] == before
            assert (first / "broken-run.json").exists() == (name == "run.json")
        (first / "broken-run.json").unlink()
        (first / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config.json' is damaged"):
            run_study(study, options, tmp_path, jobs=0)
        (first / "config.json").write_text(config)
