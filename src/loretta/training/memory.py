"""Memory that is too small for a run, in one sentence with what helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from loretta.errors import Stopped
from loretta.training.config import RunConfig

STATUS = 71  # EX_OSERR of sysexits.h


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an accelerator's memory, or the process's, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


@contextmanager
def saying_what_helps(config: RunConfig) -> Iterator[None]:
    """Raise Stopped in place of the error of a run whose memory is used up."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
    else:
        return
    # outside of the exception, which holds on to what the step had allocated
    raise Stopped(
        f"the memory is too small for {config.batch_size} examples of up to {config.max_length} tokens at once "
        f"({reason}): lower --batch-size and raise --accumulate as much (--auto-batch does both), lower --max-length "
        "or --eval-batch-size, or give --gradient-checkpointing",
        exit_status=STATUS,
    )
