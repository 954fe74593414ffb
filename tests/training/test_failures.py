"""A run that fails says why in its folder, and `loretta runs` says so until the run is tried again."""

import json
import os
import signal
import sys

import pytest
from commands import assert_refused, call
from interrupts import held_by_another, poisoned, stopping_behind
from training_data import config_for

from loretta.errors import InputError, OutOfMemory, Stopped
from loretta.owned import find_foreign
from loretta.studies.state import folder_state
from loretta.training.model import load_base, wrap
from loretta.training.run import print_line, train
from loretta.training.trainer import TwoRateTrainer

OPTIONS = {"epochs": 1, "eval_steps": 5}


def failing(monkeypatch, error, step=7):
    """Raise ``error`` once, in one step of a training."""
    original, left = TwoRateTrainer.training_step, [error]

    def fail(self, *args, **kwargs):
        if self.state.global_step == step - 1 and left:
            raise left.pop()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TwoRateTrainer, "training_step", fail)


def test_a_run_that_failed_is_no_killed_one_and_goes_on(bert, reviews, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    config = config_for(bert, reviews, folder, **OPTIONS)
    failing(monkeypatch, RuntimeError("a \x1b[31mred\nreason"))
    with pytest.raises(RuntimeError):
        train(config)
    status, out, _ = call(capsys, "runs", "ls", tmp_path)
    assert status == 0
    assert "failed   RuntimeError: a \\x1b[31mred reason" in out
    assert out.splitlines()[-2:] == ["1 failed", f"go on: loretta train --resume {folder}"]
    assert f"{folder}: failed: RuntimeError: a" in call(capsys, "runs", "show", folder)[1]
    assert "fail(self" not in out
    assert "in fail" in json.loads((folder / "error.json").read_text())["traceback"]
    train(config, resume=True)
    assert folder_state(folder) == ("finished", "")
    assert not (folder / "error.json").exists()


def test_a_run_that_failed_may_be_replaced(bert, reviews, tmp_path, monkeypatch):
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS)
    failing(monkeypatch, RuntimeError("no"))
    with pytest.raises(RuntimeError):
        train(config)
    assert find_foreign(tmp_path / "run") == []
    train(config, overwrite=True)
    assert folder_state(tmp_path / "run") == ("finished", "")


def test_losses_that_are_no_numbers_and_memory_that_is_used_up_are_reasons(bert, reviews, tmp_path, monkeypatch):
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS)
    poisoned(monkeypatch, 7)
    with pytest.raises(Stopped, match="not finite"):
        train(config)
    state, reason = folder_state(tmp_path / "run")
    assert state == "failed"
    assert "not finite at step 7" in reason
    failing(monkeypatch, MemoryError())
    with pytest.raises(OutOfMemory) as ended:
        train(config, resume=True)
    assert folder_state(tmp_path / "run") == ("failed", str(ended.value))
    assert "lower --batch-size" in str(ended.value)


def test_a_signal_is_no_failure(bert, reviews, tmp_path):
    with stopping_behind(7, signal.SIGTERM), pytest.raises(Stopped):
        train(config_for(bert, reviews, tmp_path / "run", **OPTIONS))
    assert folder_state(tmp_path / "run")[0] == "killed"


def test_what_is_refused_leaves_the_run_that_stands_there_alone(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS)
    train(config)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(InputError, match="already holds a run"):
        train(config)
    assert not (tmp_path / "run" / "error.json").exists()


def test_a_run_that_another_process_carries_out_is_running(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"model": "m", "data": "d", "method": "rep"}')
    with held_by_another(folder) as other:
        assert folder_state(folder) == ("running", "in another process")
        other.kill()
    assert folder_state(folder)[0] == "killed"


def test_a_folder_without_a_finished_run_says_what_it_is(bert, reviews, tmp_path, capsys):
    config = config_for(bert, reviews, tmp_path / "runs" / "a run", **OPTIONS)
    with stopping_behind(7, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    status, _, err = call(capsys, "predict", tmp_path / "runs" / "a run", "--text", "a")
    mend = f"go on with loretta train --resume '{tmp_path / 'runs' / 'a run'}'"
    assert_refused(status, err, ["is not finished", mend])
    train(config, resume=True)
    status, _, err = call(capsys, "eval", tmp_path / "runs")
    assert_refused(status, err, ["no run.json", "folders of runs, such as", "a run'"])
    status, _, err = call(capsys, "eval", tmp_path / "runs" / "arun")
    assert_refused(status, err, ["there is no folder", "did you mean 'a run'?"])
    status, _, err = call(capsys, "eval", reviews)  # a file, which was told to be meant itself
    assert_refused(status, err, ["is a file and no folder"])
    assert "did you mean" not in err


def test_a_run_goes_on_when_nobody_reads_what_it_says(monkeypatch):
    """As behind `| head`, which ends with the first lines."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        print_line("first")
        print_line("second")


@pytest.mark.parametrize(("kind", "head_policy"), [("chat", "method"), ("classification", "frozen")])
def test_a_method_that_trains_nothing_is_refused(kind, head_policy, bert, llama):
    """Its first step was a RuntimeError of torch, or none at all where the inputs have gradients (checkpointing)."""
    base = load_base(llama if kind == "chat" else bert, kind, label_names=("neg", "pos"))
    with pytest.raises(InputError, match="method 'head' with these options trains nothing of this model"):
        wrap(base, "head", kind, {}, head_policy)
