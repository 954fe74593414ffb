"""The calls of models that are running, and the factors that they hold for the layers below them.

A call belongs to the thread and to the frame that made it. So a later call never takes over factors that were left by
another thread, by an error, or by Ctrl-C in the middle of a call.
"""

import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy

Factors = tuple[Tensor, ...]
Pair = tuple[nn.Module, str, int]  # a layer, an adapter, and which of its pairs of trains

NO_BACKWARD = -1  # torch's number for a thread that runs no backward pass


class Call:
    """One call of a model: the factors that its layers will ask for."""

    __slots__ = ("backward", "factors", "frame", "has_graph")

    def __init__(self, frame: FrameType | None, factors: Mapping[Pair, Factors], *, has_graph: bool) -> None:
        self.frame, self.factors, self.has_graph = frame, factors, has_graph
        self.backward = current_backward()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []


_thread = _Thread()
# Dynamo traces no thread-local values. A hook that begins a call is traced together with the layers below or not at
# all (:func:`traced_as_a_part`), so this list is empty outside a trace.
_traced: list[Call] = []


def traced_as_a_part(hook: Any) -> Any:
    """Have Dynamo trace ``hook`` within its model's graph, and not on its own.

    Otherwise Dynamo compiles each hook by itself after a graph break in the model, and other threads would find the
    traced call that the first hook left.
    """
    set_code_exec_strategy(hook.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))
    return hook


def remove_hooks(model: nn.Module, owner: type) -> None:
    """Remove the forward hooks of ``model`` that are methods of an ``owner``."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), owner)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def current_backward() -> int:
    """The number of the backward pass that this thread works on. No two passes of a process have the same."""
    return NO_BACKWARD if torch.compiler.is_dynamo_compiling() else torch._C._current_graph_task_id()


def enter(factors: Mapping[Pair, Factors], *, has_graph: bool) -> None:
    """Begin a call. For pre-forward hooks alone: the frame of the hook's caller is the frame of the call."""
    if torch.compiler.is_dynamo_compiling():
        _traced.append(Call(None, factors, has_graph=has_graph))
        return
    _thread.calls = [call for call in _thread.calls if _depth_of(call.frame) is not None]  # drop those of a Ctrl-C
    _thread.calls.append(Call(sys._getframe(2), factors, has_graph=has_graph))


def leave() -> None:
    """End a call, also one that failed. For the forward hook of the same model alone."""
    if torch.compiler.is_dynamo_compiling():
        if _traced:
            _traced.pop()
        return
    frame = sys._getframe(2)
    while _thread.calls and (_thread.calls[-1].frame is frame or _depth_of(_thread.calls[-1].frame) is None):
        _thread.calls.pop()


def factors_in_call(layer: Any, adapter_name: str, pair: int) -> Factors | None:
    """The running call's factors for one pair of trains of ``layer``; None where the layer must contract them itself.

    It must where gradients are needed within a call that began without them, and where a checkpointed block is computed
    again.
    """
    traced = torch.compiler.is_dynamo_compiling()
    running = _traced if traced else _thread.calls
    if not running:
        return None
    call = running[-1]
    if torch.is_grad_enabled() and not call.has_graph:
        return None
    if not traced:
        # inlined, because every layer of every call comes here
        if call.backward != torch._C._current_graph_task_id():
            return None
        try:
            # a layer lies equally deep below its model in every call: looking there first spares a walk
            is_below = sys._getframe(layer.depth) is call.frame
        except ValueError:  # not that many
            is_below = False
        if not is_below:
            depth = _depth_of(call.frame)
            if depth is None:
                return None
            layer.depth = depth
    return call.factors.get((layer, adapter_name, pair))


def _depth_of(frame: FrameType | None) -> int | None:
    """How many steps ``frame`` lies below the caller's frame; None if it has ended."""
    depth, below = 0, sys._getframe(1)
    while below is not frame:
        if below.f_back is None:
            return None
        depth, below = depth + 1, below.f_back
    return depth


def is_recomputed() -> bool:
    """Whether this is the second pass of a non-reentrant checkpoint: only its numbers are used."""
    if torch.compiler.is_dynamo_compiling() or current_backward() == NO_BACKWARD:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in hooks[0].__qualname__


def is_recorded() -> bool:
    """Whether operations are being recorded for replays with other numbers: a recording must contain contractions."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, export, fake tensors
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def hidden_from_checkpoints() -> AbstractContextManager:
    """Within it, autograd saves tensors past a surrounding checkpoint, which does not count them.

    So a checkpointed block may contract its trains in one of its two passes and find the factors in the other.
    """
    if torch.compiler.is_dynamo_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, tensor._version), _unless_written_to)


def _unless_written_to(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:  # autograd itself does not look behind hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"cores at version {tensor._version}, expected version {version}"
        )
    return tensor
