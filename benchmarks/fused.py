"""The Triton kernels against their plain twins on a GPU: results first, then the time of forward and backward.

Each time is that of one CUDA graph of several layers with tensors of their own, per layer, and of the same run
eagerly. Prints a table and writes JSON.

    python benchmarks/fused.py --out benchmarks/results/fused.json
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import triton
from torch import Tensor

from loretta.layers import fused

LAYERS = 16
# rows, width in and out
SIZES = [(256, 4096), (1024, 4096), (4096, 4096), (256, 2048), (2048, 768), (4096, 768)]


def update_case(rows: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Arguments of a linear layer with an update of rank 8, and which of them want a gradient."""
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype) / width**0.5
    return [x, weight, torch.randn(width, dtype=dtype), _thin(width, 8, dtype), _thin(8, width, dtype)], [0, 3, 4]


def bottleneck_case(rows: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Arguments of an adapter with bottleneck 64 and inner sizes 8, the last of which carry the biases."""
    one = torch.eye(8, dtype=dtype)[5]
    parts = [_thin(width, 8, dtype), _thin(8, 64, dtype), one, _thin(64, 8, dtype), _thin(8, width, dtype)]
    return [torch.randn(rows, width, dtype=dtype), one, *parts], [0, 2, 3, 5, 6]


CASES = {
    "update": (update_case, fused.linear_with_update, fused.LinearWithUpdate.apply),
    "bottleneck": (bottleneck_case, fused.add_bottleneck, fused.AddBottleneck.apply),
}


def _thin(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, dtype=dtype) / rows**0.5


def results(function, arguments: list[Tensor], wanted: list[int], grad: Tensor) -> list[Tensor]:
    """The output and the gradients asked for."""
    arguments = [a.detach().requires_grad_(k in wanted) for k, a in enumerate(arguments)]
    out = function(*arguments)
    return [out, *torch.autograd.grad(out, [arguments[k] for k in wanted], grad)]


def errors(name: str, rows: int, width: int) -> dict[str, list[float]]:
    """Relative errors of the kernels and of the plain twin in bfloat16, against float64."""
    case, plain, fused = CASES[name]
    arguments, wanted = case(rows, width, torch.bfloat16)
    grad = torch.randn(rows, width, dtype=torch.bfloat16)
    exact = results(plain, [a.double() for a in arguments], wanted, grad.double())
    return {
        what: [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
        for what, function in (("plain", plain), ("fused", fused))
        for got in [results(function, arguments, wanted, grad)]
    }


def microseconds(name: str, rows: int, width: int, how: str, steps: int) -> dict[str, float]:
    """Per layer, in a CUDA graph and eagerly; "base" is the linear layer alone (forward, and its input's gradient)."""
    case, plain, fused = CASES[name]
    cases = [case(rows, width, torch.bfloat16) for _ in range(LAYERS)]
    grad = torch.randn(rows, width, dtype=torch.bfloat16)

    def base() -> None:
        for arguments, _ in cases:
            results(torch.nn.functional.linear, arguments[:3], [0], grad)

    def run(function) -> None:
        for arguments, wanted in cases:
            results(function, arguments, wanted, grad)

    runs = {"plain": lambda: run(plain), "fused": lambda: run(fused)}
    if name == "update":
        runs["base"] = base
    times = {}
    for what, call in runs.items():
        if how == "graph":
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                call()
                call()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            call = graph.replay
        for _ in range(3):
            call()
        found = []
        for _ in range(steps):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        times[what] = 1e3 * statistics.median(found) / LAYERS
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    rows = []
    for name in CASES:
        for size in SIZES:
            row = {"case": name, "rows": size[0], "width": size[1], "errors": errors(name, *size)}
            for how in ("graph", "eager"):
                row[how] = microseconds(name, *size, how, args.steps)
                base = row[how].get("base", 0.0)
                extra = {what: row[how][what] - base for what in ("plain", "fused")}
                worst = {what: max(found) for what, found in row["errors"].items()}
                print(
                    f"{name:10} {size[0]:5} x {size[1]:<5} {how:5} base {base:7.1f} us, "
                    f"plain +{extra['plain']:6.1f}, fused +{extra['fused']:6.1f}; "
                    f"errors {worst['plain']:.1e} {worst['fused']:.1e}",
                    flush=True,
                )
            rows.append(row)
    about = {
        "device": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "layers": LAYERS,
        "steps": args.steps,
    }
    args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
