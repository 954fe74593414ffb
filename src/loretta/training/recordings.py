"""Recordings as CUDA graphs, and the tensors that they read and write: batches, learning rates, gradients."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loretta.errors import NotRecorded
from loretta.tuners.recorded import uncollected
from loretta.wording import one_line

Work = Callable[[], tuple[Tensor, Tensor | None]]  # loss of a batch, and the norm of the gradients where it updates


class Recorder:
    """Records work as CUDA graphs, which share their memory: they are replayed one after the other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    @staticmethod
    @contextmanager
    def stream() -> Iterator[None]:
        """A stream beside the default one, of whose work nothing can be recorded; the one of an outer call, if any."""
        outer = torch.cuda.current_stream()
        if outer != torch.cuda.default_stream():
            yield
            return
        side = torch.cuda.Stream()
        side.wait_stream(outer)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            outer.wait_stream(side)

    def record(self, work: Work) -> Work:
        """Record ``work`` and compute nothing. Returns the function that computes, which fills the tensors of ``work``.

        Raises RuntimeError for work that needs a number from the GPU to go on, and NotRecorded for work that waits for
        the GPU without asking for one: the attempt to record that leaves no state to go on from.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        random = generator.clone_state()
        mode = torch.cuda.get_sync_debug_mode()
        try:
            # thread_local: a thread of the data loader may allocate pinned memory meanwhile
            captured = torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local")
            with uncollected(), captured:
                # an operation that would wait for the GPU raises before it spoils the recording
                with warnings.catch_warnings(action="ignore"):  # torch warns that it may miss a wait
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    result = work()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
        except RuntimeError as error:
            generator.graphsafe_set_state(random)  # the state of an unfinished recording refuses to go on
            if "captur" in str(error):
                raise NotRecorded(
                    f"a step of this model waits for the GPU and spoils its recording ({one_line(error, 200)}): "
                    "train it without CUDA graphs"
                ) from error
            raise

        def replay() -> tuple[Tensor, Tensor | None]:
            graph.replay()
            return result

        return replay


@dataclass(slots=True)
class Recording:
    """The step of one shape of batch: the tensors that it reads, and what repeats it."""

    inputs: dict[str, Tensor]
    num_items: Tensor | None
    replay: Work = field(init=False)

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], num_items: Tensor | int | None, device: torch.device) -> "Recording":
        numbers = None if num_items is None else torch.ones((), device=device)
        recording = cls({name: torch.empty_like(value, device=device) for name, value in inputs.items()}, numbers)
        recording.load(inputs, num_items)
        return recording

    def load(self, inputs: Mapping[str, Tensor], num_items: Tensor | int | None) -> None:
        for name, tensor in self.inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        if self.num_items is not None:
            assert num_items is not None
            self.num_items.fill_(float(num_items))


class Rates:
    """The learning rates of an optimizer's groups as tensors, which a recorded update reads."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.values: list[float] = []

    @contextmanager
    def as_inputs(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Put tensors in the groups, which can be recorded, until the block ends; then numbers, as schedules want."""
        groups = optimizer.param_groups
        if not self.tensors:
            self.values = [float(group["lr"]) for group in groups]
            # a group may be empty: that of the parameters without weight decay, of a LoRA for example
            device = next(parameter.device for group in groups for parameter in group["params"])
            self.tensors = [torch.tensor(group["lr"], device=device) for group in groups]
        before = [(group["lr"], group["capturable"]) for group in groups]
        for group, tensor in zip(groups, self.tensors, strict=True):
            group["lr"], group["capturable"] = tensor, True
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable

    def load(self, optimizer: torch.optim.Optimizer) -> None:
        for k, tensor in enumerate(self.tensors):
            if (value := float(optimizer.param_groups[k]["lr"])) != self.values[k]:
                self.values[k] = value
                tensor.fill_(value)


class Gradients:
    """Gradients that keep their tensors: every backward pass of an update adds to the same ones."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}

    def keep(self, model: nn.Module) -> None:
        """Take the gradients of the first batch for those tensors."""
        if not self.of:
            self.of = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}

    def attach(self) -> None:
        """Bring them back, with zeros, after an eager update, at whose end the Trainer's loop removed them."""
        if self.of and next(iter(self.of)).grad is None:
            self.set_to_zero()
            for parameter, gradient in self.of.items():
                parameter.grad = gradient

    def set_to_zero(self) -> None:
        torch._foreach_zero_(list(self.of.values()))
