"""Passes of a population as CUDA graphs, one for each shape of batch."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loretta.training.batches import Shapes, shapes_of
from loretta.training.recordings import Recorder
from loretta.wording import one_line

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32


class Graphs:
    """Recorded steps, one for each shape of batch. The first batch of a shape is trained eagerly."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.seen: set[Shapes] = set()
        self.steps: dict[Shapes, tuple[dict[str, Tensor], Callable[[], Any]]] = {}
        self.why_eager: str | None = None

    def replay(self, batch: dict[str, Tensor], work: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        shapes: Any = shapes_of(batch) if batch else ()
        assert shapes is not None
        if shapes not in self.steps:
            if shapes not in self.seen or self.why_eager is not None or len(self.steps) == MAX_GRAPHS:
                self.seen.add(shapes)
                return work(batch)
            try:
                inputs = {name: tensor.clone() for name, tensor in batch.items()}
                self.steps[shapes] = inputs, self.recorder.record(lambda: (work(inputs), None))
            except RuntimeError as error:
                self.why_eager = one_line(error, 200)
                logger.warning("no CUDA graphs, training is eager: %s", self.why_eager)
                return work(batch)
        inputs, again = self.steps[shapes]
        if inputs:
            torch._foreach_copy_(list(inputs.values()), [batch[name] for name in inputs])
        losses, _ = again()
        return losses
