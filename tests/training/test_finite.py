"""Losses and gradients that are no numbers: what ``on_nan`` "rollback" does about them."""

import math
import signal

import numpy as np
import pytest
import torch
from interrupts import poisoned, stopping_behind
from safetensors.torch import load_file
from training_data import config_for, sentences
from transformers import AutoModel, AutoTokenizer

from loretta.errors import Stopped
from loretta.owned import describe, write_list
from loretta.tasks import load_task
from loretta.training.run import train
from loretta.training.scores import score_logits
from loretta.training.trainer import TwoRateTrainer


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(folder, record, other, expected):
    assert record.history == expected.history
    assert record.best_step == expected.best_step
    found, wanted = weights(folder), weights(other)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


OPTIONS = {"epochs": 1, "eval_steps": 5, "learning_rate": 1e-2, "head_learning_rate": 0.02}


def test_without_a_checkpoint_it_is_the_run_at_half_the_rates(bert, reviews, tmp_path, monkeypatch, caplog):
    halves = {"learning_rate": 5e-3, "head_learning_rate": 0.01}
    expected = train(config_for(bert, reviews, tmp_path / "half", **OPTIONS | halves))
    poisoned(monkeypatch, 3)
    record = train(config_for(bert, reviews, tmp_path / "run", **OPTIONS, on_nan="rollback"))
    assert_same(tmp_path / "run", record, tmp_path / "half", expected)
    assert "not finite at step 3, first in" in caplog.text
    assert "back to the last checkpoint, at half the learning rate (1 of at most 3 times)" in caplog.text
    assert record.notes[-1].startswith("not finite at step 3: each time the training went back")


def test_it_goes_on_from_the_last_checkpoint_and_a_kill_changes_nothing(bert, reviews, tmp_path, monkeypatch):
    """The same as by hand: stop at the checkpoint, halve the rates in its files, go on."""
    by_hand = config_for(bert, reviews, tmp_path / "by-hand", **OPTIONS)
    with stopping_behind(5, signal.SIGTERM), pytest.raises(Stopped):
        train(by_hand)
    checkpoint = tmp_path / "by-hand" / "checkpoints" / "checkpoint-5"
    optimizer, schedule = (torch.load(checkpoint / f"{name}.pt") for name in ("optimizer", "scheduler"))
    for group in optimizer["param_groups"]:
        group["lr"], group["initial_lr"] = group["lr"] / 2, group["initial_lr"] / 2
    schedule["base_lrs"] = [rate / 2 for rate in schedule["base_lrs"]]
    torch.save(optimizer, checkpoint / "optimizer.pt")
    torch.save(schedule, checkpoint / "scheduler.pt")
    write_list(checkpoint, describe(checkpoint))
    expected = train(by_hand, resume=True)

    poisoned(monkeypatch, 7)
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS, on_nan="rollback")
    record = train(config)
    assert_same(tmp_path / "run", record, tmp_path / "by-hand", expected)
    assert record.notes[-1].startswith("not finite at step 7: ")

    poisoned(monkeypatch, 7)
    config = config.model_copy(update={"output": str(tmp_path / "killed")})
    with stopping_behind(9, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    again = train(config, resume=True)
    assert_same(tmp_path / "killed", again, tmp_path / "by-hand", expected)
    assert again.notes == record.notes


def test_rollbacks_have_an_end(bert, reviews, tmp_path, monkeypatch):
    poisoned(monkeypatch, 7, times=100)
    with pytest.raises(Stopped, match=r"at step 7.*3 rollbacks \(at steps 7, 7, 7\) did not help.*checkpoint-5") as end:
        train(config_for(bert, reviews, tmp_path / "run", **OPTIONS, on_nan="rollback"))
    assert end.value.exit_status == 3
    assert all(
        tensor.isfinite().all() for file in tmp_path.rglob("*.safetensors") for tensor in load_file(file).values()
    )


def test_a_loss_that_is_not_finite_is_in_no_checkpoint_though_the_weights_are(bert, reviews, tmp_path, monkeypatch):
    """It would poison the mean of its line in the log, whatever comes after it."""
    original = TwoRateTrainer.training_step

    def spoil(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step + 1 == 4 else loss

    monkeypatch.setattr(TwoRateTrainer, "training_step", spoil)
    with pytest.raises(Stopped, match="at step 4"):
        train(config_for(bert, reviews, tmp_path / "run", **OPTIONS, logging_steps=100))
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_a_resumed_run_counts_its_patience_on(bert, reviews, tmp_path):
    options = {"epochs": 4, "eval_steps": 2, "learning_rate": 1e-12, "head_learning_rate": 1e-12, "patience": 3}
    whole = train(config_for(bert, reviews, tmp_path / "whole", **options))
    last = whole.history[-1].step
    assert last < 40, "it stopped early"
    for step in (last - 1, last):
        config = config_for(bert, reviews, tmp_path / f"cut-{step}", **options)
        with stopping_behind(step, signal.SIGTERM), pytest.raises(Stopped):
            train(config)
        assert train(config, resume=True).history == whole.history


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_model_that_diverged_has_no_score(kind, bad, tmp_path):
    """The largest of two NaN is the first, and half of the labels are the first class."""
    table = tmp_path / "own.csv"
    table.write_text("text,label\n" + "".join(f"{words},{k % 2}\n" for k, (words, _) in enumerate(sentences(20))))
    task = load_task(table, label="label", kind=kind)
    logits = np.zeros((4, 2 if kind == "classification" else 1))
    assert all(math.isfinite(value) for value in score_logits(task, logits, [0, 1, 0, 1]).values())
    logits[2, 0] = bad
    scores = score_logits(task, logits, [0, 1, 0, 1])
    assert set(scores) == set(task.metrics)
    assert all(math.isnan(value) for value in scores.values())


def test_a_run_that_is_nan_from_its_first_step_stops_and_saves_nothing(bert, reviews, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModel.from_pretrained(bert)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(bert).save_pretrained(broken)
    with pytest.raises(Stopped, match=r"not finite at step 1, first in '.*layer\.1\.output\.dense") as stopped:
        train(config_for(str(broken), reviews, tmp_path / "run", method="lora"))
    assert stopped.value.exit_status == 3
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("logging_steps", [4, 100])
def test_a_loss_that_becomes_nan_is_found_and_named_and_the_best_checkpoint_stays(
    logging_steps, bert, reviews, tmp_path, monkeypatch
):
    config = config_for(bert, reviews, tmp_path / "run", eval_steps=5, logging_steps=logging_steps)
    poisoned(monkeypatch, 7)
    with pytest.raises(Stopped, match=r"at step 7, first in '.*best checkpoint .*checkpoint-5'.*learning rate"):
        train(config)
    left = list((tmp_path / "run").rglob("*.safetensors"))
    assert left
    assert all(tensor.isfinite().all() for file in left for tensor in load_file(file).values())


def test_updates_that_are_not_finite_are_skipped_on_request(bert, reviews, tmp_path, monkeypatch):
    config = config_for(bert, reviews, tmp_path / "run", on_nan="skip", epochs=1)
    poisoned(monkeypatch, 3, 6)
    record = train(config)
    assert record.notes[-1] == "2 updates were skipped (the first at step 3): not finite"
    assert all(math.isfinite(point.values["loss"]) for point in record.history)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    poisoned(monkeypatch, *range(100))
    with pytest.raises(Stopped, match=r"at step 1.*all updates since then were skipped"):
        train(config.model_copy(update={"output": str(tmp_path / "all")}))
