"""How well each core of an adapter is placed to learn: gradients, what a step moves, and how uneven its directions are.

    python benchmarks/conditioning.py --model FOLDER --data-dir DATA --out benchmarks/results/conditioning.json

An update is a chain of cores (R, n, S), contracted along the ranks, and linear in each of them. So the Jacobian J of
the update with respect to one core gives ``J^T J = P (x) 1_n (x) Q``, with P (R, R) and Q (S, S) the Gram matrices of
what stands to its left and to its right. For a core that several modules share it is the sum over them. Its condition
says how unevenly the directions of one core move the update.

Trains on STS-B (CPU, about an hour): each method with every rate on the first seed, and with the rate of the lowest
loss on the others. "even directions" is Adam in coordinates in which all directions of a core move the update alike:
were conditions the cause of a high loss, it would mend it. A run goes into the file as it ends, and is not made again.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from protocol import HEAD_RATE, lines_of
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loretta import LorettaRepConfig, LorettaSharedConfig
from loretta.tuners.layer import LorettaLayer

TASK, BATCH, LENGTH, STEPS = "stsb", 16, 18, 100
AT = (2, 10, 40, 100)  # steps that are measured; before the first one core is zero
REACH_AT = (10, 100)
RATES = (3e-3, 6e-3)
WINDOW = 20  # last steps that a loss is the mean of
IDLE = 1e-10  # of the largest eigenvalue: directions of a smaller one move nothing
FLOOR = 1e-2  # of the mean eigenvalue: "even directions" divides by no less
QV = ["query", "value"]
FROZEN = {"train_norms": False, "train_head": "frozen", "task_type": "SEQ_CLS"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "rep": lambda: LorettaRepConfig(**FROZEN),
    "LoRA r=1": lambda: peft.LoraConfig(r=1, lora_alpha=2, target_modules=QV, task_type="SEQ_CLS"),
    "compact": lambda: LorettaRepConfig.compact(**FROZEN),
    "shared r=2": lambda: LorettaSharedConfig(tensor_rank=2, lora_alpha=4, target_modules="all-linear", **FROZEN),
    "LoRA r=8": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=QV, task_type="SEQ_CLS"),
}
EVEN = ", even directions"
METHODS = [*CONFIGS, "rep" + EVEN, "LoRA r=8" + EVEN]
Key = tuple[int, int]  # a parameter and where a core begins in it


@dataclass(frozen=True, slots=True)
class Core:
    """A core in a parameter, as ``layout`` shows its flat numbers, or those of a gradient: a view (R, n, S)."""

    role: str
    parameter: Tensor
    where: slice
    layout: Callable[[Tensor], Tensor]

    def __call__(self, values: Tensor) -> Tensor:
        return self.layout(values.detach().view(-1)[self.where])

    @property
    def key(self) -> Key:
        return id(self.parameter), self.where.start


@dataclass(frozen=True, slots=True)
class Update:
    """``scale`` times a chain of cores, of which the first ``n_in`` spell the input; ``weight`` is what it changes."""

    scale: float
    cores: list[Core]
    n_in: int
    weight: Tensor

    def values(self) -> list[Tensor]:
        return [core(core.parameter).double() for core in self.cores]


def updates_of(model: nn.Module) -> list[Update]:
    """The updates of all modules that the adapter "default" changes. Raises ValueError where they are no chains."""
    found = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            cores, n_in = lora_chain(layer), 1
        elif isinstance(layer, LorettaLayer) and layer.placements["default"].seat is not None:
            cores, n_in = shared_chain(layer), 1
        elif isinstance(layer, LorettaLayer):
            cores, n_in = rep_chain(layer), layer.placements["default"].down.n_in
        else:
            continue
        found.append(Update(layer.scaling["default"], cores, n_in, layer.get_base_layer().weight))
        values = found[-1].values()
        sizes = [values[0].shape[0], *(right.shape[0] for right in values[1:]), 1]
        if sizes[0] != 1 or sizes[1:] != [value.shape[2] for value in values]:
            raise ValueError(f"cores of {[tuple(value.shape) for value in values]} are no chain")
    return found


def lora_chain(layer: Any) -> list[Core]:
    a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank = len(a_RI)
    return [
        Core("input", a_RI, slice(0, a_RI.numel()), lambda v: v.view(rank, -1).mT[None]),
        Core("output", b_OR, slice(0, b_OR.numel()), lambda v: v.view(-1, rank).mT[..., None]),
    ]


def rep_chain(layer: Any) -> list[Core]:
    """The cores of both trains; the two that meet in the bottleneck have no mode of their own."""
    [(down, up)] = layer._trains("default")
    cores = []
    for side, train in (("input", down), ("output", up)):
        shape, begin, at = train.shape, 0, 0
        for k, (left, mode, right) in enumerate(shape.cores):
            meets = (k < shape.n_in) != (side == "input")
            size = (left, mode, right) if not meets else (left, 1, -1) if side == "input" else (-1, 1, right)
            at += not meets
            where = slice(begin, begin := begin + left * mode * right)
            role = f"{side}, cut" if meets else f"{side} {at}"
            cores.append(Core(role, train.values, where, lambda v, size=size: v.view(size)))
    return cores


def shared_chain(layer: Any) -> list[Core]:
    """The sides, which have one core each, and between them the squares of the layer and of the projection."""
    seat, train = layer._seat("default"), layer._train("default", 0)
    sizes, rank, n = seat.train.sizes, seat.train.rank, len(seat.train.left)
    begins = [sum(sizes[:k]) for k in range(len(sizes))]
    spans = [
        ("input", begins[seat.left], sizes[seat.left], (1, -1, rank)),
        ("layer", begins[n] + seat.layer * rank**2, rank**2, (rank, 1, rank)),
        ("projection", begins[n + 1] + seat.projection * rank**2, rank**2, (rank, 1, rank)),
        ("output", begins[n + 2 + seat.right], sizes[n + 2 + seat.right], (rank, -1, 1)),
    ]
    return [
        Core(role, train.values, slice(begin, begin + size), lambda v, view=view: v.view(view))
        for role, begin, size, view in spans
    ]


def grams(updates: Sequence[Update]) -> dict[Key, Tensor]:
    """By core ``J^T J`` over a pair of ranks, (R S, R S): it is the same for each of the core's n."""
    found: dict[Key, Tensor] = {}
    for update in updates:
        values = update.values()
        lefts, rights = [torch.ones(1, 1, dtype=torch.float64)], [torch.ones(1, 1, dtype=torch.float64)]
        for core_RnS in values[:-1]:
            lefts.append(torch.einsum("rns,rq,qnt->st", core_RnS, lefts[-1], core_RnS))
        for core_RnS in values[:0:-1]:
            rights.append(torch.einsum("rns,st,qnt->rq", core_RnS, rights[-1], core_RnS))
        for core, left_RR, right_SS in zip(update.cores, lefts, reversed(rights), strict=True):
            found[core.key] = found.get(core.key, 0) + update.scale**2 * torch.kron(left_RR, right_SS)
    return found


def by_pair(core_RnS: Tensor) -> Tensor:
    """(n, R S): what a Gram matrix is multiplied with."""
    return core_RnS.transpose(0, 1).flatten(1)


def roots(updates: Sequence[Update]) -> dict[Key, Tensor]:
    """By core the inverse root of its Gram matrix, whose mean eigenvalue is made 1 before."""
    found = {}
    for key, gram in grams(updates).items():
        values, vectors = torch.linalg.eigh(gram)
        scale = values.mean().clamp(min=1e-300)  # zero while a zero core stands beside: then it stays as it is
        even = (values / scale).clamp(min=FLOOR) if float(values[-1]) > 0 else torch.ones_like(values)
        found[key] = vectors * even.rsqrt() @ vectors.T
    return found


def multiplied(updates: Sequence[Update], matrices: Mapping[Key, Tensor], flat: Mapping[int, Tensor]) -> None:
    """Multiply in place, core by core, what ``flat`` has of each parameter."""
    for core in {core.key: core for update in updates for core in update.cores}.values():
        seen_RnS = core(flat[id(core.parameter)])
        even = by_pair(seen_RnS).double() @ matrices[core.key]
        seen_RnS.copy_(even.view(seen_RnS.shape[1], seen_RnS.shape[0], -1).transpose(0, 1))


def next_step(optimizer: torch.optim.Optimizer, updates: Sequence[Update], even: bool) -> dict[int, Tensor]:
    """By parameter the step per unit of the rate that the optimizer would take. The cores stay; the head takes its own.

    With ``even`` the optimizer sees the cores in coordinates in which their directions move the update alike.
    """
    cores, rate = optimizer.param_groups[0]["params"], optimizer.param_groups[0]["lr"]
    kept = [(p, p.detach().clone(), p.grad.clone()) for p in cores]
    matrices = roots(updates) if even else {}
    if even:
        multiplied(updates, matrices, {id(p): p.grad for p in cores})
    optimizer.step()
    steps = {id(p): (before - p.detach()) / rate for p, before, _ in kept}
    if even:
        multiplied(updates, matrices, steps)
    with torch.no_grad():
        for p, before, gradient in kept:
            p.copy_(before)
            p.grad = gradient
    return steps


def of_cores(updates: Sequence[Update], steps: Mapping[int, Tensor]) -> dict[str, dict[str, float | None]]:
    """By role, over the modules: what is measured of a core with its gradient and its step per unit of the rate.

    Each is a median. ``gradient``: its norm by that of the core. ``condition``: of the Gram matrix, among directions
    that move the update at all; ``idle`` is the share of the others. ``descent`` and ``adam``: the Frobenius norm by
    which the update moves, per unit of the rate, by the gradient and by the step, of this core alone. ``used``: how
    much the step lowers the loss for what it moves, by the most that a step of this core can.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kept = grams(updates)
    for core in {core.key: core for update in updates for core in update.cores}.values():
        gram, eigenvalues = kept[core.key], torch.linalg.eigvalsh(kept[core.key])
        gradient, step = (by_pair(core(of)).double() for of in (core.parameter.grad, steps[id(core.parameter)]))
        moved = [float(((of @ gram) * of).sum().clamp(min=0).sqrt()) for of in (gradient, step)]
        seen = eigenvalues[eigenvalues > IDLE * eigenvalues[-1]]
        inverse = torch.linalg.pinv(gram, rtol=IDLE, hermitian=True)
        best = float((gradient @ inverse * gradient).sum().clamp(min=0).sqrt())
        norm = float(core(core.parameter).norm())
        row = {
            "gradient": float(gradient.norm()) / norm if norm else math.inf,
            "condition": float(seen[-1] / seen[0]) if len(seen) else math.inf,
            "idle": 1 - len(seen) / len(eigenvalues),
            "descent": moved[0], "adam": moved[1],
            "used": float((gradient * step).sum()) / moved[1] / best if moved[1] and best else math.nan,
        }  # fmt: skip
        for name, value in row.items():
            found[core.role][name].append(value)
    return {role: {name: finite(median(of)) for name, of in rows.items()} for role, rows in found.items()}


def finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def factors(values: Sequence[Tensor], n_in: int) -> tuple[Tensor, Tensor]:
    """A (I, R) and B (R, O) of a chain."""
    a_IR, b_RO = values[0][0], values[-1][..., 0]
    for core_RnS in values[1:n_in]:
        a_IR = torch.einsum("ir,rns->ins", a_IR, core_RnS).flatten(0, 1)
    for core_RnS in reversed(values[n_in:-1]):
        b_RO = torch.einsum("rns,so->rno", core_RnS, b_RO).flatten(1)
    return a_IR, b_RO


def of_updates(
    updates: Sequence[Update], steps: Mapping[int, Tensor], *, reach: bool = True
) -> dict[str, float | None]:
    """How a whole step lies to the gradient of the adapted weights, whose norm is ``weights``.

    ``cosine``: of the first order of what the step does to the updates. ``reach``: the largest one that any step of the
    cores can have; None where modules share cores, or it was not asked for.
    """
    along, moved, whole, reached = 0.0, 0.0, 0.0, 0.0
    alone = len({core.key for update in updates for core in update.cores}) == sum(len(u.cores) for u in updates)
    for update in updates:
        values = update.values()
        stepped = [core(steps[id(core.parameter)]).double() for core in update.cores]
        (a_IR, b_RO), (da_IR, db_RO) = torch.func.jvp(
            lambda *cores, n=update.n_in: factors(cores, n), tuple(values), tuple(stepped)
        )
        change_IO = update.scale * (da_IR @ b_RO + a_IR @ db_RO)
        assert update.weight.grad is not None
        gradient_IO = update.weight.grad.T.double()
        along += float((change_IO * gradient_IO).sum())
        moved += float(change_IO.square().sum())
        whole += float(gradient_IO.square().sum())
        reached += within(values, update.n_in, gradient_IO) if alone and reach else math.nan
    return {
        "weights": finite(math.sqrt(whole)),
        "cosine": finite(along / math.sqrt(moved * whole)),
        "reach": finite(math.sqrt(reached / whole)),
    }


def within(values: Sequence[Tensor], n_in: int, gradient_IO: Tensor) -> float:
    """The squared norm of what lies, of a gradient, in the tangents of a chain.

    A tangent is ``dA B + A dB``. With P the projection onto A's columns, ``(1 - P) dA B`` and ``P dA B + A dB`` are at
    right angles; the first lies in B's rows, of which V is an orthonormal basis.
    """
    a_IR, b_RO = factors(values, n_in)
    q_IR, v_OR = torch.linalg.qr(a_IR)[0], torch.linalg.svd(b_RO, full_matrices=False)[2].T
    inside_RO = q_IR.T @ gradient_IO
    outside_IR = gradient_IO @ v_OR - q_IR @ (inside_RO @ v_OR)
    aim = torch.cat([outside_IR.flatten(), inside_RO.flatten()])
    if len(values) == 2:  # LoRA: dA and dB are any matrices
        return float(aim.square().sum())
    sizes = [value.numel() for value in values]

    def pair(flat: Tensor) -> tuple[Tensor, Tensor]:
        return factors([part.view(v.shape) for part, v in zip(flat.split(sizes), values, strict=True)], n_in)

    da_IRN, db_RON = torch.func.jacfwd(pair)(torch.cat([value.flatten() for value in values]))
    first_IRN = torch.einsum("irn,rs->isn", da_IRN, b_RO @ v_OR)
    inside_RRN = torch.einsum("iq,irn->qrn", q_IR, da_IRN)
    across_RON = torch.einsum("qrn,ro->qon", inside_RRN, b_RO) + torch.einsum("qr,ron->qon", q_IR.T @ a_IR, db_RON)
    first_MN = first_IRN.flatten(1)
    first_MN = (first_MN - q_IR @ (q_IR.T @ first_MN)).view(-1, first_IRN.shape[-1])
    tangents_MN = torch.cat([first_MN, across_RON.flatten(0, 1)])
    products, seen = tangents_MN.T @ tangents_MN, tangents_MN.T @ aim
    products.diagonal().add_(1e-10 * products.diagonal().mean())  # ranks can be turned without any effect
    return float(seen @ torch.linalg.solve(products, seen))


def batches(rows: Sequence[tuple[dict[str, list[int]], float]], seed: int, steps: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-steps * BATCH // len(rows)))])
    yield from (part.tolist() for part in order.split(BATCH)[:steps])


def run(method: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training: the loss of each step, and what was measured behind some."""
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = [json.loads(line) for line in lines_of(args.data_dir / TASK / "train.jsonl.gz")]
    rows = [(tokenizer(row["sentence1"], row["sentence2"]), float(row["label"])) for row in found]
    rows = [(encoded, label) for encoded, label in rows if len(encoded["input_ids"]) <= LENGTH]
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    model = peft.get_peft_model(base, CONFIGS[method.removesuffix(EVEN)]()).train()
    head = [p for n, p in model.named_parameters() if "classifier" in n and "original_module" not in n]
    for parameter in head:
        parameter.requires_grad_(True)
    cores = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    updates = updates_of(model)
    assert {id(p) for p in cores} == {id(core.parameter) for update in updates for core in update.cores}
    optimizer = torch.optim.AdamW([{"params": cores, "lr": rate}, {"params": head, "lr": HEAD_RATE}], weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / (0.06 * args.steps), 1 - k / args.steps)
    )
    losses, points = [], {}
    for step, chosen in enumerate(batches(rows, seed, args.steps), 1):
        measures = step in AT
        for update in updates:
            update.weight.requires_grad_(measures)
        batch = tokenizer.pad([rows[k][0] for k in chosen], return_tensors="pt")
        optimizer.zero_grad()
        loss = model(**batch, labels=torch.tensor([rows[k][1] for k in chosen])).loss
        loss.backward()
        losses.append(round(loss.item(), 4))
        moves = next_step(optimizer, updates, method.endswith(EVEN))
        if measures:
            points[step] = {"cores": of_cores(updates, moves), **of_updates(updates, moves, reach=step in REACH_AT)}
            for update in updates:
                update.weight.grad = None
        with torch.no_grad():
            for p in cores:
                p.sub_(optimizer.param_groups[0]["lr"] * moves[id(p)])
        schedule.step()
    return {
        "model": Path(args.model).name, "task": TASK, "method": method, "rate": rate, "seed": seed,
        "trained": sum(p.numel() for p in cores), "losses": losses, "loss": round(mean(losses[-WINDOW:]), 4),
        "points": points, "steps": args.steps, "batch": BATCH, "length": LENGTH,
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []

    def known(method: str, rate: float, seed: int) -> dict[str, Any]:
        same = [r for r in rows if (r["method"], r["rate"], r["seed"]) == (method, rate, seed)]
        if not same:
            same = [run(method, rate, seed, args)]
            rows.extend(same)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print({key: same[0][key] for key in ("method", "rate", "seed", "loss", "seconds")}, flush=True)
        return same[0]

    rates = {m: min(args.rates, key=lambda rate: known(m, rate, 0)["loss"]) for m in args.methods}
    for seed in range(1, args.seeds):
        for method in args.methods:
            known(method, rates[method], seed)


if __name__ == "__main__":
    main()
