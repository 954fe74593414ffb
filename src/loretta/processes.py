"""Several processes that train one model (``torchrun``, ``accelerate launch``): who speaks, and how they agree.

:func:`by_first`, :func:`together`, :func:`gather`, :func:`largest` and :func:`in_any` are collectives: all processes
have to come to them, in the same order.
"""

import importlib.util
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from loretta.errors import InputError, Stopped

T = TypeVar("T")

FSDP = "ACCELERATE_USE_FSDP"  # as ``accelerate launch --use_fsdp`` sets it
_FIRST_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # the first process alone reads the weights
# the variables of `accelerate launch` for FSDP2; a run with --fsdp sets them itself
_FSDP2 = {
    FSDP: "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    _FIRST_LOADS: "true",
}
# as ``accelerate launch --use_deepspeed`` sets them, and what each of them needs
_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_MEGATRON_LM": "megatron"}
_PRECISION = "ACCELERATE_MIXED_PRECISION"  # as ``accelerate launch --mixed_precision`` sets it
_COUNTS_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MEETINGS = itertools.count()
# how gloo, NCCL and the launcher's store say that nobody is there any more
_GONE = re.compile("(closed|reset) by peer|broken pipe|remote process exited|likely closed", re.IGNORECASE)


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process speaks and writes for all that train together."""
    return rank() == 0


def leave_it_to_the_first() -> None:
    """Wait for the launcher to end this process, where it fails; return in the first one, and where no other failed.

    All processes mostly fail alike. The launcher ends the others as soon as one is gone, which has to be the one that
    speaks.
    """
    if not is_first():
        time.sleep(10)


def is_sharded() -> bool:
    """Whether FSDP shares out the weights."""
    return count() > 1 and _is_asked(FSDP)


def _is_asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def refuse_uncounted() -> None:
    """Raise InputError where a launcher was asked for several processes that would not train together.

    ``accelerate launch`` starts one process on a CPU, whatever ``--num_processes`` says, and leaves the address at
    which several would have met; those of ``mpirun`` would each train a run of its own.
    """
    if "WORLD_SIZE" in os.environ:
        return
    alone = _PRECISION in os.environ and "MASTER_ADDR" in os.environ
    what = "accelerate launch started one process where several were asked for, as it does on a CPU" if alone else None
    for variable in _COUNTS_OF_MPI:
        if os.environ.get(variable, "1") != "1":
            what = f"{variable}={os.environ[variable]} of mpirun is of processes that would each train alone"
    if what is not None:
        raise InputError(f"{what}: start them with torchrun --nproc-per-node N -m loretta, or one without a launcher")


def refuse_missing_engine() -> None:
    """Raise InputError where the launcher asks for DeepSpeed or Megatron and it is not installed."""
    for variable, package in _ENGINES.items():
        if _is_asked(variable) and importlib.util.find_spec(package) is None:
            raise InputError(
                f"{variable} asks for the package {package}, which is not installed: install it, or leave it out of "
                "the command or config of accelerate launch"
            )


def refuse_other_precision(*, bf16: bool) -> None:
    """Raise InputError where the launcher asks for a mixed precision that the run has not.

    The Trainer would compute in it, and the run's scores would be of another precision than its record says.
    """
    asked = os.environ.get(_PRECISION, "no")
    if asked != "no" and not (asked == "bf16" and bf16):
        raise InputError(
            f"{_PRECISION}={asked} of the launcher is no option of the run: give --bf16 for bfloat16, and leave mixed "
            "precision out of the command or config of accelerate launch"
        )


def load_in_each() -> None:
    """Have every process read the weights of the base, also where they are shared out, until the run ends.

    Accelerate cannot hand on what the first one has read where a model keeps buffers with its weights.
    """
    os.environ[_FIRST_LOADS] = "false"


@contextmanager
def missing_others() -> Iterator[None]:
    """Raise Stopped where another process of the run is gone, for which collectives fail in torch's words.

    In all but the first process that is later, as of any error that the launcher ends them for.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not _GONE.search(str(error)):
            raise
        leave_it_to_the_first()
        raise Stopped(
            "another process of the run is gone, of which the launcher says more (signal 9: killed, often for lack of "
            "memory): go on with the same command and --resume",
            exit_status=70,  # EX_SOFTWARE of sysexits.h
        ) from error


@contextmanager
def joined(*, cpu: bool = False, fsdp: bool = False) -> Iterator[None]:
    """Let the processes of a launcher talk to each other until the block ends; of one process nothing changes.

    Raises InputError where ``fsdp`` is asked of one process, FSDP 1 of any, an engine that is not installed, or several
    processes that a launcher has not counted.
    """
    refuse_missing_engine()
    refuse_uncounted()
    if count() == 1:
        if fsdp:
            raise InputError(
                "fsdp shares a model out over several processes, and this is one: start it with torchrun "
                "--nproc-per-node N -m loretta, or leave fsdp out"
            )
        yield
        return
    import torch
    import torch.distributed as dist

    before = {name: os.environ.get(name) for name in _FSDP2}
    try:
        if fsdp:
            os.environ |= {name: value for name, value in _FSDP2.items() if before[name] is None}
        if is_sharded() and os.environ.get("FSDP_VERSION") != "2":
            raise InputError(
                f"FSDP_VERSION={os.environ.get('FSDP_VERSION', '1')!r}: runs are sharded by FSDP2 alone, give "
                "accelerate launch --fsdp_version 2, or torchrun and --fsdp"
            )
        is_ours = not dist.is_initialized()
        if is_ours:
            on_gpu = torch.cuda.is_available() and not cpu
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # gloo besides NCCL: what is agreed on between steps makes no GPU wait
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            store, own, size = next(dist.rendezvous("env://"))
            # the launcher's store still has the addresses of an earlier run in these processes
            store = dist.PrefixStore(f"meeting {next(_MEETINGS)}", store)
            dist.init_process_group(backend, store=store, rank=own, world_size=size)
        with missing_others():
            yield
        if is_ours:  # a process that failed leaves without the others
            dist.destroy_process_group()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def by_first(call: Callable[[], T]) -> T:
    """What ``call`` returns, or raises, in the first process, for all of them."""
    if count() == 1:
        return call()
    import torch.distributed as dist

    found: list[Any] = [None, None]
    if is_first():
        try:
            found[0] = call()
        except (Exception, Stopped) as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def together(call: Callable[[], T]) -> T:
    """What ``call`` returns in this process; where it fails in one of them, all raise the error of the first such.

    That is for errors that are one sentence. Any other one ends its process, and the launcher ends the rest.
    """
    if count() == 1:
        return call()
    value, error = None, None
    try:
        value = call()
    except (InputError, Stopped) as failure:
        error = failure
    for found in gather(error):
        if found is not None:
            raise found
    return value  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def largest(*values: int) -> list[int]:
    """The largest of each number among all processes."""
    if count() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    numbers = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def in_any(flag: bool) -> bool:
    """Whether ``flag`` is true in one process at least."""
    return bool(largest(int(flag))[0])
