"""How much of a trained LoRA each form can express at its count: the nearest trains, without training.

    python benchmarks/causes.py --out benchmarks/results/causes.json

Trains a LoRA of rank 8 on query and value for the demo's task (CPU, some minutes; --model FOLDER for all-MiniLM-L6-v2),
fits every form to its updates, and to random updates with the same singular values.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from loretta import tt
from loretta.convert.load import find_adapter
from loretta.convert.low_rank import read_updates
from loretta.training.config import RunConfig
from loretta.training.run import train

Pair = tuple[tt.TTShape, tt.TTShape]


def forms(wide_in: int, wide_out: int) -> Iterator[tuple[str, Pair]]:
    """Shapes of the two trains of one update, the smallest bottleneck first."""
    for rank in (2, 3, 5, 8):
        shapes = tt.plan_shape(wide_in, 8, rank=rank), tt.plan_shape(8, wide_out, rank=rank)
        yield f"the paper's shapes, rank {rank}", shapes
    for cut in (1, 2, 4):
        for inner in (4, 8, 16):
            sides = (tt.plan_sides(a, b, rank=max(inner, cut), count=2) for a, b in ((wide_in, cut), (cut, wide_out)))
            first, second = sides
            yield f"two modes a side, inner {inner}, rank {cut}", (first, second)


def lora_cut(update: tuple[Tensor, Tensor], rank: int) -> float:
    """The relative error of the best update of a rank."""
    (_, left), (_, right) = torch.linalg.qr(update[0]), torch.linalg.qr(update[1].T)
    values = torch.linalg.svdvals(left @ right.T)
    return float(values[rank:].norm() / values.norm())


def fitted(update: tuple[Tensor, Tensor], shapes: Pair) -> float:
    """The relative Frobenius error of the nearest pair of trains."""
    a_IR, b_RO = update
    down, up = tt.fit_product(a_IR, b_RO, *shapes)
    return float(tt.product_error(a_IR, b_RO, list(down), list(up), *shapes) / tt.product_norm(a_IR, b_RO))


def alike(update: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random update with the same singular values."""
    (_, left), (_, right) = torch.linalg.qr(update[0]), torch.linalg.qr(update[1].T)
    values = torch.linalg.svdvals(left @ right.T)
    sides = (torch.randn(len(side), len(values), generator=generator) for side in (update[0], update[1].T))
    first, second = (torch.linalg.qr(side)[0] for side in sides)
    return first * values, second.T


def rows(updates: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, float | str | None]]:
    """Share of the squared update that a form keeps: over all modules, of the trained and of random updates."""
    generator = torch.Generator().manual_seed(0)
    random = {name: alike(update, generator) for name, update in updates.items()}
    a_IR, b_RO = next(iter(updates.values()))
    sizes = len(a_IR), b_RO.shape[1]
    found: list[dict[str, float | str | None]] = []
    for rank in (1, 2, 3, 4):
        kept = [1 - lora_cut(update, rank) ** 2 for update in updates.values()]
        count = len(updates) * rank * sum(sizes)
        found.append({"form": f"LoRA r={rank}", "trained": count, "kept": sum(kept) / len(kept), "random": None})
    for name, shapes in forms(*sizes):
        shares = [[1 - fitted(update, shapes) ** 2 for update in some.values()] for some in (updates, random)]
        kept_of, random_of = (sum(share) / len(share) for share in shares)
        count = len(updates) * sum(shape.n_params for shape in shapes)
        found.append({"form": name, "trained": count, "kept": kept_of, "random": random_of})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=args.model, data="stdlib", method="lora", output=f"{folder}/run", max_steps=args.steps, batch_size=16,
            eval_batch_size=64, max_length=48, learning_rate=2e-3, cpu=True,
        )  # fmt: skip
        record = train(config)
        updates = read_updates(find_adapter(Path(folder, "run"))).by_module
        content = {
            "model": Path(args.model).name, "steps": args.steps, "score": record.validation[record.metric],
            "torch": torch.__version__, "rows": rows(updates),
        }  # fmt: skip
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
