"""What comes in the middle of a training: signals, losses that are NaN, another process in the folder."""

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock
from transformers import TrainerCallback

from loretta.training import run as running
from loretta.training.arguments import make_trainer
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


@contextlib.contextmanager
def interrupted_at_epoch(epoch):
    """Interrupt trainings in the block, as Ctrl-C does, when that epoch begins."""

    class Interrupt(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch >= epoch:
                raise KeyboardInterrupt

    def interrupting(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(Interrupt())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "make_trainer", interrupting)
        yield


HOLDING = """
import contextlib, pathlib, sys
from loretta.locks import hold, hold_file
with contextlib.ExitStack() as stack:
    for place in map(pathlib.Path, sys.argv[1:]):
        stack.enter_context((hold_file if place.suffix else hold)(place))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(*places) -> Iterator[subprocess.Popen]:
    """A process that holds some places, files where their names have an ending, until it is killed."""
    command, acquire = [sys.executable, "-c", HOLDING, *map(str, places)], FileLock.acquire
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout.readline() == b"held\n"
        # it outlasts each second that a lock is waited for
        patch.setattr(FileLock, "acquire", lambda self, timeout=None, **more: acquire(self, timeout=0, **more))
        yield process


def poisoned(monkeypatch, *steps, times=1):
    """Make the loss of the given steps NaN, and with it the gradients, for the first ``times`` that each is trained."""
    original, left = TwoRateTrainer.compute_loss, dict.fromkeys(steps, times)

    def poison(self, model, *args, **kwargs):
        loss, step = original(self, model, *args, **kwargs), self.state.global_step + 1
        if torch.is_grad_enabled() and left.get(step):
            left[step] -= 1
            return loss * math.nan
        return loss

    monkeypatch.setattr(TwoRateTrainer, "compute_loss", poison)
