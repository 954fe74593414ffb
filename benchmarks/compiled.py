"""What torch.compile makes of a training step: guards, inputs, operations, kernels and products. No GPU needed.

A small compiled step waits for the CPU as an eager one does, which compares the guards, hands over the inputs and
launches the kernels one by one. Two depths of one tiny model are compiled and the floor's counts are taken off, as in
launches.py: what grows with the adapted modules is the cost of a module, the rest is that of a step.

Kernels are those that inductor generates, for a CPU; they are written and not compiled, so the results are no numbers.
Products are its calls of mm, bmm and addmm, with what they do besides. "Handed on" are the tensors that the backward
graph gets from the forward one.

    python benchmarks/compiled.py --when now --out benchmarks/results/compiled.json
"""

import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from cases import METHODS, SHAPES, build_base, inputs, wrap
from launches import DEPTHS, FLOOR, ON_GPU, counting_options, rows_of_other_states
from timing import about
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch._inductor import config, metrics
from torch._inductor.async_compile import AsyncCompile

from loretta.layers import fused

COUNTED = ("lora q,v", "rep q,v", f"adp{ON_GPU}", "shared")
KINDS = ("guards", "inputs", "operations", "kernels", "products", "handed on")
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten._addmm_activation.default)


def count(method: str, shape: str, layers: int, dtype: torch.dtype) -> tuple[Counter[str], int, int]:
    """The counts of one forward and backward pass, the adapted modules, and the graphs that were compiled."""
    found: Counter[str] = Counter()

    def see(graph: torch.fx.Graph) -> None:
        called = [node.target for node in graph.nodes if node.op == "call_function"]
        found["operations"] += len(called)
        found["products"] += sum(target in PRODUCTS for target in called)
        given = [node.name for node in graph.nodes if node.op == "placeholder"]
        gradients = [name for name in given if name.startswith("tangents")]
        found["handed on"] += len(given) - len(gradients) if gradients else 0

    torch._dynamo.reset()
    metrics.reset()
    counters.clear()
    clear_compilation_metrics()
    base = build_base(shape, device="cpu", dtype=dtype, layers=layers)
    model = base if method == FLOOR else wrap(base, method.removesuffix(ON_GPU), shape)
    modules = sum(hasattr(module, "base_layer") and hasattr(module, "scaling") for module in model.modules())
    with (
        config.patch(post_grad_custom_post_pass=see, force_disable_caches=True, compile_threads=1),
        patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None),
        patch.object(fused, "one_matrix_pays", lambda *_: method.endswith(ON_GPU)),
    ):
        torch.compile(model, dynamic=False)(**inputs(base, 2, 8)).loss.backward()
    first = get_compilation_metrics()[0]
    found["guards"], found["inputs"] = first.guard_count, first.graph_input_count
    found["kernels"] = metrics.generated_kernel_count
    return found, modules, counters["stats"]["unique_graphs"]


def measure(method: str, shape: str, dtype: torch.dtype, floors: dict[int, Counter[str]]) -> dict[str, Any]:
    """One row: the counts of a module and of a step, above the floor's."""
    (small, few, graphs), (large, many, _) = (count(method, shape, depth, dtype) for depth in DEPTHS)
    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "method": method}
    row |= {"modules": many, "graphs": graphs}
    for kind in KINDS:
        least, most = (each[kind] - floors[depth][kind] for each, depth in zip((small, large), DEPTHS, strict=True))
        each = (most - least) / (many - few)
        row[kind] = {"module": round(each, 2), "step": round(most - each * many, 2)}
    return row


def main() -> None:
    parser = counting_options(__doc__, COUNTED)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    rows = rows_of_other_states(args.out, args.when)
    dtype = getattr(torch, args.dtype)
    for shape in args.shapes.split(","):
        assert shape in SHAPES
        floors = {depth: count(FLOOR, shape, depth, dtype)[0] for depth in DEPTHS}
        for method in (name.replace("q+v", "q,v") for name in args.methods.split(",")):
            assert method.removesuffix(ON_GPU) in METHODS
            rows.append({"when": args.when, **measure(method, shape, dtype, floors)})
            cells = ", ".join(f"{kind} {rows[-1][kind]['module']:g} + {rows[-1][kind]['step']:g}" for kind in KINDS)
            print(f"{shape} {method:12} {rows[-1]['graphs']} graph: {cells}", flush=True)
            args.out.write_text(json.dumps({**about("cpu", args.dtype), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
