"""What the command line prints in one sentence."""

from functools import partial
from typing import Any


class InputError(ValueError):
    """Bad input, refused at the door.

    The message is one sentence that quotes what was given and names the mend; the command line prints it
    and exits with status 2.
    """


class NotRecorded(InputError):
    """A step that spoiled its recording as a CUDA graph, so that the training has to begin again without."""


class Stopped(KeyboardInterrupt):
    """A run that ended before its end and can go on.

    It is a KeyboardInterrupt so that no library takes it for a fault of its own. The message is one sentence; the
    command line prints it and exits with ``exit_status``.
    """

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status

    def __reduce__(self) -> tuple[Any, ...]:
        # the copy that another process gets is made with the keyword too
        return partial(Stopped, exit_status=self.exit_status), self.args


class OutOfMemory(Stopped):
    """The memory is too small for what was asked."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_status=71)  # EX_OSERR of sysexits.h
