"""Training on two GPUs by torch's DataParallel, which transformers' Trainer chooses by itself where it sees several.

Each method trains a small classifier on random rows for some steps, with its norms and head, on all GPUs and on one, at
the same rows an update: losses and trained numbers have to agree. Nothing is drawn at random within a step. Where there
is no GPU, or one, the same is run on it twice: that tries the script.

    python benchmarks/data_parallel.py --out benchmarks/results/data_parallel.json
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model
from timing import about
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loretta import LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig

ROWS, TOKENS, VOCABULARY = 16, 24, 200
TASK = TaskType.SEQ_CLS
METHODS: dict[str, PeftConfig] = {
    "rep": LorettaRepConfig(task_type=TASK),
    "adp": LorettaAdpConfig(task_type=TASK),
    "shared": LorettaSharedConfig(task_type=TASK),
    "compact": LorettaRepConfig.compact(task_type=TASK),
    "lora": LoraConfig(r=8, task_type=TASK),
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODELS = {"bert": BertConfig(**SIZES), "roberta": RobertaConfig(**SIZES, max_position_embeddings=64)}


class Random(Dataset):
    """Rows whose label says whether a number stands in them."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, VOCABULARY, (rows, TOKENS), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.ids[row]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids > 180).any().long()}


def train(model: nn.Module, gpus: int, steps: int, folder: str) -> tuple[list[float], bool, float]:
    """The loss of each step, whether DataParallel ran, and the seconds of a step."""
    options = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS // gpus,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        average_tokens_across_devices=False,
        use_cpu=not torch.cuda.is_available(),
    )
    options._n_gpu = gpus if torch.cuda.is_available() else 0
    trainer = Trainer(model=model, args=options, train_dataset=Random(ROWS * steps))
    trainer.model_accepts_loss_kwargs = False  # a classifier divides its loss by the rows of one GPU, not by all
    begin = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - begin) / steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, isinstance(trainer.model_wrapped, DataParallel), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    gpus = max(1, torch.cuda.device_count())
    rows = []
    for name in args.models:
        for method in args.methods:
            set_seed(0)
            base = AutoModelForSequenceClassification.from_config(MODELS[name])
            start = get_peft_model(base, METHODS[method])
            found: list[dict[str, Tensor]] = []
            row: dict[str, Any] = {"model": name, "method": method, "gpus": gpus, "steps": args.steps}
            try:
                for count in (1, gpus):
                    model = copy.deepcopy(start)
                    with tempfile.TemporaryDirectory() as folder:
                        losses, parallel, seconds = train(model, count, args.steps, folder)
                    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
                    found.append({key: value.detach().cpu() for key, value in trained.items()})
                    here = "one" if len(found) == 1 else "all"
                    row |= {f"losses_{here}": losses, f"seconds_{here}": seconds, "data_parallel": parallel}
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            else:
                one, several = found
                pairs = zip(row["losses_one"], row["losses_all"], strict=True)
                row["losses_differ_by"] = max(abs(a - b) for a, b in pairs)
                apart = torch.cat([(one[key] - several[key]).flatten() for key in one]).norm()
                moved = torch.cat(
                    [
                        (one[key] - value.detach().cpu()).flatten()
                        for key, value in start.named_parameters()
                        if key in one
                    ]
                ).norm()
                row["trained"] = sum(value.numel() for value in one.values())
                row["numbers_differ_by"] = float(apart / moved)  # of the way that they went
            rows.append(row)
            print(
                {key: value for key, value in row.items() if not key.startswith("losses_") or "differ" in key},
                flush=True,
            )
            args.out.write_text(json.dumps({**about("cuda" if torch.cuda.is_available() else "cpu", "float32"),
                                            "rows": rows}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
