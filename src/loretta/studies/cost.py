"""The cost of one training step: floating-point operations and the time of memory copies (the paper's Table 5)."""

import copy
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from loretta.errors import InputError
from loretta.files import write_json
from loretta.studies.sizes import bare_model, size_of, task_type_of
from loretta.studies.state import COST
from loretta.training.config import RunConfig
from loretta.training.model import load_base, wrap

STEPS = 5  # measured ones, after one that warms up


def measure(config: RunConfig, folder: Path, sizes: str) -> None:
    """Write the cost of one step of ``config`` on a batch of random tokens of the maximum length.

    PyTorch's counter counts the FLOPs of products on the meta device, which needs no weights and has no fused kernels
    that would hide products. The time of copies is the median of a few steps: of the memcpy events on a GPU, of the
    ``aten::copy_`` operators on a CPU. It needs the weights; without them it is null, and the notes say why.

    Raises InputError when the method does not fit the model.
    """
    task_type, n_labels = task_type_of(config, sizes)
    kind = "classification" if task_type == "SEQ_CLS" else "language_modeling"
    with torch.device("meta"):
        base = copy.deepcopy(bare_model(sizes, task_type, n_labels, config.dtype))
        bare = wrap(base, config.method, kind, config.method_args, config.head_policy)
    flops = count_flops(bare, _batch(config, bare, kind, torch.device("meta")))
    notes = [
        f"one training step of {config.batch_size} x {config.max_length} random tokens; FLOPs are counted on the meta "
        "device: products of matrices, forward and backward"
    ]
    copies: dict[str, Any] = {"memcpy_us": None, "copies": None, "device": None}
    try:
        names = tuple(map(str, range(n_labels))) if kind == "classification" else ()
        base = load_base(config.model, kind, label_names=names, dtype=config.dtype, cpu=config.cpu)
    except InputError as error:
        notes.insert(0, f"no time of copies: {error}")
    else:
        device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
        model = wrap(base, config.method, kind, config.method_args, config.head_policy).to(device)
        threads = torch.get_num_threads()
        # with several threads, the time in which one waits for another would count as copying
        torch.set_num_threads(1)
        copies = time_copies(model, _batch(config, model, kind, torch.device("cpu")), device)
        torch.set_num_threads(threads)
        on_cpu = "the aten::copy_ operators of the CPU on one thread"
        what = "the memcpy events of the GPU" if device.type == "cuda" else on_cpu
        notes.append(f"the time of copies is that of {what}, the median of {STEPS} steps")
    size = size_of(config, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / COST,
        {
            "flops": flops,
            **copies,
            "parameters": size.trained,
            "bytes": 4 * size.trained,
            "tokens": config.batch_size * config.max_length,
            "notes": notes,
            "config": config.model_dump(),
            "command": shlex.join(["loretta", *sys.argv[1:]]),
        },
    )


def count_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """FLOPs of the forward and backward pass of one batch, as PyTorch counts them."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def time_copies(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Microseconds that a training step spends on copies, the number of copies, and the device."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    event_name, time_name = ("Memcpy", "self_device_time_total") if on_gpu else ("aten::copy_", "self_cpu_time_total")
    times, counts = [], []
    for _ in range(STEPS):
        with profile(activities=activities) as watched:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        copies = [event for event in watched.key_averages() if event.key.startswith(event_name)]
        times.append(sum(getattr(event, time_name) for event in copies))
        counts.append(sum(event.count for event in copies))
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {"memcpy_us": float(statistics.median(times)), "copies": int(statistics.median(counts)), "device": name}


def _batch(config: RunConfig, model: nn.Module, kind: str, device: torch.device) -> dict[str, Tensor]:
    shape = (config.batch_size, config.max_length)
    vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(int(vocabulary), shape, generator=generator)
    labels = ids if kind == "language_modeling" else torch.zeros(config.batch_size, dtype=torch.long)
    # no padding, so no mask: models look at the values of one, which the meta device does not have
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
