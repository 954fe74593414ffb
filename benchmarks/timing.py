"""Timing of repeated work on a GPU or a CPU, and what a result has to say about where it came from."""

import argparse
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import loretta

WARM_UP = 4
# of kernels, by their names
KINDS = {
    "attention": r"sdpa|fmha|attention|compute_dot_do_o|convert_dq",
    "products": r"nvjet|gemm|cutlass|splitK",
    "norms": r"layer_norm|_norm",
    "dropout": r"dropout|masked_scale",
    "casts": r"copy_kernel",
}


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """``work`` as one CUDA graph, after a warm-up; what it allocates lives in the graph's own memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(work: Callable[[], Any], times: int, device: str) -> list[float]:
    """Milliseconds of each of ``times`` calls, after a warm-up; on a GPU between events on its stream."""
    for _ in range(WARM_UP):
        work()
    if device == "cpu":
        found = []
        for _ in range(times):
            begin = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - begin))
        return found
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def kernels(work: Callable[[], Any]) -> dict[str, Any]:
    """The kernels and copies that one call of ``work`` runs on the GPU, and their milliseconds; None if that fails."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
    except RuntimeError:
        return {"kernels": None, "gpu_ms": None}
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(found), "gpu_ms": sum(event.self_device_time_total for event in found) / 1e3}


def kinds_of(replay: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of a step and their milliseconds by kind."""
    times = dict.fromkeys((*KINDS, "other"), 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    for event in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        times[kind] += event.self_device_time_total / 1e3
    return {"kernels": sum(event.count for event in events), "kinds_ms": times}


def add_options(parser: argparse.ArgumentParser, *, budget: float) -> None:
    """What every benchmark of steps takes: its time in seconds, the device, the dtype, and the file of its results."""
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)


def about(device: str, dtype: str) -> dict[str, Any]:
    """Versions and hardware, for the head of a result file."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (loretta, torch, transformers, peft)},
            "cuda": torch.version.cuda,
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
