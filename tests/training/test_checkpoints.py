"""Checkpoints to go on from: damaged ones, and those of versions that kept no lists of what they wrote."""

import json
import os
import shutil
import signal

import pytest
import torch
from interrupts import stopping_behind
from training_data import config_for

from loretta.errors import InputError, Stopped
from loretta.owned import LIST
from loretta.training.checkpoints import can_be_read
from loretta.training.run import train
from loretta.training.trainer import TwoRateTrainer

# three evaluations, with a checkpoint at each
OPTIONS = {"max_steps": 9, "eval_steps": 3, "select_by": "loss"}


@pytest.fixture(scope="module")
def whole(bert, reviews, tmp_path_factory):
    """The run that nobody stopped."""
    return train(config_for(bert, reviews, tmp_path_factory.mktemp("whole") / "run", **OPTIONS))


@pytest.fixture(scope="module")
def stopped(bert, reviews, tmp_path_factory):
    """The config of a run that was stopped behind its second evaluation, and a copy of its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    config = config_for(bert, reviews, folder / "cut", **OPTIONS)
    with stopping_behind(6, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    return config, shutil.copytree(folder / "cut", folder / "kept")


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "a file gone", "a list cut short"])
def test_a_damaged_checkpoint_is_set_aside_and_the_whole_one_before_it_taken(damage, whole, stopped, caplog):
    config, kept = stopped
    shutil.rmtree(config.folder)
    shutil.copytree(kept, config.folder)
    newest = config.folder / "checkpoints" / "checkpoint-6"
    file = newest / "optimizer.pt"
    content = file.read_bytes()
    if damage == "a flipped byte":
        file.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    elif damage == "cut short":
        file.write_bytes(content[:-10])
    elif damage == "a file gone":
        file.unlink()
    else:
        (newest / LIST).write_bytes((newest / LIST).read_bytes()[:-10])
    left = {path.name for path in newest.iterdir()}
    resumed = train(config, resume=True)
    assert resumed.history == whole.history
    assert "going on from step 3" in caplog.text
    assert "set aside as 'broken-checkpoint-6'" in caplog.text
    assert {path.name for path in newest.with_name("broken-checkpoint-6").iterdir()} == left


def test_a_folder_that_is_gone_is_one_sentence(bert, reviews, tmp_path, monkeypatch):
    """No later checkpoint makes it again, as the earlier ones are lost, and with them the best."""
    original = TwoRateTrainer.training_step

    def vanish(self, *args, **kwargs):
        if self.state.global_step == 4:
            shutil.rmtree(tmp_path / "run")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TwoRateTrainer, "training_step", vanish)
    with pytest.raises(Stopped, match=r"cannot write a checkpoint at step 6 .*No such file or directory") as stopped:
        train(config_for(bert, reviews, tmp_path / "run", **OPTIONS))
    assert stopped.value.exit_status == 74


def as_an_earlier_version(folder):
    """Make a run folder what it was before there were lists."""
    for file in [*folder.rglob(LIST), *folder.rglob(".loretta.lock")]:
        file.unlink()
    for file in folder.rglob("trainer_state.json"):
        state = json.loads(file.read_text())
        for name in ("LossWindow", "Stopwatch"):
            del state["stateful_callbacks"][name]
        file.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def earlier(bert, reviews, tmp_path_factory):
    """A run of an earlier version that was killed at step 6 of 9, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    with stopping_behind(6, signal.SIGTERM), pytest.raises(Stopped):
        train(config_for(bert, reviews, folder, **OPTIONS))
    as_an_earlier_version(folder)
    return folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_of_a_version_without_lists_goes_on_and_keeps_its_files(earlier, whole, bert, reviews, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(earlier, folder)
    (folder / "adapter").mkdir()  # as a kill left it, in the write of the result
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    before = content(folder)
    resumed = train(config_for(bert, reviews, folder, **OPTIONS), resume=True)
    assert resumed.history == whole.history
    assert "going on from step 6" in caplog.text
    after = content(folder)
    half = next(path for path in before if path.parts[0] == "adapter")
    assert after["broken-adapter" / half.relative_to("adapter")] == before.pop(half)
    assert {path: after[path] for path in before} == before
    # killed once more, as its result was moved to its place
    (folder / "run.json").unlink()
    assert train(config_for(bert, reviews, folder, **OPTIONS), resume=True).history == whole.history


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_checkpoint_without_a_list_must_open(name, earlier, tmp_path):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(earlier / "checkpoints" / "checkpoint-6", checkpoint)
    assert can_be_read(checkpoint)
    file = checkpoint / name
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[: len(whole) // 2], b"", None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        assert not can_be_read(checkpoint)
    file.write_bytes(whole)
    state = checkpoint / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-10])
    assert not can_be_read(checkpoint)


def test_a_half_written_checkpoint_of_an_earlier_version_is_set_aside(earlier, bert, reviews, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(earlier, folder)
    os.truncate(folder / "checkpoints" / "checkpoint-6" / "optimizer.pt", 900)
    train(config_for(bert, reviews, folder, **OPTIONS), resume=True)
    assert "going on from step 3" in caplog.text
    assert (folder / "checkpoints" / "broken-checkpoint-6").is_dir()


def test_an_optimizer_with_other_groups_of_parameters_is_one_sentence(bert, reviews, tmp_path):
    """An earlier version put what decays and what does not into one group, beside that of the final layer."""
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS, head_learning_rate=1e-2)
    with stopping_behind(6, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    as_an_earlier_version(tmp_path / "run")
    for file in (tmp_path / "run").rglob("optimizer.pt"):
        state = torch.load(file)
        first, *others = state["param_groups"]
        assert len(others) > 1
        state["param_groups"] = [{**first, "params": first["params"] + others[0]["params"]}, *others[1:]]
        torch.save(state, file)
    before = content(tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot go on from .*checkpoint-6' .*go on with that version"):
        train(config, resume=True)
    after = content(tmp_path / "run")
    assert {path: after.get(path) for path in before} == before
