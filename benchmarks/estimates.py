"""What --dry-run says of a run against the run itself: parameters, file, steps, time and memory.

Each case is a process of its own, on one thread of the CPU, whose rate is measured right before it trains. Seconds are
those of the processor, without loading, so that others on the machine do not count. MODELS is a folder with those of
all-MiniLM-L6-v2, stories260K and SmolLM2-135M-Instruct.

    python benchmarks/estimates.py --models MODELS --data-dir DATA --texts FILE.jsonl --out FILE.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MINILM, STORIES, SMOLLM = "all-MiniLM-L6-v2", "stories260K", "SmolLM2-135M-Instruct"
LONG = {"max_length": 256, "batch_size": 8, "limit": 240}
CASES: dict[str, dict[str, Any]] = {
    "short texts": {"model": MINILM, "data": "sst2", "limit": 640},
    "short texts, batches of 64": {"model": MINILM, "data": "sst2", "limit": 1280, "batch_size": 64},
    "short texts, all weights": {"model": MINILM, "data": "sst2", "limit": 320, "method": "ft"},
    "scores of pairs": {"model": MINILM, "data": "stsb", "limit": 640, "method": "lora"},
    "long pairs": {"model": MINILM, "data": "rte", **LONG},
    "long pairs, checkpointing": {"model": MINILM, "data": "rte", "gradient_checkpointing": True, **LONG},
    "long pairs, adp": {"model": MINILM, "data": "rte", "method": "adp", **LONG},
    "tags": {"model": MINILM, "data": "TAGS", "limit": 320},
    "choices by prompt": {
        "model": STORIES, "data": "copa", "batch_size": 8, "sample": {"train": 200, "validation": 50},
    },
    "language modelling": {"model": STORIES, "data": "TEXTS", "max_length": 256, "limit": 200},
    "language modelling, 49,152 words": {
        "model": SMOLLM, "data": "TEXTS", "limit": 40, "max_steps": 4, "batch_size": 4, "eval_batch_size": 4,
    },
}  # fmt: skip


def _tags(texts: Path, out: Path) -> None:
    """Tokens of the texts, tagged by whether they begin with a capital."""
    with out.open("w") as file:
        for line in texts.read_text().splitlines():
            tokens = json.loads(line)["text"].split()[:60]
            tags = ["UPPER" if token[0].isupper() else "LOWER" for token in tokens]
            print(json.dumps({"tokens": tokens, "tags": tags}), file=file)


def measure(raw: dict[str, Any]) -> dict[str, Any]:
    """The estimate of a run, then the run."""
    import torch
    import transformers  # noqa: F401  what is imported before counts as the process itself

    from loretta.memory import free_memory, peak_memory
    from loretta.studies.configs import total_steps
    from loretta.studies.lengths import lengths_of
    from loretta.studies.sizes import USE_OF_PEAK, memory, size_of, step_seconds
    from loretta.training.config import RunConfig
    from loretta.training.folder import ADAPTER
    from loretta.training.run import train
    from loretta.training.trainer import TwoRateTrainer

    torch.set_num_threads(1)
    config = RunConfig(**raw)
    size, lengths, steps = size_of(config, config.model), lengths_of(config), total_steps(config.model_dump())
    x = torch.ones(1024, 1024)
    rates = []
    for _ in range(8):  # as loretta.studies.sizes does, in seconds of the processor
        begin = time.process_time()
        x @ x
        rates.append(USE_OF_PEAK * 2 * 1024**3 / (time.process_time() - begin))
    seconds, whole = [], TwoRateTrainer.train

    def timed(self: TwoRateTrainer, *given: Any, **named: Any) -> Any:
        begin = time.process_time()
        done = whole(self, *given, **named)
        seconds.append(time.process_time() - begin)
        return done

    TwoRateTrainer.train = timed  # type: ignore[method-assign]
    free_memory()
    record = train(config, say=lambda line: None)
    peak = peak_memory()  # of the whole process
    files = (Path(config.output) / ADAPTER).glob("*.safetensors")
    estimate = {
        "parameters": size.trained,
        "file_bytes": 4 * size.saved,
        "steps": steps,
        "seconds": steps * step_seconds(size, config, lengths, max(rates)),
        "memory_bytes": memory(size, config, lengths),
    }
    run = {
        "parameters": record.parameters.trainable,
        "file_bytes": sum(file.stat().st_size for file in files),
        "steps": max(point.step for point in record.history),
        "seconds": seconds[0],
        "memory_bytes": peak,
        "recorded_memory_bytes": record.peak_memory_bytes,
    }
    ratios = {name: estimate[name] / run[name] for name in estimate}
    return {"method": config.method, "longest": lengths.longest, "estimate": estimate, "run": run, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--texts", type=Path, help="JSON Lines with a 'text' each.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return
    import torch
    from timing import about

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        _tags(args.texts, tags := Path(place) / "tags.jsonl")
        for name, case in CASES.items():
            raw = {"epochs": 1.0, "cpu": True, "output": f"{place}/{name}", **case}
            raw["model"] = str(args.models / case["model"])
            if case["data"] in ("TAGS", "TEXTS"):
                raw["data"] = str(tags if case["data"] == "TAGS" else args.texts)
                raw["kind"] = "token_classification" if case["data"] == "TAGS" else "language_modeling"
            else:
                raw["data_dir"] = str(args.data_dir)
            command = [sys.executable, __file__, "--one", json.dumps(raw)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            row = {"case": name, "model": case["model"], **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            print(f"{name:34}", *(f"{key} {value:.2f}" for key, value in row["ratios"].items()), flush=True)
            head = about("cpu", "float32")
            args.out.write_text(
                json.dumps({**head, "threads": 1, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
