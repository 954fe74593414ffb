"""Signals that come in the middle of a training."""

import contextlib
import os

import pytest

from loretta.training.trainer import TwoRateTrainer


@contextlib.contextmanager
def stopping_behind(step, number):
    """Send the signal to this process in the given step of a training."""
    original, sent = TwoRateTrainer.training_step, []

    def sending(self, *args, **kwargs):
        if self.state.global_step == step - 1 and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoRateTrainer, "training_step", sending)
        yield
