"""SIGTERM and SIGINT: a run saves a checkpoint at the end of its step, says how to go on, and ends."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from loretta.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopAtSignal(TrainerCallback):
    """Ends the training behind the next checkpoint once a signal has come. A second signal ends it at once."""

    def __init__(self, stage: str, again: str) -> None:
        self.stage, self.again = stage, again
        self.received: int | None = None
        self.trains = False
        self.process = os.getpid()

    def take(self, number: int, frame: Any) -> None:
        """The handler of the signals."""
        if self.process != os.getpid():  # a worker that loads data
            return
        again, self.received = self.received is not None, number
        if again or not self.trains:
            raise self.stopped(self.stage)
        print(f"loretta: {signal.Signals(number).name}: saving a checkpoint first", file=sys.stderr, flush=True)

    def stopped(self, where: str) -> Stopped:
        """The end of the run, in words."""
        number = self.received or signal.SIGINT
        name = signal.Signals(number).name
        return Stopped(f"stopped by {name} {where}: go on with {self.again}", exit_status=128 + number)

    def begin(self) -> None:
        """From now on a signal is answered behind the step."""
        self.trains, self.stage = True, "in the middle of a step"

    def end(self) -> None:
        """The last step is done. Raises Stopped where a signal came in it."""
        self.trains, self.stage = False, "behind its last step"
        if self.received is not None:
            raise self.stopped(self.stage)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.begin()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.end()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        # an epoch that ends here is evaluated and saved in a moment; saved before that, it would not be evaluated
        ends = args.save_strategy == SaveStrategy.EPOCH and (
            float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        )
        if self.received is not None and not ends:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.received is not None:
            raise self.stopped(f"behind step {state.global_step} of {state.max_steps}, which is saved")


@contextmanager
def stopping_at_signals(
    stage: str = "before its first step", again: str = "the same command and --resume"
) -> Iterator[StopAtSignal]:
    """Handle the signals as :class:`StopAtSignal` says, where this is the thread that may, until the block ends.

    ``stage`` are the words for where it stands, and ``again`` for how to go on.
    """
    stop = StopAtSignal(stage, again)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.take) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
