"""The one training loop: Hugging Face's Trainer between a task and a run folder."""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import resource
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import loretta
from loretta.errors import InputError
from loretta.plan.base_models import default_task_type, find_config
from loretta.plan.counts import trainable_by_kind
from loretta.plan.plan import read_plan
from loretta.tasks import load_task, metrics
from loretta.tasks.base import Task
from loretta.tasks.glue import GLUE
from loretta.tasks.prompted import PROMPTED, PromptedTask, Sample, load_prompted
from loretta.training.batches import stop_workers
from loretta.training.config import RunConfig
from loretta.training.graphs import CudaGraphTrainer
from loretta.training.methods import FULL, find_method
from loretta.training.model import TASK_TYPES, Trained, load_base, load_tokenizer, start_from, wrap
from loretta.training.prompted import PromptedTrainer, Texts, encode_task, notes_on_length
from loretta.training.record import ParameterCounts, Point, RunRecord, Train
from loretta.training.trainer import TwoRateTrainer, training_arguments
from loretta.tuners.card import write_card
from loretta.tuners.config import LorettaConfig

ADAPTER, CHECKPOINTS, CONFIG, PREDICTIONS = "adapter", "checkpoints", "config.json", "predictions.jsonl"
TEMPORARY = ".tmp"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> RunRecord:
    """Train as ``config`` says and write the run folder.

    It holds ``adapter/``, ``run.json`` and, where there is a test split, its ``predictions.jsonl``.

    Everything that a user can get wrong is checked before anything is written. ``resume`` goes on from the last
    checkpoint in the folder (a finished run is returned as it is); ``overwrite`` replaces what the folder holds.

    Raises InputError for input that the user can mend.
    """
    folder = config.folder
    if (finished := _claim(folder, config, resume=resume, overwrite=overwrite)) is not None:
        return finished
    if config.tensorboard:
        _need_tensorboard()
    method = find_method(config.method)
    task = load_config_task(config)
    check_loss(config, task)
    before = None if config.start_from is None else find_start(config, task)
    tokenizer = load_tokenizer(config.model)
    set_seed(config.seed)
    base = load_base(
        config.model if before is None or method is not FULL else str(before),
        task.kind,
        label_names=task.label_names,
        dtype=config.dtype,
        quantize=config.quantize,
        cpu=config.cpu,
        pad_token_id=tokenizer.pad_token_id,
    )
    half = method is FULL and base.dtype != torch.float32
    if half:
        # the small steps of the weights themselves would be lost: compute in half precision, train in float32
        base = base.float()
    model = wrap(base, config.method, task.kind, config.method_args, config.head_policy)
    if before is not None and isinstance(model, PeftModel):
        start_from(model, before)
    encoded = encode_splits(config, task, tokenizer)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.model_dump())

    computed = config.model_copy(update={"bf16": config.bf16 or half})
    trainer = make_trainer(computed, task, model, tokenizer, encoded)
    memory = peak_memory()
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / CHECKPOINTS)) if resume else None)
        seconds = trainer.stopwatch.seconds
        if torch.cuda.is_available() and not config.cpu:
            memory = 0
        return _finish(config, task, trainer, encoded, seconds=seconds, memory=peak_memory() - memory)
    finally:
        stop_workers(trainer)


def find_start(config: RunConfig, task: Task | PromptedTask) -> Path:
    """The adapter that the training starts from: the one of the run ``config.start_from``.

    Raises InputError when that is no finished run, or not one of the same model, method and labels.
    """
    folder = Path(str(config.start_from))
    record = RunRecord.load(folder / "run.json")
    earlier = RunConfig(**record.config)
    labels = len(record.label_names), len(task.label_names)
    different = [
        f"{what} was {then!r} and is {now!r}"
        for what, then, now, same in (
            ("model", earlier.model, config.model, earlier.model == config.model),
            ("method", earlier.method, config.method, find_method(earlier.method) == find_method(config.method)),
            ("method_args", earlier.method_args, config.method_args, earlier.method_args == config.method_args),
            ("head_policy", earlier.head_policy, config.head_policy, earlier.head_policy == config.head_policy),
            (
                "the kind of model",
                TASK_TYPES[record.kind],
                TASK_TYPES[task.kind],
                TASK_TYPES[record.kind] == TASK_TYPES[task.kind],
            ),
            ("the number of labels", *labels, TASK_TYPES[task.kind] == "CAUSAL_LM" or labels[0] == labels[1]),
        )
        if not same
    ]
    if different:
        raise InputError(
            f"cannot start from '{folder}' ({'; '.join(different)}): give a run that differs in its data alone"
        )
    return folder / ADAPTER


def load_config_task(config: RunConfig) -> Task | PromptedTask:
    """The task that ``config`` names, in words or as a table, cut to ``limit`` rows a split.

    Raises InputError as ``load_task`` and ``load_prompted`` do, and for options that are of the other form.
    """
    data_dir = Path(config.data_dir) if config.data_dir else None
    task: Task | PromptedTask
    if is_prompted(config):
        of_tables = ("text", "text_pair", "label", "kind", "validation", "test")
        if given := [f"{key}={getattr(config, key)!r}" for key in of_tables if getattr(config, key) is not None]:
            raise InputError(f"'{config.data}' is put in words and has its own splits: leave out {', '.join(given)}")
        task = load_prompted(config.data, data_dir=data_dir, sample=Sample(**config.sample), seed=config.seed)
    else:
        if config.sample or config.train_as != "auto":
            raise InputError(
                f"sample and train_as are for prompted tasks ({', '.join(PROMPTED)}) on a causal language model, and "
                f"'{config.data}' on '{config.model}' is none: leave them out"
            )
        task = load_task(
            config.data,
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            kind=config.kind,
            data_dir=data_dir,
            validation=Path(config.validation) if config.validation else None,
            test=Path(config.test) if config.test else None,
            seed=config.seed,
        )
    return task if config.limit is None else task.limited(config.limit)


def is_prompted(config: RunConfig) -> bool:
    """Whether the task is put in words for the model to go on with. Raises InputError where it cannot be."""
    if config.data not in PROMPTED:
        if config.prompted:
            raise InputError(f"prompted: '{config.data}' has no prompt; there are {', '.join(PROMPTED)}")
        return False
    has_table = config.data in GLUE
    if config.prompted is False and has_table:
        return False
    if config.prompted is False:
        raise InputError(f"prompted=false: '{config.data}' has no other form than a prompt")
    is_causal = default_task_type(find_config(config.model)) == "CAUSAL_LM"
    if not is_causal and (config.prompted or not has_table):
        raise InputError(
            f"'{config.data}' is put in words for a causal language model, and '{config.model}' is none: give a decoder"
        )
    return is_causal


def check_loss(config: RunConfig, task: Task | PromptedTask) -> None:
    """Raise InputError for a loss that the task does not have."""
    if config.train_as == "classification" and task.kind == "generation":
        raise InputError(f"train_as='classification': '{task.name}' has no options to choose from, leave it out")


def encode_splits(
    config: RunConfig, task: Task | PromptedTask, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Dataset] | dict[str, list[Texts]]:
    """The splits that there are as token ids. Raises InputError as :func:`encode` and ``encode_task`` do."""
    if isinstance(task, PromptedTask):
        return encode_task(task, tokenizer, config)
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    return {
        split: encode(data, task, tokenizer, config.max_length) for split, data in splits.items() if data is not None
    }


def encode(data: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of a split: an example a row, or (language modelling) blocks of ``max_length`` tokens.

    Raises InputError when the text is too short for one block.
    """
    if task.kind != "language_modeling":
        columns = [data[column] for column in task.columns]
        tokens = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        return Dataset.from_dict({**tokens, "labels": list(data["label"])})
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for row in tokenizer(list(data["text"]), verbose=False)["input_ids"] for token in [*row, *end]]
    blocks = [ids[k : k + max_length] for k in range(0, len(ids) - max_length + 1, max_length)]
    if not blocks:
        raise InputError(
            f"a split of '{task.name}' has {len(ids)} tokens, less than one block of {max_length}: "
            "give more text or a smaller max_length"
        )
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * max_length] * len(blocks)})


class TwoRateGraphTrainer(CudaGraphTrainer, TwoRateTrainer):
    """The trainer of all runs, with CUDA graphs."""


class PromptedGraphTrainer(CudaGraphTrainer, PromptedTrainer):
    """That of prompted tasks, whose batches are no plain tensors: it says so, and trains eagerly."""


def make_trainer(
    config: RunConfig,
    task: Task | PromptedTask,
    model: Trained,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, Any],
) -> TwoRateTrainer:
    """The Trainer of a run: AdamW, best checkpoint on validation, one line of progress with an ETA."""
    if config.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.folder / "tensorboard")
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": encoded["train"],
        "eval_dataset": encoded["validation"],
        "processing_class": tokenizer,
        "head_learning_rate": config.head_learning_rate,
    }
    chosen_by = choosing_metric(config, task)
    chosen_well = chosen_by != "loss" and _higher_is_better(task)
    arguments = training_arguments(
        config, config.folder / CHECKPOINTS, best_by=chosen_by, greater_is_better=chosen_well
    )
    if isinstance(task, PromptedTask):
        prompted = PromptedGraphTrainer if config.cuda_graph else PromptedTrainer
        return prompted(
            **common,
            args=arguments,
            config=config,
            task=task,
            tokenizer=tokenizer,
            lengths=[len(texts) for texts in encoded["train"]],
        )
    if config.cuda_graph and arguments.device.type == "cuda":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # which warns of the workers else
        arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 2, True
    plain = TwoRateGraphTrainer if config.cuda_graph else TwoRateTrainer
    if task.kind == "language_modeling":
        return plain(**common, args=arguments, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    return plain(
        **common,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_compute_metrics(task),
        lengths=[len(ids) for ids in encoded["train"]["input_ids"]],
    )


def choosing_metric(config: RunConfig, task: Task | PromptedTask) -> str:
    """What the best checkpoint is chosen by: the task's first metric, or "loss"."""
    default = "loss" if isinstance(task, PromptedTask) else "metric"
    # perplexity is exp(loss): the same order
    by_loss = (config.select_by or default) == "loss" or task.metrics[0] == "perplexity"
    return "loss" if by_loss else task.metrics[0]


def _higher_is_better(task: Task | PromptedTask) -> bool:
    return isinstance(task, PromptedTask) or metrics.higher_is_better(task.metrics[0])


def _compute_metrics(task: Task):
    def compute(prediction) -> dict[str, float]:
        return score_logits(task, _scores(prediction.predictions), prediction.label_ids)

    return compute


def score_logits(task: Task, logits: np.ndarray, labels: Sequence[Any] | np.ndarray) -> dict[str, float]:
    """The task's metrics of (rows, labels) logits. All are NaN where one logit is not finite.

    The largest of logits that are all NaN is the first: a run that diverged would score as the first class does.
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys(task.metrics, math.nan)
    predicted = logits[:, 0] if task.kind == "regression" else logits.argmax(-1)
    return metrics.compute(task.metrics, predicted, labels)


def _scores(predictions) -> np.ndarray:
    """The logits; encoder-decoder models give hidden states after them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def prediction_rows(logits: torch.Tensor, label_names: Sequence[str]) -> list[dict[str, Any]]:
    """(B, labels) logits -> a "label" and its "probability" each; without label names a "score" each."""
    if not label_names:
        return [{"score": float(score)} for score in logits[:, 0]]
    best = logits.float().softmax(-1).max(-1)
    return [
        {"label": label_names[int(k)], "probability": float(p)} for p, k in zip(best.values, best.indices, strict=True)
    ]


def named_values(raw: Mapping[str, float], task: Task | PromptedTask, prefix: str) -> dict[str, float]:
    """Loss and metrics out of the Trainer's prefixed names, with perplexity for language modelling."""
    values = {
        key.removeprefix(prefix): float(value)
        for key, value in raw.items()
        if key.removeprefix(prefix) in ("loss", *task.metrics)
    }
    if task.kind == "language_modeling" and "loss" in values:
        values["perplexity"] = math.exp(min(values["loss"], 700))
    return values


def _finish(
    config: RunConfig,
    task: Task | PromptedTask,
    trainer: TwoRateTrainer,
    encoded: Mapping[str, Any],
    *,
    seconds: float,
    memory: int,
) -> RunRecord:
    """Save the best adapter, score the test split, write run.json."""
    folder = config.folder
    model = cast(Trained, trainer.model)
    model.save_pretrained(str(folder / ADAPTER))
    test, lines = _score_test(config, task, trainer, encoded)
    if lines:
        written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / PREDICTIONS).write_text(written, encoding="utf-8")
    history = [_point(entry, task) for entry in trainer.state.log_history if "train_runtime" not in entry]
    history = [point for point in history if point is not None]
    best_step = trainer.state.best_global_step or trainer.state.global_step
    validation = next((p.values for p in history if p and p.split == "validation" and p.step == best_step), {})
    if isinstance(trainer, PromptedTrainer) and task.metrics[0] not in validation:
        validation = trainer.judge("validation", encoded["validation"]).values  # generated once, at the best step
    record = RunRecord(
        config=config.model_dump(),
        command=shlex.join(["loretta", *sys.argv[1:]]),
        versions={
            "python": platform.python_version(),
            "loretta": loretta.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        model=config.model,
        task=task.name,
        method=config.method,
        kind=task.kind,
        seed=config.seed,
        device=torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        sizes={split: len(data) for split, data in encoded.items()},
        notes=[*task.notes, *(notes_on_length(encoded, config) if isinstance(task, PromptedTask) else ())],
        label_names=list(task.label_names),
        metric=task.metrics[0],
        higher_is_better=_higher_is_better(task),
        selected_by="loss" if choosing_metric(config, task) == "loss" else "metric",
        parameters=ParameterCounts(**trainable_by_kind(model), total=_total(model)),
        trains=_trains(model),
        adapter_bytes=sum(path.stat().st_size for path in (folder / ADAPTER).glob("*.safetensors")),
        train_seconds=seconds,
        peak_memory_bytes=max(0, memory),
        history=[point for point in history if point is not None],
        best_step=best_step,
        validation=validation,
        test=test,
    )
    write_json(folder / "run.json", record.model_dump())
    if _loretta_config(model) is not None:
        write_card(folder / ADAPTER, record, learning_rate=trainer.args.learning_rate)
    return record


def _score_test(
    config: RunConfig, task: Task | PromptedTask, trainer: TwoRateTrainer, encoded: Mapping[str, Any]
) -> tuple[dict[str, float] | None, list[dict[str, Any]]]:
    """Metrics of the test split and a row for each of its examples; nothing where there is none."""
    if "test" not in encoded:
        return None, []
    if isinstance(trainer, PromptedTrainer):
        judged = trainer.judge("test", encoded["test"])
        return judged.values, judged.answers
    assert isinstance(task, Task)
    output = trainer.predict(encoded["test"], metric_key_prefix="test")
    values = named_values(output.metrics or {}, task, "test_")
    if task.kind == "language_modeling":
        return values, []
    return values, prediction_rows(torch.as_tensor(_scores(output.predictions)), task.label_names)


def _total(model: Trained) -> int:
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()[1]
    return sum(parameter.numel() for parameter in model.parameters())


def _loretta_config(model: Trained) -> LorettaConfig | None:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config if isinstance(config, LorettaConfig) else None


def _trains(model: Trained) -> list[Train]:
    """The trains of a LoRETTA adapter by kind; empty for other methods, dense adapters among them."""
    config = _loretta_config(model)
    if not isinstance(model, PeftModel) or config is None or getattr(config, "dense", False):
        return []
    return [
        Train(at=f"{placement.name.rpartition('.')[2]} {part}", count=count, **dataclasses.asdict(shape))
        for placement, count in read_plan(model).groups()
        for part, shape in (("down", placement.down), ("up", placement.up))
    ]


def _point(entry: Mapping[str, Any], task: Task | PromptedTask) -> Point | None:
    where = {"step": entry["step"], "epoch": entry["epoch"]}
    if "eval_loss" in entry:
        return Point(split="validation", values=named_values(entry, task, "eval_"), **where)
    if "loss" in entry:
        kept = {key: float(entry[key]) for key in ("loss", "learning_rate", "grad_norm") if key in entry}
        return Point(split="train", values=kept, **where)
    return None


def _claim(folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> RunRecord | None:
    """Refuse to touch a folder that holds something else; the record if the run to resume is finished."""
    if folder.is_file():
        raise InputError(f"the output '{folder}' is a file: give a folder with --output")
    # a temporary file is what a kill left of the first one to be written
    if not folder.is_dir() or all(path.suffix == TEMPORARY for path in folder.iterdir()):
        return None
    if not (folder / CONFIG).is_file():
        raise InputError(f"the output folder '{folder}' holds other files: give an empty or new one with --output")
    if overwrite:
        return None
    if not resume:
        raise InputError(f"'{folder}' already holds a run: go on with --resume, replace it with --overwrite")
    try:
        # through the model: a run of an earlier version lacks the options that came later
        before = RunConfig(**json.loads((folder / CONFIG).read_bytes())).model_dump()
    except (ValueError, TypeError):
        raise InputError(f"'{folder / CONFIG}' is damaged: start again with --overwrite") from None
    now = config.model_dump()
    changed = sorted(key for key in now if key != "output" and before[key] != now[key])
    if changed:
        words = "; ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise InputError(f"cannot resume '{folder}' with other options ({words}): give the same ones, or --overwrite")
    return RunRecord.load(folder / "run.json") if (folder / "run.json").is_file() else None


def _need_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install 'loretta-peft[tensorboard]'")


def peak_memory() -> int:
    """Peak bytes so far: of the accelerator's allocator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one step: a crash leaves the old one or the new one, never half of it."""
    # a name of its own for each process: two runners write the same study
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
