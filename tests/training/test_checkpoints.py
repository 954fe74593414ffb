"""Checkpoints to go on from, where some are damaged."""

import shutil
import signal

import pytest
from interrupts import stopping_behind
from training_data import config_for

from loretta.errors import Stopped
from loretta.owned import LIST
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
