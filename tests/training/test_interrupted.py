"""Runs that are killed, signalled or out of disk go on to the same end, and a folder belongs to one process."""

import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from forked import status_of
from interrupts import held_by_another, stopping_behind
from safetensors.torch import load_file
from training_data import config_for
from transformers import TrainerCallback

from loretta.errors import InputError, Stopped
from loretta.owned import describe, write_list
from loretta.record import RunRecord
from loretta.training import run
from loretta.training.predict import load_run
from loretta.training.run import train


@pytest.fixture
def one_thread():
    """As many as a fork has: sums of two threads are in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_end(bert, reviews, tmp_path):
    whole = train(config_for(bert, reviews, tmp_path / "whole", epochs=2))
    config = config_for(bert, reviews, tmp_path / "cut", epochs=2)

    class Kill(TrainerCallback):
        """After the checkpoint of the first epoch."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch >= 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        make = run.make_trainer
        run.make_trainer = lambda *args: add_to(make(*args))
        train(config)

    def add_to(trainer):
        trainer.add_callback(Kill())
        return trainer

    assert status_of(killed) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "run.json").exists()
    (state,) = (tmp_path / "cut").rglob("trainer_state.json")
    saved = json.loads(state.read_text())
    watch = saved["stateful_callbacks"]["Stopwatch"]["attributes"]
    assert 0 < watch["earlier"] < 100
    watch["earlier"] += 1000
    state.write_text(json.dumps(saved))
    write_list(state.parent, describe(state.parent))
    resumed = train(config, resume=True)
    assert 1000 < resumed.train_seconds < 1200, "the seconds before it was killed count"
    assert resumed.history == whole.history
    assert resumed.best_step == whole.best_step
    # a finished run is not repeated
    assert train(config, resume=True).train_seconds == resumed.train_seconds


def test_a_signal_saves_says_how_to_go_on_and_the_run_ends_the_same(bert, reviews, tmp_path):
    options = {"epochs": 2, "logging_steps": 4, "accumulate": 2, "batch_size": 4, "text": "review"}
    whole = train(config_for(bert, reviews, tmp_path / "whole", **options))
    for number, name, steps in ((signal.SIGTERM, "SIGTERM", (1, 10)), (signal.SIGINT, "SIGINT", (13, 20))):
        folder = tmp_path / name
        config = config_for(bert, reviews, folder, **options)
        for step in steps:
            with stopping_behind(step, number), pytest.raises(Stopped) as stopped:
                train(config, resume=True)
            assert stopped.value.exit_status == 128 + number
            assert f"stopped by {name} behind" in str(stopped.value)
            assert "--resume" in str(stopped.value)
            if step != 20:
                assert (folder / "checkpoints" / f"checkpoint-{step}").is_dir()
            assert not (folder / "run.json").exists()
        assert signal.getsignal(number) is not None
        resumed = train(config, resume=True)
        assert resumed.history == whole.history
        a, b = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (tmp_path / "whole", folder))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_kill_between_the_first_files_does_not_bar_the_folder(bert, reviews, tmp_path):
    """The folder held "other files", and every further attempt was refused."""
    config = config_for(bert, reviews, tmp_path / "run")
    place = run.find_place(config, resume=False, overwrite=False)
    place.begin(config, overwrite=False)
    (tmp_path / "run" / "config.json").unlink()
    for resume in (False, True):
        assert run.find_place(config, resume=resume, overwrite=False) == place
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(InputError, match="holds other files"):
        run.find_place(config, resume=True, overwrite=False)


def test_a_signal_outside_of_the_steps_ends_the_run_at_once(bert, reviews, tmp_path, monkeypatch):
    whole = train(config_for(bert, reviews, tmp_path / "whole", epochs=1))
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    for place in ("loretta.training.run.encode_splits", "loretta.training.finish.read_history"):
        monkeypatch.setattr(place, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="SIGTERM"):
            train(config, resume=True)
        monkeypatch.undo()
        assert not list(tmp_path.rglob("*.tmp"))
    assert train(config, resume=True).history == whole.history


def test_a_last_step_in_the_middle_of_an_epoch_is_the_last(bert, reviews, tmp_path):
    """The Trainer would take one step more when it goes on from a checkpoint of the last one."""
    config = config_for(bert, reviews, tmp_path / "run", max_steps=5, eval_steps=3)
    whole = train(config)
    (tmp_path / "run" / "run.json").unlink()
    assert train(config, resume=True).history == whole.history


def test_a_run_of_a_version_with_fewer_options_resumes(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(config)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["cuda_graph"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert train(config, resume=True).seed == 0
    with pytest.raises(InputError, match="cuda_graph was False and is True"):
        train(config.model_copy(update={"cuda_graph": True}), resume=True)


def test_what_is_on_disk_is_safe(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run: go on with --resume, replace it with --overwrite"):
        train(config)
    with pytest.raises(InputError, match=r"epochs was 1.0 and is 0.5"):
        train(config.model_copy(update={"epochs": 0.5}), resume=True)
    with pytest.raises(InputError, match="no column 'nope'"):
        train(config.model_copy(update={"label": "nope"}), overwrite=True)
    with pytest.raises(InputError, match="tensor_rank=0"):
        train(config.model_copy(update={"method_args": {"tensor_rank": 0}}), overwrite=True)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="holds other files"):
        train(config.model_copy(update={"output": str(tmp_path / "mine")}))
    with pytest.raises(InputError, match="holds other files"):
        train(config.model_copy(update={"output": str(tmp_path / "mine")}), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not touch"


def test_overwrite_removes_nothing_that_no_run_wrote(bert, reviews, tmp_path, monkeypatch):
    """A model, a project, and the folders around them: all have a config.json, or are given as the output."""
    shutil.copytree(bert, tmp_path / "project" / "model")
    (tmp_path / "project" / "model" / "model.safetensors").rename(tmp_path / "project" / "model" / "weights.bin")
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "project" / "thesis.txt").write_text("mine")
    train(config_for(bert, reviews, tmp_path / "project" / "run", max_steps=1))
    monkeypatch.chdir(tmp_path / "project")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (".", "..", "model", str(tmp_path / "project"), "run/adapter"):
        for resume, overwrite in ((False, True), (True, False), (False, False)):
            with pytest.raises(InputError, match="holds other files: give an empty or new one"):
                train(config_for(bert, reviews, output), resume=resume, overwrite=overwrite)
    (tmp_path / "project" / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"did not write, or that have changed since \(notes.txt\)"):
        train(config_for(bert, reviews, "run"), overwrite=True)
    (tmp_path / "project" / "run" / "notes.txt").unlink()
    monkeypatch.chdir(tmp_path / "project" / "run" / "adapter")
    with pytest.raises(InputError, match="the working directory"):
        train(config_for(bert, reviews, tmp_path / "project" / "run"), overwrite=True)
    for given in ({"start_from": str(tmp_path / "project" / "run")}, {"data": str(tmp_path / "project/run/run.json")}):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="is or holds '"):
            train(config_for(bert, reviews, "project/run").model_copy(update=given), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_earlier_run_stays_until_the_new_one_is_whole(bert, reviews, tmp_path, monkeypatch):
    first = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(first)
    before = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    second = first.model_copy(update={"seed": 1, "epochs": 2.0, "test": reviews})
    # at the worst moment: all is written but for the record
    monkeypatch.setattr("loretta.training.finish.write_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(second, overwrite=True)
    monkeypatch.undo()
    assert load_run(tmp_path / "run", cpu=True).config == first
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert train(first, resume=True).seed == 0
    record = train(second, resume=True)
    assert record.seed == 1
    assert RunRecord.load(tmp_path / "run" / "run.json") == record
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".loretta.json", ".loretta.lock", "adapter", "checkpoints", "config.json", "data.json", "predictions.jsonl",
        "run.json",
    ]  # fmt: skip
    train(first, overwrite=True)
    train(first.model_copy(update={"output": str(tmp_path / "beside")}))
    answers = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("run", "beside")]
    assert answers[0] == answers[1], "not those of the earlier run"


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(bert, reviews, tmp_path):
    whole = train(config_for(bert, reviews, tmp_path / "whole", epochs=2))
    config = config_for(bert, reviews, tmp_path / "run", epochs=2)
    with stopping_behind(10, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # less than the state of the optimizer
    try:
        with pytest.raises(Stopped, match=r"cannot write a checkpoint at step 20 .*make room.*--resume") as stopped:
            train(config, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert stopped.value.exit_status == 74
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-10"]

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:  # at the last file of all
        patch.setattr("loretta.training.finish.write_json", full)
        with pytest.raises(Stopped, match=r"cannot write the result .*No space left.*--resume") as stopped:
            train(config, resume=True)
    assert stopped.value.exit_status == 74
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not (tmp_path / "run" / "adapter").exists()
    assert train(config, resume=True).history == whole.history


def test_one_process_works_in_a_folder(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(config)
    with held_by_another(tmp_path / "run") as other:
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(InputError, match="another process works in"):
                train(config, **options)
        with pytest.raises(InputError, match="another process writes to"):
            load_run(tmp_path / "run", cpu=True)
        other.kill()
    load_run(tmp_path / "run", cpu=True)
    assert train(config, resume=True).seed == 0
