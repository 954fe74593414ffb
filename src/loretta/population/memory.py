"""How many runs fit into memory at once: one step of two members is measured, and more take in proportion."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from loretta.memory import is_out_of_memory
from loretta.population.loop import Loop
from loretta.population.training import prepare
from loretta.training.config import RunConfig

MEASURED = 2  # members
USED = 0.8  # share of the free memory; the rest is for gaps in the allocator and for other lengths of batches
OF_A_MEMBER = 6  # tensors of its trained numbers: values, gradient, two of AdamW, the best, and its start
# factor from the tensors that a pass saves to all that it needs on a CPU, with gradients and temporaries
BEYOND_SAVED = 2.0


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a population: of the base, and of each member."""

    base: int
    member: int


def members_that_fit(configs: Sequence[RunConfig], share: float = 1.0) -> int:
    """How many of these runs fit into ``share`` of the device's memory at once, at least one."""
    on_gpu = torch.cuda.is_available() and not configs[0].cpu
    if len(configs) == 1:
        return 1
    size = len(configs)
    while True:
        try:
            need = measure(configs[:MEASURED], size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            need = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        if need is None:
            return 1
        free, total = free_bytes(on_gpu)
        room = USED * min(free, share * total)
        fits = max(1, int((room - need.base) / need.member))
        if fits >= size:
            return size
        size = fits  # measured again: fewer members train in fewer, larger parts


def free_bytes(on_gpu: bool) -> tuple[int, int]:
    """The free and the whole memory of the device."""
    if on_gpu:
        return torch.cuda.mem_get_info()
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def measure(configs: Sequence[RunConfig], planned: int) -> Need:
    """What one step of these runs needs on their longest examples, where ``planned`` runs train together."""
    with tempfile.TemporaryDirectory() as scratch:
        loop = prepare(configs, Path(scratch), size=planned)
    size, values = len(configs), loop.population.values
    rows = loop.rows["train"]
    longest = rows.lengths[: loop.rules.size].topk(min(loop.rules.batch_size, loop.rules.size)).indices
    part = max(loop.in_parts(longest.expand(size, -1)), key=lambda part: part["input_ids"].numel())
    step = _peak_of_step(loop, part) if values.is_cuda else BEYOND_SAVED * _saved_by_step(loop, part)
    frozen = [p for p in loop.population.model.parameters() if not p.requires_grad]
    base = sum(p.numel() * p.element_size() for p in frozen)
    return Need(base=base, member=int(step / size) + OF_A_MEMBER * values[0].numel() * values.element_size())


def _peak_of_step(loop: Loop, part: dict[str, Tensor]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loop.losses(part)
    return torch.cuda.max_memory_allocated() - before


def _saved_by_step(loop: Loop, part: dict[str, Tensor]) -> float:
    """Bytes of the tensors that the forward pass of a step keeps for its backward pass, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in (*loop.population.parameters(), loop.population.values)}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loop.losses(part)
    return float(sum(saved.values()))
