"""Kill runs at random moments, go on with them, and compare with the run that nobody killed.

    python benchmarks/reliability.py --kills 50 --out benchmarks/results/reliability.json

A kill is SIGKILL, at a random call to the file system (so that many fall into saves and the final write) or after a
random time (steps, evaluations, and the writes that Python does not see). Each run is killed once or twice, goes on,
and must end with the bytes of the adapter, the log and the scores of the uninterrupted run. What else lies in its
folder, the model and the data must be as they were. Then comes what grows in long runs, and fuzzing. `make tables`
writes docs/reliability.md from the file and that of `make fuzz`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

METHODS = ("rep", "adp", "shared", "lora")
KINDS = ("classification", "language modelling")
MOST_MIB = 1.0  # that 200 adapters, or 1,000 steps, may leave behind
ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "reliability.md"


def make_inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Tiny models of words and data for them: kind -> options of a run."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = ["[PAD]", "[UNK]", *(f"w{k}" for k in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    set_seed(0)
    BertModel(BertConfig(vocab_size=32, **sizes)).save_pretrained(folder / "bert")
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder / "llama")
    for name in ("bert", "llama"):
        fast.save_pretrained(folder / name)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words[2:], k=8)) for _ in range(64)]
    (folder / "table.csv").write_text("text,label\n" + "".join(f"{text},{'w1' in text}\n" for text in texts))
    (folder / "text.txt").write_text("\n\n".join(texts))
    options = {"epochs": 2, "learning_rate": 1e-2, "max_length": 16, "logging_steps": 3, "eval_steps": 4, "cpu": True}
    table = {"data": str(folder / "table.csv"), "text": "text", "label": "label", "test": str(folder / "table.csv")}
    return {
        "classification": {"model": str(folder / "bert"), **table, **options},
        "language modelling": {"model": str(folder / "llama"), "data": str(folder / "text.txt"), **options},
    }


def train_until(options: dict[str, Any], at_call: int | None, after: float | None, calls: Any) -> None:
    """In a process of its own: train, and be killed at a call to the file system or after some seconds."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  for as long as the process lives
    from loretta.training.config import RunConfig
    from loretta.training.run import train

    folder = options["output"]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(arguments[0]).startswith(folder):
            calls.value += 1
            if calls.value == at_call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if after is not None:
        timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    train(RunConfig(**options), resume=True)


def run(options: dict[str, Any], *, at_call: int | None = None, after: float | None = None) -> tuple[int, int, float]:
    """The exit status of a run in a process of its own, its calls to the file system, and its seconds."""
    fork = multiprocessing.get_context("fork")
    calls, start = fork.Value("i", 0), time.perf_counter()
    process = fork.Process(target=train_until, args=(options, at_call, after, calls))
    process.start()
    process.join()
    return process.exitcode or 0, calls.value, time.perf_counter() - start


def result(folder: Path) -> dict[str, Any]:
    """What must be the same: the bytes of the adapter, the log, the scores and the predictions."""
    record = json.loads((folder / "run.json").read_text())
    predictions = folder / "predictions.jsonl"
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes().hex(),
        "predictions": predictions.read_text() if predictions.is_file() else None,
        **{name: record[name] for name in ("history", "best_step", "validation", "test")},
    }


def measure(
    n_kills: int, root: Path, *, seed: int = 0, methods=METHODS, kinds=KINDS, accumulate=(1, 2)
) -> list[dict[str, Any]]:
    """Kill ``n_kills`` runs, spread over all cases, and go on with each. One row a run."""
    import loretta.training.run  # noqa: F401  once, for all the processes that are forked from this one

    draw, inputs, rows = random.Random(seed), make_inputs(root), []
    cases = [(method, kind, n) for method in methods for kind in kinds for n in accumulate]
    whole: dict[Any, tuple[dict[str, Any], int, float]] = {}
    for k in range(n_kills):
        method, kind, n = case = cases[k % len(cases)]
        # of batches of the same examples together
        options = {**inputs[kind], "method": method, "accumulate": n, "batch_size": 8 // n}
        if case not in whole:
            folder = root / f"{method}-{kind}-{n}"
            status, calls, seconds = run({**options, "output": str(folder)})
            assert status == 0, f"the uninterrupted run of {case} ended with {status}"
            whole[case] = result(folder), calls, seconds
        expected, calls, seconds = whole[case]
        folder, killed, moments = root / f"killed-{k}", 0, []
        precious = files_below(Path(inputs[kind]["model"]), *root.glob("t*.*"))
        for attempt in range(draw.choice((1, 1, 2))):
            by_call = draw.random() < 0.6
            moment = {"at_call": draw.randrange(1, calls)} if by_call else {"after": draw.uniform(0.2, seconds)}
            status, _, _ = run({**options, "output": str(folder)}, **moment)
            killed += status == -signal.SIGKILL
            moments.append(moment)
            assert status in (0, -signal.SIGKILL), f"{case} ended with {status} after {moments}"
            if (folder / "config.json").is_file():  # what somebody keeps beside a run
                (note := folder / f"note-{attempt}.bin").write_bytes(draw.randbytes(4096))
                precious |= files_below(note)
        status, _, _ = run({**options, "output": str(folder)})
        found = result(folder) if status == 0 else {}
        different = [name for name in expected if found.get(name) != expected[name]]
        now = files_below(*precious)
        lost = sum(size for path, (size, digest) in precious.items() if now.get(path) != (size, digest))
        left = [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]
        row = {"method": method, "kind": kind, "accumulate": n, "kills": killed, "moments": moments}
        rows.append({**row, "status": status, "different": different, "bytes_lost": lost, "temporaries": left})
        print(k, rows[-1], flush=True)
    return rows


def files_below(*paths: Path) -> dict[Path, tuple[int, str]]:
    """The size and the digest of each file that is there, at or below the paths."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return {file: (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


def measure_growth(root: Path, *, adapters: int = 300, steps: int = 4_000) -> dict[str, Any]:
    """The growth of this process's memory, in MiB, by what should leave nothing behind.

    Args:
        adapters: how many are loaded onto one model and deleted again; counted are the later two thirds.
        steps: of one run; counted is the slope over its second half, for 1,000 steps.
    """
    import numpy as np
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, TrainerCallback

    import loretta.training.run as runs
    from loretta import LorettaRepConfig, get_peft_model

    options = make_inputs(root)["language modelling"]
    base, again = (AutoModelForCausalLM.from_pretrained(options["model"]) for _ in range(2))
    get_peft_model(base, LorettaRepConfig(task_type="CAUSAL_LM")).save_pretrained(root / "adapter")
    model, sizes = PeftModel.from_pretrained(again, root / "adapter"), []
    for k in range(adapters):
        model.load_adapter(root / "adapter", f"number{k}")
        model.delete_adapter(f"number{k}")
        sizes.append(resident_mib())
    watched: list[tuple[int, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 20 == 0:
                watched.append((state.global_step, resident_mib()))

    def make_watched(*given: Any) -> Any:
        trainer = make(*given)
        trainer.add_callback(Watch())
        return trainer

    make, runs.make_trainer = runs.make_trainer, make_watched
    try:
        long = {"max_steps": steps, "eval_steps": steps, "logging_steps": 100, "output": str(root / "long")}
        runs.train(runs.RunConfig(**{**options, **long}))
    finally:
        runs.make_trainer = make
    second = np.array(watched[len(watched) // 2 :])
    slope = float(np.polyfit(second[:, 0], second[:, 1], 1)[0]) * 1_000
    of_adapters = {"adapters": adapters, "adapters_mib": round(sizes[-1] - sizes[adapters // 3], 3)}
    return {**of_adapters, "steps": steps, "mib_per_1000_steps": round(slope, 4)}


def subfolder(folder: str, name: str) -> Path:
    """A new folder in a folder."""
    (new := Path(folder) / name).mkdir()
    return new


def resident_mib() -> float:
    """Memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def page(results: dict[str, Any], night: dict[str, Any]) -> str:
    """docs/reliability.md, from reliability.json and the fuzz.json of ``make fuzz``."""
    hit = sum(row["kills"] > 0 for row in results["rows"])
    lines = [
        "# Reliability",
        "",
        "Written by `make tables` from `benchmarks/results/reliability.json` (`make reliability`) and `fuzz.json` "
        "(`make fuzz`).",
        "",
        f"{hit} of {results['runs']} runs were killed, {results['kills']} times in all, with SIGKILL at random "
        "moments, and went on with `--resume` (the moment of the others came behind their end). "
        f"{results['same']} of {results['runs']} ended with the bytes of the adapter, the log and the scores of the "
        f"run that nobody killed, and left no temporary file.{_lost(results)}",
        "",
        *_when(results),
    ]
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        cases.setdefault((row["method"], row["kind"], row["accumulate"]), []).append(row)
    counted = [
        [method, kind, n, len(rows), sum(row["kills"] for row in rows), sum(map(is_same, rows))]
        for (method, kind, n), rows in cases.items()
    ]
    frame = pd.DataFrame(counted, columns=["method", "task", "accumulated batches", "runs", "kills", "the same"])
    return "\n".join(
        [*lines, frame.to_markdown(index=False), *_files_of_others(results["fuzz"], night), *_long_runs(results), ""]
    )


def _lost(results: dict[str, Any]) -> str:
    """Nothing for results of a version that did not count."""
    if "bytes_lost" not in results:
        return ""
    return f" Of the models, the data and what lay beside the runs, {results['bytes_lost']:,} bytes were lost."


def _when(results: dict[str, Any]) -> list[str]:
    if "commit" not in results:
        return []
    return [f"All parts were measured together, at commit {results['commit']} (loretta {results['version']}).", ""]


def _files_of_others(fuzz: dict[str, Any], night: dict[str, Any]) -> list[str]:
    counted = [[kind, found.get("taken", 0), found.get("refused", 0)] for kind, found in night["outcomes"].items()]
    return [
        "",
        "## Files of others",
        "",
        f"{fuzz['inputs']:,} damaged and hostile files beside the kills: {_outcome(fuzz)}. {night['inputs']:,} by "
        f"`make fuzz`: {_outcome(night)}. The others were taken, or refused in one sentence:",
        "",
        pd.DataFrame(counted, columns=["files", "taken", "refused"]).to_markdown(index=False),
    ]


def _outcome(fuzz: dict[str, Any]) -> str:
    return (
        f"{fuzz['tracebacks']} tracebacks, {fuzz['hangs']} that took more than five seconds, "
        f"{fuzz['peak_growth_gib']:.2f} GiB of memory at most"
    )


def _long_runs(results: dict[str, Any]) -> list[str]:
    growth = results["growth"]
    return [
        "",
        "## Long runs",
        "",
        f"{growth['adapters']} adapters were loaded and deleted: memory grew by {growth['adapters_mib']:.2f} MiB over "
        f"the later two thirds. {growth['steps']:,} steps were trained: it grew by {growth['mib_per_1000_steps']:.3f} "
        "MiB for 1,000 steps over the second half.",
    ]


def is_same(row: dict[str, Any]) -> bool:
    """Whether a killed run ended as the uninterrupted one, left no temporary file, and took nothing along."""
    return row["status"] == 0 and not row["different"] and not row["temporaries"] and not row.get("bytes_lost")


def commit_of(folder: Path) -> str:
    """The commit that is checked out, and whether files differ from it, but for results and documents."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    return f"{git('rev-parse', '--short=10', 'HEAD') or 'unknown'}{' with changes' if changed else ''}"


def main() -> None:
    """Measure, or write the page from what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=12_000, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.out is None:
        files = (ROOT / "benchmarks" / "results" / name for name in ("reliability.json", "fuzz.json"))
        DOC.write_text(page(*(json.loads(file.read_text()) for file in files)))
        return
    from fuzz import GIB, fuzz

    import loretta

    commit = commit_of(ROOT)
    # at once, each in a process of its own
    with (
        ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool,
        tempfile.TemporaryDirectory() as folder,
    ):
        fuzzed = pool.submit(fuzz, arguments.inputs, arguments.seed)
        grown = pool.submit(measure_growth, subfolder(folder, "growth"))
        halves = [
            pool.submit(
                measure,
                (arguments.kills + k) // 2,
                subfolder(folder, f"kills{k}"),
                seed=arguments.seed + k,
                methods=METHODS[k::2],
            )
            for k in range(2)
        ]
        rows = [row for half in halves for row in half.result()]
        growth, tried = grown.result(), fuzzed.result()
    results = {
        "commit": commit,
        "version": loretta.__version__,
        "runs": len(rows),
        "kills": sum(row["kills"] for row in rows),
        "same": sum(map(is_same, rows)),
        "bytes_lost": sum(row["bytes_lost"] for row in rows),
        "seed": arguments.seed,
        "growth": growth,
        "fuzz": {name: value for name, value in tried.items() if name != "failures"},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    is_flat = growth["adapters_mib"] < MOST_MIB and growth["mib_per_1000_steps"] < MOST_MIB
    is_safe = not tried["failures"] and tried["peak_growth_gib"] < GIB
    sys.exit(not (results["same"] == results["runs"] and is_flat and is_safe))


if __name__ == "__main__":
    main()
