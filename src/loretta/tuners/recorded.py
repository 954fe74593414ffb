"""The joint contraction of an eager step as two CUDA graphs, one forward and one backward.

It is some sixty small kernels, whatever the batch, and a CPU needs longer to launch them than a GPU to run them. A
recording is one launch. What goes in is copied in and what comes out is copied out, in both passes, and the backward
pass computes the forward pass again from what was handed over then: so a result belongs to its call alone, whoever
calls in between, from which thread, and whatever has become of the cores.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from loretta.layers import fused

logger = logging.getLogger(__name__)

Work = Callable[[], tuple[Tensor, ...]]


class Function(Protocol):
    """What can be recorded: the same operations in each call. ``sizes`` says what the tensors belong to."""

    sizes: list[int]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


PATIENCE = 2  # calls that are not recorded first: a model that is called once is not worth a recording
# A recording holds about six times what comes out of it. A model with more waits less for its CPU.
MOST_BYTES = 2**23


def serves(tensor: Tensor) -> bool:
    """Whether a contraction on the device of ``tensor`` may be recorded now: in an eager call on the default stream."""
    if not tensor.is_cuda or fused.in_graph() or tensor.device.index != torch.cuda.current_device():
        return False
    return torch.autograd.forward_ad._current_level < 0


def record(work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Record ``work``. Returns its tensors, and the function that fills them. RuntimeError where it cannot be."""
    with _recording:
        graph, (aside, capturing) = torch.cuda.CUDAGraph(), _streams(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()  # libraries make themselves ready
        torch.cuda.current_stream().wait_stream(aside)
        # thread_local: a thread of the data loader may allocate pinned memory meanwhile
        with uncollected(), torch.cuda.graph(graph, stream=capturing, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage: an old recording that is destroyed while a new one is made spoils the new one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


_recording = threading.Lock()


@cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """One to get ready on and one to record on, for all recordings of a device.

    cuBLAS keeps a workspace of up to 32 MiB for each stream, and a graph goes on to use that of its stream. On a stream
    that only records it lies in memory of graphs: torch may clear all workspaces (compiling with "reduce-overhead"
    does), and no other tensor then takes that place.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Graph:
    """A function of tensors as one CUDA graph, which computes between tensors of its own."""

    def __init__(self, function: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        self.lock = threading.Lock()
        self.inputs = [torch.empty_like(each).copy_(each.detach()) for each in inputs]
        self.outputs, self.replay = record(lambda: function(self.inputs))

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the function gives for ``inputs``, in tensors of the caller's."""
        with self.lock, torch.no_grad():
            _copy(inputs, self.inputs)
            self.replay()
            outputs = tuple(torch.empty_like(output) for output in self.outputs)
            _copy(self.outputs, outputs)
        return outputs


def _copy(tensors: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """One launch for all tensors of a dtype, where a copy of each would be one for each."""
    for dtype in {tensor.dtype: None for tensor in into}:
        to, given = zip(*(pair for pair in zip(into, tensors, strict=True) if pair[0].dtype == dtype), strict=True)
        torch._foreach_copy_(to, given)


class Recording:
    """A differentiable function of tensors like ``inputs``, recorded; with ``trains`` it has gradients."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], *, trains: bool) -> None:
        self.function = function
        self.wanted = [k for k, each in enumerate(inputs) if trains and each.requires_grad]
        # not as parts of the graph that the call builds, nor as tensors of inference mode
        with torch.inference_mode(False), torch.enable_grad(), fused.for_eager_steps():
            with torch.no_grad():
                self.forward = Graph(function, inputs)
            if self.wanted:
                outputs = function(self._leaves(self.forward.inputs))
                self.trained = [k for k, output in enumerate(outputs) if output.requires_grad]
                grads = [torch.zeros_like(outputs[k]) for k in self.trained]
                self.backward = Graph(self._recorded_gradients, [*self.forward.inputs, *grads])

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The function of ``inputs``, in tensors of its own."""
        if self.wanted and torch.is_grad_enabled():
            return _Recorded.apply(self, *inputs)
        return self.forward(inputs)

    def gradients(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Of the inputs that are wanted, computed and not replayed. ``grads`` are those of the outputs that train."""
        outputs = self.function(inputs)
        wanted = [inputs[k] for k in self.wanted]
        return torch.autograd.grad([outputs[k] for k in self.trained], wanted, grads, create_graph=create_graph)

    def _recorded_gradients(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        split = len(tensors) - len(self.trained)
        return self.gradients(self._leaves(tensors[:split]), tensors[split:])

    def _leaves(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [each.detach().requires_grad_(k in self.wanted) for k, each in enumerate(inputs)]


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.save_for_backward(*inputs)
        outputs = recording.forward(inputs)
        ctx.mark_non_differentiable(*(output for k, output in enumerate(outputs) if k not in recording.trained))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recording, inputs = ctx.recording, ctx.saved_tensors
        trained = [grads[k] for k in recording.trained]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            with fused.for_eager_steps():
                found = recording.gradients(inputs, trained, create_graph=True)
        else:
            found = recording.backward([*inputs, *trained])
        by_input = dict(zip(recording.wanted, found, strict=True))
        return None, *(by_input.get(k) for k in range(len(inputs)))


class Recordings:
    """The recordings of one model, by what was active when they were made."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], int | Recording | None] = {}

    def of(self, key: tuple[Any, ...], function: Function, inputs: Sequence[Tensor]) -> Recording | None:
        """The one with this key; None in the first calls, and where it failed.

        The key is all that the function depends on besides its inputs; its first part holds the groups of the model.
        """
        trains = torch.is_grad_enabled()
        kinds = tuple((each.shape, each.dtype, each.device, each.requires_grad) for each in inputs)
        key = (*key, trains, kinds)
        found = self.known.get(key, 0)
        if isinstance(found, int) and torch._C._current_graph_task_id() == -1:  # none begins in a backward pass
            self.known = {old: value for old, value in self.known.items() if old[0] == key[0]}
            self.known[key] = found + 1
            if found < PATIENCE:
                return None
            self.known[key] = found = _recorded(function, inputs, trains=trains)
        return found if isinstance(found, Recording) else None


def _recorded(function: Function, inputs: Sequence[Tensor], *, trains: bool) -> Recording | None:
    with torch.no_grad():
        if sum(output.nbytes for output in function(inputs)) > MOST_BYTES:
            return None
    try:
        return Recording(function, inputs, trains=trains)
    except RuntimeError as error:
        logger.debug("the contraction is not recorded: %s", error)
        return None
