"""Signals in the middle of a training, and processes that hold what a command wants."""

import contextlib
import os
import subprocess
import sys

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


HOLDING = """
import contextlib, pathlib, sys
from loretta.locks import hold, hold_file
with contextlib.ExitStack() as stack:
    for place in map(pathlib.Path, sys.argv[1:]):
        stack.enter_context((hold_file if place.suffix else hold)(place))
    print("held", flush=True)
    sys.stdin.read()
"""


def held_by_another(*places) -> subprocess.Popen:
    """A process that holds some places, files where their names have an ending, until it is killed."""
    command = [sys.executable, "-c", HOLDING, *map(str, places)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process
