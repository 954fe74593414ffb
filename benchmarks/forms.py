"""Which form of an adapter earns its parameters: scores of many forms at small counts, every one with its own rate.

Each form is trained as populations, all seeds and learning rates of it at once, on 90 % of a task's training data, and
scored on the other 10 %. The official validation data is not read.

    python benchmarks/forms.py --model FOLDER --data-dir FOLDER --out benchmarks/results/forms.json

--data-dir has one folder a task with the official files. What is in the file already is not run again. A form that the
package does not have is made here, by changing the plan, the start or the rates of a rep. ``make tables`` puts the
results into docs/choosing.md. Those there: all-MiniLM-L6-v2 with ``--seeds 4``, and all-mpnet-base-v2 with ``--seeds 3
--epochs 5 --rates 3e-4 7e-4 1.5e-3 3e-3 --eager``, scored at every third of the training (``--eval-steps``).
"""

import argparse
import contextlib
import gzip
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tables import best_rate

import loretta.tuners.layer as tuner_layer
from loretta import tt
from loretta.population import training as population_training
from loretta.population.loop import Loop
from loretta.population.training import prepare
from loretta.population.trains import TrainGroup
from loretta.training.config import RunConfig
from loretta.tt.modes import most_balanced

# tokens of a text: nearly all of them whole, and one length for all batches makes one recorded step
LENGTHS = {"cola": 32, "mrpc": 96, "stsb": 64, "rte": 160, "sst2": 48}
QV = {"bert": ["query", "value"], "mpnet": ["attn.q", "attn.v"], "llama": ["q_proj", "v_proj"]}
ALL = {
    "bert": ["query", "key", "value", "dense"],
    "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
HELD_OUT = 0.1
HIDDEN = ("pooler.dense", "classifier.dense", "classifier.modules_to_save.default.dense")  # layers of heads
ROWS = {"sst2": 12_000}  # of the longest training data


@dataclass(frozen=True, kw_only=True)
class Form:
    """One kind of adapter: what a run is given, and what is changed of the package for it."""

    name: str
    method: str = "rep"
    options: dict[str, Any] = field(default_factory=dict)
    targets: str | None = "qv"
    modes: int | None = None  # a side; None: the plan of the package
    inner: int | None = None  # rank between the modes of a side
    cut: int | None = None  # rank of the update
    start: str | None = None  # which cores are zero: "cut", "largest", "down"
    rates: dict[str, float] = field(default_factory=dict)  # factors on the rate: "zero" core, "others", "cut", "ends"
    shared: int | None = None  # rank of one train over all layers and projections
    grid: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3)


def plan(form: Form, in_features: int, out_features: int, *, rank: int, **_: Any) -> tt.TTShape:
    """A side of ``modes`` modes with rank ``inner`` in it and ``cut`` at the boundary; the bottleneck is one mode."""
    wide = max(in_features, out_features)
    count = form.modes or 1
    found = most_balanced(wide, count, 2)
    assert found is not None
    # what one mode and the rest can use at most
    inner = [min(form.inner or rank, math.prod(found[k:]), math.prod(found[:k])) for k in range(1, count)]
    inner = [max(form.inner or 1, r) if form.inner else r for r in inner]
    cut = form.cut or rank
    if in_features == wide:
        modes, ranks, n_in = (*found, out_features), (1, *inner, cut, 1), count
    else:
        modes, ranks, n_in = (in_features, *found[::-1]), (1, cut, *inner[::-1], 1), 1
    return tt.TTShape(in_features=in_features, out_features=out_features, modes=modes, ranks=ranks, n_in=n_in)


def start(form: Form, down: Any, up: Any, init_weights: str) -> None:
    """As the package starts, with another core of zeros."""
    _ordinary_start(down, up, init_weights)
    if form.start is None:
        return
    with torch.no_grad():
        last = len(up) - 1
        up[last].copy_(tuner_layer._variance_keeping(up.shape.cores[last], up.shape.out_part(last)))
        if form.start == "cut":
            up[0].zero_()
        elif form.start == "largest":
            up[max(range(len(up)), key=lambda k: up[k].numel())].zero_()
        elif form.start == "down":
            down[0].zero_()


_ordinary_start = tuner_layer.starting_cores


def with_frozen_pooler(*args: Any) -> Any:
    """A run's model, of whose head the final layer alone is trained: so do PEFT's own methods."""
    model, found = _prepare_model(*args)
    for name, parameter in model.named_parameters():
        if any(part in name for part in HIDDEN):
            parameter.requires_grad_(False)
    return model, found


_prepare_model = population_training.prepare_model


@contextlib.contextmanager
def changed(form: Form) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(population_training, "prepare_model", with_frozen_pooler))
        if form.modes is not None:
            stack.enter_context(mock.patch.object(tt, "plan_shape", partial(plan, form)))
        if form.start is not None:
            stack.enter_context(mock.patch.object(tuner_layer, "starting_cores", partial(start, form)))
        yield


def set_rates(form: Form, loop: Loop) -> None:
    """Give single cores of each train their own factor on the learning rate."""
    population = loop.population
    rates = loop.optimizer.rates.expand_as(population.values).clone()
    for name, where in population.slices.items():
        part = next((p for p in ("down", "up") if f"loretta_rep_{p}" in name), None)
        if part is None:
            continue
        module = name.partition(".loretta_rep_")[0]
        site: Any = next(s for group in population.groups for s in group.sites if module.endswith(_name(s)))
        shape = getattr(site.module.placements["default"], part)
        at = where.start
        for k, core in enumerate(shape.cores):
            size = math.prod(core)
            zero = part == "up" and k == len(shape.cores) - 1
            rates[:, at : at + size] *= form.rates.get("zero" if zero else "others", 1.0)
            at += size
    loop.optimizer.rates = rates


def _name(site: Any) -> str:
    return str(site.module.placements["default"].name)


class SharedGroup:
    """One train over layers and projections in place of those of the modules: ``(x L) G_layer G_projection R``.

    L, R and the small matrices lie in the places of the first modules' own trains, which are otherwise not read.
    """

    def __init__(self, group: TrainGroup, rank: int) -> None:
        self.group, self.sites, self.rank = group, group.sites, rank
        names = [_name(site) for site in group.sites]
        layers = [next(word for word in name.split(".") if word.isdecimal()) for name in names]
        kinds = [name.rpartition(".")[2] for name in names]
        self.layers, self.kinds = sorted(set(layers), key=int), sorted(set(kinds))
        self.of = [(self.layers.index(a), self.kinds.index(b)) for a, b in zip(layers, kinds, strict=True)]
        placement = group.placement
        self.sizes = placement.down.in_features, placement.up.out_features
        n = len(self.layers) + len(self.kinds)
        self.n_params = rank * (sum(self.sizes) + n * rank)
        down, up = group.parts["down"], group.parts["up"]  # (P, M, n)
        with torch.no_grad():
            eye = torch.eye(rank, device=down.device, dtype=down.dtype).flatten()
            for k in range(len(self.layers)):
                up[:, k, rank * self.sizes[1] :][:, : rank * rank] = eye
            for k in range(len(self.kinds)):
                down[:, k, rank * self.sizes[0] :][:, : rank * rank] = eye
            up[:, 0, : rank * self.sizes[1]] = 0

    def hand_over(self) -> None:
        rank, (wide_in, wide_out) = self.rank, self.sizes
        down, up = self.group.parts["down"], self.group.parts["up"]
        left = down[:, 0, : rank * wide_in].unflatten(1, (wide_in, rank))
        right = up[:, 0, : rank * wide_out].unflatten(1, (rank, wide_out))
        layer = up[:, : len(self.layers), rank * wide_out :][..., : rank * rank].unflatten(-1, (rank, rank))
        kind = down[:, : len(self.kinds), rank * wide_in :][..., : rank * rank].unflatten(-1, (rank, rank))
        for site, (k, j) in zip(self.sites, self.of, strict=True):
            site.factors = [(left, layer[:, k] @ kind[:, j] @ right * self.group.scale)]
            site.bias_up = None

    def take_back(self) -> None:
        self.group.take_back()


def split(task: str, source: Path, target: Path) -> None:
    """90 % of the official training data to train on and 10 % to score."""
    with gzip.open(source / task / "train.jsonl.gz", "rt") as file:
        rows = [line for line in file if line.strip()]
    random.Random(0).shuffle(rows)
    rows = rows[: ROWS.get(task, len(rows))]
    held_out = round(HELD_OUT * len(rows))
    (target / task).mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", rows[:held_out]), ("train", rows[held_out:])):
        with gzip.open(target / task / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(part)


def measure(form: Form, task: str, args: argparse.Namespace, data: Path, scratch: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    ours = form.method in ("rep", "adp")
    kind = json.loads((Path(args.model) / "config.json").read_text())["model_type"]
    head = {"train_head": "dense"} if ours else {}
    configs = [
        RunConfig(
            model=args.model,
            data=task,
            data_dir=str(data),
            method=form.method,
            method_args={**({"train_norms": False} if ours else {}), **head, **of_targets(form, kind), **form.options},
            epochs=args.epochs,
            max_steps=args.max_steps,
            max_length=LENGTHS[task],
            eval_steps=args.eval_steps,
            limit=args.limit,
            batch_size=32,
            learning_rate=rate,
            head_learning_rate=args.head_rate,
            eval_batch_size=256,
            logging_steps=args.logging_steps,
            seed=seed,
            bf16=not args.cpu,
            cuda_graph=not (args.cpu or args.eager),
            cpu=args.cpu,
            output=str(scratch / f"{rate}-{seed}"),
            head_policy="method",
        )
        for rate in args.rates or form.grid
        for seed in range(args.seeds)
    ]
    with changed(form):
        loop = prepare(configs, scratch)
        population = loop.population
        trained = {name: where.stop - where.start for name, where in population.slices.items()}
        head_count = sum(n for name, n in trained.items() if "classifier" in name or "score" in name)
        count = sum(trained.values()) - head_count
        if form.shared is not None:
            one_train = [SharedGroup(group, form.shared) for group in population.groups]
            count -= sum(n for name, n in trained.items() if "loretta_rep_down" in name or "loretta_rep_up" in name)
            count += sum(group.n_params for group in one_train)
            population.groups = one_train  # type: ignore[assignment]
        if form.rates:
            set_rates(form, loop)
        for split in loop.rows.values():
            split.longest = min(split.longest, LENGTHS[task])
            split.lengths = torch.full_like(split.lengths, split.longest)
        loop.train()
    found: dict[str, Any] = {"scores": {}, "train_loss": {}}
    for config, member in zip(configs, loop.members, strict=True):
        history = member.trainer.state.log_history
        key = "eval_" + str(loop.args.metric_for_best_model).removeprefix("eval_")
        scores = [entry[key] for entry in history if key in entry]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        rate = str(config.learning_rate)
        found["scores"].setdefault(rate, []).append(max(scores))
        quarter = max(1, len(losses) // 8)
        found["train_loss"].setdefault(rate, []).append(statistics.mean(losses[-quarter:]))
    row = {
        "model": Path(args.model).name, "task": task, "form": form.name, "count": count, "head": head_count,
        "epochs": args.epochs, "seeds": args.seeds, **found, "seconds": time.perf_counter() - begin,
        "torch": torch.__version__, "device": "cpu" if args.cpu else torch.cuda.get_device_name(),
    }  # fmt: skip
    rate, mean, sd = best_rate(row)
    print(f"{form.name:40} {task:5} {count:7,} best {mean:.4f} (sd {sd:.3f}) at {rate:g}", flush=True)
    del loop, population
    return row


def of_targets(form: Form, kind: str) -> dict[str, Any]:
    if form.targets is None:
        return {}
    names = (QV if form.targets == "qv" else ALL)[kind]
    return {"target_modules": names, "exclude_modules": ["pooler.dense", "classifier.dense"]}


def tt_form(modes: int, inner: int, cut: int, **more: Any) -> Form:
    name = more.pop("name", f"rep {modes} modes, inner {inner}, cut {cut}")
    options = {"r": cut, "tensor_rank": cut, "lora_alpha": 2 * cut, **more.pop("options", {})}
    return Form(name=name, modes=modes, inner=inner, cut=cut, options=options, **more)


def lora(rank: int, **more: Any) -> Form:
    options = {"r": rank, "lora_alpha": 2 * rank, **more.pop("options", {})}
    return Form(name=more.pop("name", f"LoRA r={rank}"), method="lora", options=options, **more)


def published(name: str, **more: Any) -> Form:
    options = {**more.pop("options", {})}
    return Form(name=name, options=options, **more)


def shared(rank: int, **more: Any) -> Form:
    name = more.pop("name", f"shared over layers, r={rank}")
    # a place for L or R and one small matrix in each module's own trains
    options = {"r": 2 * rank, "tensor_rank": rank, "lora_alpha": 2 * rank, **more.pop("options", {})}
    return Form(name=name, modes=1, cut=rank, shared=rank, options=options, **more)


GROUPS: dict[str, list[Form]] = {
    "baselines": [
        lora(1), lora(1, name="LoRA r=1 all linear", targets="all"), lora(2), lora(8),
        Form(name="norms", method="norms", targets=None), Form(name="adp", method="adp", targets=None),
        Form(name="adp + norms", method="adp", targets=None, options={"train_norms": True}),
    ],
    "shapes": [
        published("rep as published"), tt_form(2, 8, 1), tt_form(2, 4, 1), tt_form(2, 5, 5), tt_form(2, 8, 2),
        tt_form(1, 1, 1), tt_form(3, 8, 1),
    ],
    "all linear": [
        tt_form(2, 4, 1, name="rep 2 modes 4/1 all linear", targets="all"),
        tt_form(2, 8, 1, name="rep 2 modes 8/1 all linear", targets="all"),
        tt_form(2, 2, 1, name="rep 2 modes 2/1 all linear", targets="all"),
        published("rep as published all linear", targets="all"),
        shared(2, name="shared r=2 all linear", targets="all"),
        shared(8, name="shared r=8 all linear", targets="all"),
    ],
    "shared": [shared(4), shared(8), shared(16), shared(32)],
    "norms": [
        tt_form(1, 1, 1, name="LoRA r=1 (rep of one mode) + norms", options={"train_norms": True}),
        tt_form(2, 4, 1, name="rep 2 modes 4/1 + norms", options={"train_norms": True}),
        tt_form(2, 4, 1, name="rep 2 modes 4/1 all linear + norms", targets="all", options={"train_norms": True}),
        shared(8, name="shared r=8 + norms", options={"train_norms": True}),
        published("rep as published + norms", options={"train_norms": True}),
    ],
    "starts": [
        published("published, zero core at the cut", start="cut"),
        published("published, largest core zero", start="largest"),
        published("published, denoised", options={"init_weights": "denoised"}),
        tt_form(2, 8, 1, name="8/1, largest core zero", start="largest"),
        tt_form(2, 8, 1, name="8/1, zero core at the cut", start="cut"),
    ],
    "rates": [
        published("published, zero core x8", rates={"zero": 8.0}),
        published("published, other cores x4", rates={"others": 4.0}),
        published("published, scale x4", options={"lora_alpha": 64}),
        published("published, scale /4", options={"lora_alpha": 4}),
        tt_form(2, 8, 1, name="8/1, zero core x4", rates={"zero": 4.0}),
        tt_form(2, 8, 1, name="8/1, scale x4", options={"lora_alpha": 8}),
        tt_form(2, 8, 1, name="8/1, scale /4", options={"lora_alpha": 0.5}),
        shared(8, name="shared r=8, scale x4", options={"lora_alpha": 64}),
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["cola", "mrpc", "stsb"], choices=list(LENGTHS))
    parser.add_argument("--group", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--only", nargs="+", help="names of forms")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates in place of a form's own")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--eval-steps", type=int)
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--head-rate", type=float, default=1e-2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs; MPNet's positions forbid them")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no form after that time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    forms: list[Form] = [form for group in args.group for form in GROUPS[group]]
    if args.only:
        forms = sorted((form for form in forms if form.name in args.only), key=lambda form: args.only.index(form.name))
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(row["form"], row["task"], row["model"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        data, scratch = Path(folder) / "data", Path(folder) / "runs"
        for task in args.tasks:
            split(task, args.data_dir, data)
            for form in forms:
                if (form.name, task, Path(args.model).name) in done or time.perf_counter() - begin > args.seconds:
                    continue
                try:
                    rows.append(measure(form, task, args, data, scratch))
                except Exception as error:
                    print(f"{form.name:38} {task:5} failed: {type(error).__name__}: {error}", flush=True)
                    continue
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
