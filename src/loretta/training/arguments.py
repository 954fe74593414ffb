"""Which trainer a run has, and what it is told."""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.config import PromptLearningConfig
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from loretta import processes
from loretta.errors import InputError
from loretta.plan.budget import Budget
from loretta.tasks import metrics
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.adaptive_ranks import AdaptiveRanks
from loretta.training.config import RunConfig
from loretta.training.folder import CHECKPOINTS, TENSORBOARD
from loretta.training.forms import Data, form_of
from loretta.training.graphs import CudaGraphTrainer
from loretta.training.methods import (
    METHODS,
    NO_FINAL_LAYER,
    check_adaptive,
    find_method,
    refuse_unknown_options,
    starting_rate,
    trains_final_layer,
)
from loretta.training.model import Trained
from loretta.training.trainer import TwoRateTrainer
from loretta.tuners.config import LorettaConfig
from loretta.tuners.rep.config import LorettaRepConfig
from loretta.tuners.shared import LorettaSharedConfig
from loretta.wording import nearest, one_line, quoted


def make_trainer(data: Data, model: Trained, folder: Path) -> TwoRateTrainer:
    """The Trainer of a run: AdamW, best checkpoint on validation, one line of progress with an ETA."""
    config, task = data.config, data.task
    if "tensorboard" in reporters(config):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD)
    common: dict[str, Any] = {
        "on_nan": config.on_nan,
        "auto_batch": config.auto_batch,
        "model": model,
        "train_dataset": data.splits["train"],
        "eval_dataset": data.splits["validation"],
        "processing_class": data.tokenizer,
        "head_learning_rate": config.head_learning_rate,
        "order_by": config.batch_size,
        "callbacks": [
            *([] if config.patience is None else [EarlyStoppingCallback(config.patience)]),
            *([AdaptiveRanks(config.method_args["budget"])] if config.method_args.get("adaptive_ranks") else []),
        ],
    }
    chosen_by = choosing_metric(config, task)
    chosen_well = chosen_by != "loss" and higher_is_better(task)
    recipe = form_of(task.kind).recipe(data)
    arguments = recipe.arguments(
        **training_options(config, folder / CHECKPOINTS, best_by=chosen_by, greater_is_better=chosen_well),
        learning_rate=config.learning_rate or starting_rate(config.method, model),
    )
    # several GPUs are for several processes: replicas within one train slower, and on more rows than were asked for
    arguments._n_gpu = min(1, arguments.n_gpu)
    if config.cuda_graph and arguments.device.type == "cuda" and isinstance(task, Task):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns of the workers
        arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 2, True
    trainer = recipe.trainer
    if config.cuda_graph:  # where batches are no plain tensors it says so, and trains eagerly
        trainer = type(f"{trainer.__name__}WithGraphs", (CudaGraphTrainer, trainer), {})
    made = trainer(**{**common, **recipe.options}, args=arguments)
    for name in reporters(config):
        for callback in made.callback_handler.callbacks:
            if isinstance(callback, INTEGRATION_TO_CALLBACK[name]):
                callback.on_train_begin = partial(_begin, name, callback.on_train_begin)
    return made


def _begin(name: str, on_train_begin: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Have a reporter that fails before the first step, as where nobody is logged in, say so in a sentence."""
    try:
        return on_train_begin(*args, **kwargs)
    except Exception as error:
        raise InputError(
            f"report_to {quoted(name)} cannot start ({one_line(error)}): see to that and go on with --resume, or leave "
            "it out"
        ) from None


def check_options(config: RunConfig) -> None:
    """Raise InputError for what neither data nor a model has to be loaded for to be seen to be wrong."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install 'loretta-peft[tensorboard]'")
    reporters(config)
    if config.optimizer is not None:
        known_optimizer(config.optimizer)
    if config.bf16 and config.dtype == "float16":
        raise InputError("bf16 computes in bfloat16, and dtype='float16' rounds weights to float16: give one")
    if config.on_nan == "skip" and config.cuda_graph:
        raise InputError("on_nan=skip looks at the gradients of each step, which cuda_graph replays: give one of them")
    processes.refuse_other_precision(bf16=config.bf16)
    refuse_unknown_options(config.method, config.method_args.keys())
    if config.head_learning_rate is not None and not trains_final_layer(
        config.method, config.method_args, config.head_policy
    ):
        raise InputError(NO_FINAL_LAYER.format(config.method))
    if (budget := config.method_args.get("budget")) is not None:
        Budget.parse(budget)
    if config.method_args.get("adaptive_ranks"):
        form = find_method(config.method).config
        # the form of "auto" follows from the budget
        check_adaptive(LorettaRepConfig if form in (None, LorettaConfig) else form, config.method_args)
        if config.start_from is not None:
            raise InputError(
                f"adaptive_ranks begins with higher ranks than '{config.start_from}' ended with, from which the "
                "training starts: leave one of the two out"
            )


def check_processes(config: RunConfig) -> None:
    """Raise InputError for what several processes cannot train together, or cannot share."""
    method, n = find_method(config.method), processes.count()
    shared_rows(config)
    if config.auto_batch and n > 1:
        raise InputError("auto_batch=True is for one process, of which no other waits for a gradient: leave it out")
    if not processes.is_sharded():
        return
    if config.on_nan == "rollback":
        raise InputError("on_nan='rollback' takes weights back that fsdp has shared out: give 'stop' or 'skip'")
    if method.config is LorettaSharedConfig:
        raise InputError(
            f"method {config.method!r} has one train for all layers, which fsdp would share out with one of them: "
            "leave fsdp out, the processes then train together by DDP"
        )
    if method.config is None or issubclass(method.config, PromptLearningConfig):
        raise InputError(f"method {config.method!r}: fsdp is for adapters on the layers of a model, leave it out")
    if config.method_args.get("adaptive_ranks"):
        raise InputError("adaptive_ranks looks at whole matrices, which fsdp has shared out: leave one of them out")
    if config.quantize is not None:
        raise InputError(
            f"quantize={config.quantize!r}: fsdp shards no weights of whole numbers, leave one of them out"
        )


def shared_rows(config: RunConfig) -> tuple[int, int]:
    """Rows of a batch and batches of an update for one of the processes, which share ``batch_size * accumulate`` rows.

    An update has the same rows whatever the number of processes, so that a run may go on in another one.

    Raises InputError where neither of the two can be divided by it.
    """
    n = processes.count()
    if config.batch_size % n == 0:
        return config.batch_size // n, config.accumulate
    if config.accumulate % n == 0:
        return config.batch_size, config.accumulate // n
    raise InputError(
        f"batch_size={config.batch_size} and accumulate={config.accumulate} cannot be shared by {n} processes: give "
        f"one of them as a multiple of {n}"
    )


def training_options(config: RunConfig, folder: Path, *, best_by: str, greater_is_better: bool) -> dict[str, Any]:
    """The Trainer's options for a run. ``best_by``, a validation metric or "loss", chooses the checkpoint to keep."""
    batch_size, accumulate = shared_rows(config)
    method = find_method(config.method)
    # our methods use every trained tensor in every step, so DDP need not look for unused ones
    all_used = (method.config is not None and issubclass(method.config, LorettaConfig)) or method is METHODS["lora"]
    every = "epoch" if config.eval_steps is None else "steps"
    optimizer = {} if config.optimizer is None else {"optim": known_optimizer(config.optimizer)}
    steps = {} if config.eval_steps is None else {"eval_steps": config.eval_steps, "save_steps": config.eval_steps}
    return dict(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=batch_size,
        logging_nan_inf_filter=False,  # it would log 0.0 for a loss that is NaN
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=config.eval_batch_size,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup if config.warmup_steps is None else config.warmup_steps,
        lr_scheduler_type=config.schedule,
        eval_strategy=every,
        save_strategy=every,
        **steps,
        logging_steps=config.logging_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=best_by,
        greater_is_better=greater_is_better,
        seed=config.seed,
        bf16=config.bf16,
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
        # a launcher's processes on a machine without an accelerator train together too
        use_cpu=config.cpu or (processes.count() > 1 and not torch.accelerator.is_available()),
        log_level_replica="error",
        ddp_find_unused_parameters=False if all_used else None,
        report_to=reporters(config),
        run_name=str(config.folder),
        **optimizer,
        dataloader_pin_memory=torch.cuda.is_available() and not config.cpu,
        label_names=["labels"],
    )


def known_optimizer(name: str) -> str:
    """The name of one of the Trainer's optimizers.

    Raises InputError with the nearest one for any other, and for one that needs a package which is not installed.
    """
    names = [member.value for member in OptimizerNames]
    if name not in names:
        raise InputError(f"optimizer {quoted(name)}{nearest(name, names)}: the Trainer has {', '.join(names)}")
    defaults = object.__new__(TrainingArguments)  # whole ones would choose the device, and for all that follow
    defaults.optim = name
    try:
        Trainer.get_optimizer_cls_and_kwargs(defaults)
    except (ImportError, ValueError) as error:
        raise InputError(f"optimizer {quoted(name)} cannot be had ({one_line(error)}): take another") from None
    return name


def reporters(config: RunConfig) -> list[str]:
    """The loggers of the Trainer. Raises InputError for one that it does not know or that is not installed."""
    asked = [word.strip() for word in config.report_to.split(",")] if config.report_to else []
    there = get_available_reporting_integrations() if asked else []
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise InputError(f"report_to {quoted(name)}{nearest(name, known)}: the Trainer has {', '.join(known)}")
        if name not in there:
            raise InputError(f"report_to {quoted(name)}: the package is not installed, pip install {name}")
    return list(dict.fromkeys([*asked, *(["tensorboard"] if config.tensorboard else [])]))


def choosing_metric(config: RunConfig, task: Task | PromptedTask) -> str:
    """The name of the score that chooses the best checkpoint: the task's first metric, or "loss"."""
    default = form_of(task.kind).chosen_by
    # perplexity is exp(loss): the same order
    by_loss = (config.select_by or default) == "loss" or task.metrics[0] == "perplexity"
    return "loss" if by_loss else task.metrics[0]


def higher_is_better(task: Task | PromptedTask) -> bool:
    """Whether a larger value of the task's first metric is the better one."""
    return isinstance(task, PromptedTask) or metrics.higher_is_better(task.metrics[0])
