"""Memory that is too small, in one sentence with what helps."""

import ctypes
import errno
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    # Accelerate looks for words in the first argument, which is a number where a process exits
    return (
        isinstance(error, Exception)
        and isinstance(next(iter(error.args), None), str)
        and should_reduce_batch_size(error)
    )


def free_memory() -> int:
    """Release what nothing refers to, and begin a new peak. Returns the accelerator's bytes that are still in use."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed, and the next peak would begin with it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # where the system has it, as Linux does
        Path("/proc/self/clear_refs").write_text("5")
    if not torch.cuda.is_initialized():  # runs on the CPU need not take memory of a GPU for its context
        return 0
    # torch keeps one for each stream and thread, 32 MiB on an H100, also those of the streams of recorded steps
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory() -> int:
    """Peak bytes so far: of the accelerator's allocator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, IndexError):
        # getrusage's peak counts that of the process that started this one, and cannot begin anew
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
