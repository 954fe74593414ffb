"""What the CPU does for each adapted module in an eager step: operations, autograd nodes, Python calls. No GPU needed.

A GPU that is waiting costs nothing; an eager step of a small batch is the CPU's work, and that is a count. Two depths
of one tiny model are counted, and the floor's counts are taken off: what grows with the adapted modules is the cost of
a module, the rest is the cost of a step (the joint contraction).

An operation is what PyTorch dispatches below autograd. One that only looks at memory in another way (``t``, ``view``,
``split``) launches no kernel and is counted apart.

    python benchmarks/launches.py --when after --out benchmarks/results/launches.json
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import METHODS, SHAPES, build_base, inputs, wrap
from timing import about
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loretta.layers import fused
from loretta.tuners import calls

FLOOR = "floor"
ON_GPU = " on a GPU"  # what the layers are handed there, counted without one
COUNTED = ("lora q,v", "rep q,v", "adp", f"adp{ON_GPU}", "compact", "shared")
DEPTHS = (2, 4)
KINDS = ("kernels", "views", "nodes", "python calls")


class Operations(TorchDispatchMode):
    """Counts what is dispatched within: "kernels", and "views" that launch none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = func.is_view or name in (
            "detach",
            "_unsafe_view",
            "empty",
            "empty_strided",
            "empty_like",
            "new_empty",
        )
        self.found["views" if is_view else "kernels"] += 1
        return func(*args, **(kwargs or {}))


def python_calls(work: Callable[[], Any]) -> int:
    """How many functions written in Python run within ``work``."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def nodes(loss: Tensor) -> int:
    """How many nodes a backward pass from ``loss`` visits."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def count(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Counter[str]]:
    """The counts of one forward and one backward pass; autograd's nodes stand with the backward pass."""
    model(**batch).loss.backward()  # what is made once is there
    model.zero_grad()
    found: dict[str, Counter[str]] = {}
    losses: list[Tensor] = []
    # a dispatch mode looks like a recording, in which the layers would do other things than in a step
    with patch.object(calls, "is_recorded", lambda: False):
        for name, work in (
            ("forward", lambda: losses.append(model(**batch).loss)),
            ("backward", lambda: losses[-1].backward()),
        ):
            with Operations() as operations:
                work()
            found[name] = operations.found
    model.zero_grad()
    for name, work in (
        ("forward", lambda: losses.append(model(**batch).loss)),
        ("backward", lambda: losses[-1].backward()),
    ):
        found[name]["python calls"] = python_calls(work)
    found["backward"]["nodes"] = nodes(model(**batch).loss)
    return found


def measure(method: str, shape: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row: the counts of a module and of a step, above the floor's."""
    extra, modules, tensors = [], [], 0
    for depth in DEPTHS:
        base = build_base(shape, device="cpu", dtype=dtype, layers=depth)
        floor = count(base, inputs(base, 2, 8))
        model = wrap(base, method.removesuffix(ON_GPU), shape)
        with patch.object(fused, "one_matrix_pays", lambda *_: method.endswith(ON_GPU), create=True):
            found = count(model, inputs(base, 2, 8))
        modules.append(sum(hasattr(module, "base_layer") and hasattr(module, "scaling") for module in model.modules()))
        tensors = sum(parameter.requires_grad for parameter in model.parameters())
        extra.append({name: {kind: found[name][kind] - floor[name][kind] for kind in KINDS} for name in found})
    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "method": method}
    row |= {"modules": modules[-1], "tensors per module": tensors / modules[-1]}
    for name in extra[0]:
        for kind in KINDS:
            small, large = (each[name][kind] for each in extra)
            each = (large - small) / (modules[1] - modules[0])
            row[f"{name} {kind}"] = {"module": round(each, 2), "step": round(large - each * modules[1], 2)}
    return row


def counting_options(doc: str, methods: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a script that counts for shapes and methods, and keeps counts of earlier states of the code."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--shapes", default="tiny,tiny-bert")
    parser.add_argument("--methods", default=",".join(methods).replace("q,v", "q+v"))
    parser.add_argument(
        "--when", default="now", help="a word for the state of the code; its rows in --out are replaced"
    )
    parser.add_argument("--out", type=Path, required=True)
    return parser


def rows_of_other_states(out: Path, when: str) -> list[dict[str, Any]]:
    known = json.loads(out.read_text())["rows"] if out.exists() else []
    return [row for row in known if row["when"] != when]


def main() -> None:
    parser = counting_options(__doc__, COUNTED)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    rows = rows_of_other_states(args.out, args.when)
    for shape in args.shapes.split(","):
        assert shape in SHAPES
        for dtype in args.dtypes.split(","):
            for method in args.methods.replace("q+v", "q_v").split(","):
                method = method.replace("q_v", "q,v")
                assert method.removesuffix(ON_GPU) in METHODS
                row = {"when": args.when, **measure(method, shape, getattr(torch, dtype))}
                rows.append(row)
                cells = ", ".join(f"{k} {v['module']:g} + {v['step']:g}" for k, v in row.items() if isinstance(v, dict))
                print(f"{shape} {dtype} {method:9} {row['modules']} modules: {cells}")
    args.out.write_text(json.dumps({**about("cpu", args.dtypes), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
