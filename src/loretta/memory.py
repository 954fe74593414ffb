"""Memory that is too small, in one sentence with what helps."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from loretta.errors import OutOfMemory
from loretta.wording import one_line


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an accelerator's memory, or the process's, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Accelerate looks for words in the first argument, which of an exit is its status
    return (
        isinstance(error, Exception)
        and isinstance(next(iter(error.args), None), str)
        and should_reduce_batch_size(error)
    )


@contextmanager
def saying_what_helps(needed: str, mend: str) -> Iterator[None]:
    """Raise OutOfMemory in place of the error that says that the memory is used up.

    The sentence names what ``needed`` the memory, and the ``mend``.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error).partition(". ")[0] or type(error).__name__
    else:
        return
    # outside of the exception, which holds on to what the step had allocated
    raise OutOfMemory(f"the memory is too small for {needed} ({reason}): {mend}")
