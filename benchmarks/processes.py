"""One GPU beside two: loss curves, seconds per step with DDP and FSDP2, and a model that fits on two alone.

python benchmarks/processes.py --model FOLDER --data-dir FOLDER --out FILE

Parts, each started by torchrun: "losses" trains CoLA through `loretta train`'s own function by one process and by two
at the same global batch, with DDP, "sharded" with FSDP2; "steps" times a 1B LLaMA of random weights; "large" a 70B one,
whose weights are made shard by shard, beside its frozen floor. The file is written after each row. Where there is one
GPU, two processes share it over gloo: that shows that the losses agree, and no time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_steps import FLOOR, Row, Stepped, device, wait
from timing import about
from transformers import TrainerCallback

from loretta.training import run as runs
from loretta.training.config import RunConfig

TRAINED = ("rep", "adp", "compact", "lora")
STEPPED = (FLOOR, "lora q,v", "rep q,v", "adp")
LARGE = (FLOOR, "lora q,v", "rep q,v", "adp")


@contextmanager
def others_go_on() -> Iterator[None]:
    """An error is shown, and the next method or part begins."""
    try:
        yield
    except Exception:
        traceback.print_exc()


# ---- losses


class Pace(TrainerCallback):
    """Seconds of a step, from the ``first`` one on that counts to the last, without evaluations."""

    def __init__(self, first: int) -> None:
        self.first, self.begin, self.seconds = first, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.first, state.max_steps):
            wait()
            now = time.perf_counter()
            if state.global_step == self.first:
                self.begin = now
            else:
                self.seconds = (now - self.begin) / (state.max_steps - self.first)


def without_dropout(model: str, folder: Path) -> str:
    """A copy of a model whose steps draw no random numbers, and agree on any number of processes."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def losses(options: argparse.Namespace, keep: Callable[[Row], None], *, sharded: bool = False) -> None:
    """Train each method on ``options.data`` by the processes that are there."""
    world = int(os.environ["WORLD_SIZE"])
    for launch in ("one",) if world == 1 else ("fsdp2",) if sharded else ("ddp",):
        for method in TRAINED:
            pace = Pace(first=options.steps // 3)
            make = runs.make_trainer

            def with_pace(*args: Any, make: Any = make, pace: Pace = pace) -> Any:
                trainer = make(*args)
                trainer.add_callback(pace)
                return trainer

            runs.make_trainer = with_pace
            config = RunConfig(
                model=options.plain_model,
                data=options.data,
                data_dir=options.data_dir,
                method=method,
                output=str(Path(options.work) / f"{launch}-{method}"),
                max_steps=options.steps,
                eval_steps=options.steps,
                batch_size=options.batch_size,
                logging_steps=1,
                limit=options.limit,
                fsdp=launch == "fsdp2",
            )
            record = None
            with others_go_on():
                record = runs.train(config, say=lambda line: None)
            runs.make_trainer = make
            if record is None:
                continue
            history = [point.values["loss"] for point in record.history if point.split == "train"]
            keep(
                {
                    "part": "losses",
                    "launch": launch,
                    "processes": world,
                    "method": method,
                    "seconds_per_step": pace.seconds,
                    "losses": history,
                    "validation": record.validation,
                    "peak_bytes": record.peak_memory_bytes,
                }
            )


# ---- steps


def steps(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """All methods of a launch take turns, for the machine's speed moves."""
    for launch in ("one",) if int(os.environ["WORLD_SIZE"]) == 1 else options.launches:
        with others_go_on():
            methods = [Stepped.built(options, options.small, method, launch, "steps") for method in STEPPED]
            for number in range(options.rounds):
                for each in methods[:: -1 if number % 2 else 1]:
                    each.run(options.times)
            for each in methods:
                keep(each.result())
            del methods, each


def large(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    for method in LARGE:
        with others_go_on():
            alone = Stepped.built(options, options.large, method, "fsdp2", "large")
            alone.run(options.times)
            keep(alone.result())
            del alone


PARTS: dict[str, Callable[..., None]] = {
    "losses": losses,
    "steps": steps,
    "large": large,
    "sharded": partial(losses, sharded=True),
}

# ---- starting them


@contextmanager
def joined() -> Iterator[None]:
    """The processes of this launch, for all parts that they do."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    each_has_a_gpu = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if each_has_a_gpu else "gloo")
    yield
    dist.destroy_process_group()


def work(options: argparse.Namespace) -> None:
    """In a process of torchrun: the parts that were asked for, each row into a file of its own."""

    def keep(row: Row) -> None:
        if os.environ["RANK"] == "0":
            with Path(options.rows).open("a") as file:
                file.write(json.dumps(row) + "\n")

    with joined():
        for part in options.parts:
            with others_go_on():
                PARTS[part](options, keep)


def start(options: argparse.Namespace, processes: int, parts: list[str], gpus: str) -> subprocess.Popen:
    rows = Path(options.work) / f"rows-{processes}-{'-'.join(parts)}.jsonl"
    own = {
        name: getattr(options, name)
        for name in ("plain_model", "data", "data_dir", "work", "steps", "batch_size", "limit", "small", "large")
    }
    words = [word for name, value in own.items() if value is not None for word in (f"--{name}", str(value))]
    words += ["--times", str(options.times), "--rounds", str(options.rounds), "--launches", *options.launches]
    words += ["--layers", str(options.layers)] if options.layers else []
    words += ["--size", *map(str, options.size)] if options.size else []
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(processes), __file__),
        *(*words, "--rows", str(rows), "--parts", *parts),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device() == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.split(",")[: torch.cuda.device_count()])
    return subprocess.Popen(command, env=environment)


def stopped(processes: list[subprocess.Popen], until: float, after: Callable[[], None]) -> None:
    """Wait for the processes, at most ``until``, and write what there is every few seconds."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > until:
            for process in processes:
                process.terminate()
        time.sleep(1)
        after()


def summary(rows: list[Row]) -> list[Row]:
    """The largest difference of each loss curve from that of one process, and its step beside that."""
    alone = {row["method"]: row for row in rows if row["part"] == "losses" and row["launch"] == "one"}
    found = []
    for row in rows:
        if row["part"] != "losses" or row["launch"] == "one" or row["method"] not in alone:
            continue
        one = alone[row["method"]]
        pairs = list(zip(row["losses"], one["losses"], strict=True))
        found.append(
            {
                "launch": row["launch"],
                "method": row["method"],
                "largest_difference": max(abs(a - b) for a, b in pairs),
                "difference_of_first_20": max(abs(a - b) for a, b in pairs[:20]),
                "seconds_per_step": row["seconds_per_step"],
                "of_one_process": one["seconds_per_step"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="cola")
    parser.add_argument("--data-dir", "--data_dir", dest="data_dir")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/processes.json"))
    parser.add_argument("--seconds", type=float, default=220.0, help="All ends then.")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--batch-size", "--batch_size", dest="batch_size", type=int, default=32)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--times", type=int, default=5, help="Steps of a turn that are timed.")
    parser.add_argument("--rounds", type=int, default=4, help='Turns of each method in "steps".')
    parser.add_argument("--launches", nargs="+", default=["ddp", "fsdp2"], choices=("ddp", "fsdp2"))
    parser.add_argument("--small", default="llama-1b")
    parser.add_argument("--large", default="llama-70b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", type=int, nargs=2, metavar=("BATCH", "TOKENS"))
    parser.add_argument("--parts", nargs="+", default=["losses", "steps", "large", "sharded"], choices=PARTS)
    parser.add_argument("--plain_model", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows is not None:
        work(options)
        return
    until = time.monotonic() + options.seconds
    own = {"losses" if part == "sharded" else part for part in options.parts}
    known = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    known = [row for row in known if row["part"] not in own]  # those of parts that are not measured now stay
    with tempfile.TemporaryDirectory() as options.work:
        if {"losses", "sharded"} & {*options.parts}:
            options.plain_model = without_dropout(options.model, Path(options.work) / "model")

        def write() -> None:
            found = [json.loads(line) for f in sorted(Path(options.work).glob("rows-*")) for line in f.open()]
            rows = [*known, *found]
            content = {**about(device(), "bfloat16"), "rows": rows, "summary": summary(rows)}
            options.out.write_text(json.dumps(content, indent=1) + "\n")

        alone = [part for part in options.parts if part in ("losses", "steps")]
        # one process of each part, each on a GPU of its own
        gpus = [str(k % max(1, torch.cuda.device_count())) for k in range(len(alone))]
        stopped([start(options, 1, [part], gpu) for part, gpu in zip(alone, gpus, strict=True)], until, write)
        for part in options.parts:  # each on its own: a process that has lost the others in one waits for them
            stopped([start(options, 2, [part], "0,1")], until, write)
        write()
    content = json.loads(options.out.read_text())
    for row in content["rows"]:
        print(
            f"{row['part']:7} {row['launch']:6} {row['method']:9} {1e3 * row['seconds_per_step']:9.1f} ms a step, "
            f"{row['peak_bytes'] / 2**30:6.1f} GiB"
        )
    for row in content["summary"]:
        print(f"{row['launch']:6} {row['method']:9} losses differ by at most {row['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
