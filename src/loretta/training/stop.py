"""SIGTERM and SIGINT: a run saves a checkpoint at the end of its step, says how to go on, and ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from loretta import processes
from loretta.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BETWEEN, MOST_STEPS = 0.5, 100  # seconds between two agreements of the processes, and steps at most
ONE_STROKE = 5.0  # seconds


class StopAtSignal(TrainerCallback):
    """Ends the training behind the next checkpoint once a signal has come. A second signal ends it at once.

    Several processes agree on the step, now and then: a signal reaches them at different moments, or one alone.
    """

    def __init__(self, stage: str, again: str) -> None:
        self.stage, self.again = stage, again
        self.received: int | None = None
        self.came = 0.0
        # several processes: the signal that all of them know, and the time and the step of their last exchange
        self.agreed: int | None = None
        self.asked_at, self.asked_behind, self.ask_behind = 0.0, 0, 0
        self.trains = False
        self.process = os.getpid()

    def take(self, number: int, frame: Any) -> None:
        """The handler of the signals."""
        if self.process != os.getpid():  # a worker that loads data
            return
        # a terminal and a launcher send one each, for the same stroke of a key
        again = self.received is not None and (processes.count() == 1 or time.monotonic() - self.came > ONE_STROKE)
        if self.received is None:
            self.received, self.came = number, time.monotonic()
        if again or not self.trains:
            raise self.stopped(self.stage)
        if processes.is_first():
            print(f"loretta: {signal.Signals(number).name}: saving a checkpoint first", file=sys.stderr, flush=True)

    def stopped(self, where: str) -> Stopped:
        """The end of the run, in words."""
        number = self.agreed or self.received or signal.SIGINT
        name = signal.Signals(number).name
        return Stopped(f"stopped by {name} {where}: go on with {self.again}", exit_status=128 + number)

    def begin(self) -> None:
        """From now on a signal is answered behind the step."""
        self.trains, self.stage = True, "in the middle of a step"
        self.asked_behind = self.ask_behind = 0

    def end(self) -> None:
        """The last step is done. Raises Stopped where a signal came in it."""
        self.trains, self.stage = False, "behind its last step"
        (received,) = processes.largest(self.received or 0)
        if received:
            self.agreed = received
            raise self.stopped(self.stage)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.begin()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.end()

    def _agree(self, step: int) -> None:
        """Tell all processes of a signal that one of them got, and agree on the step behind which they ask next."""
        if processes.count() == 1:
            self.agreed = self.received
        elif step >= self.ask_behind:
            wait, now = 1, time.monotonic()
            if processes.is_first() and self.asked_behind:  # its clock counts
                each = (now - self.asked_at) / max(1, step - self.asked_behind)
                wait = max(1, min(MOST_STEPS, int(BETWEEN / max(each, 1e-6))))
            received, self.ask_behind = processes.largest(self.received or 0, step + wait)
            self.agreed, self.asked_at, self.asked_behind = received or None, now, step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._agree(state.global_step)
        # the Trainer evaluates and saves at the end of an epoch; a save here would come before that evaluation
        ends = args.save_strategy == SaveStrategy.EPOCH and (
            float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        )
        if self.agreed is not None and not ends:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if processes.count() == 1:  # it may have come in the evaluation
            self.agreed = self.received
        if self.agreed is not None:
            raise self.stopped(f"behind step {state.global_step} of {state.max_steps}, which is saved")


@contextmanager
def stopping_at_signals(stage: str = "before its first step", again: str | None = None) -> Iterator[StopAtSignal]:
    """Handle the signals as :class:`StopAtSignal` says, where this is the thread that may, until the block ends.

    ``stage`` are the words for where it stands, and ``again`` for how to go on; default: those of the block around it,
    as of a study that trains in its own process.
    """
    around = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    outer = around.again if isinstance(around, StopAtSignal) else "the same command and --resume"
    stop = StopAtSignal(stage, again or outer)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.take) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
