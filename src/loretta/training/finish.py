"""What a finished training leaves in its folder: the best adapter, the predictions, the record and the card."""

import dataclasses
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loretta import processes
from loretta.files import write_json
from loretta.folders import stopping_if_not_written, temporary_folder
from loretta.plan import read_plan, trainable_by_kind
from loretta.record import ParameterCounts, Point, RunRecord, Train
from loretta.tasks.base import Task
from loretta.tasks.prompted import PromptedTask
from loretta.training.arguments import choosing_metric, higher_is_better
from loretta.training.config import RunConfig
from loretta.training.folder import ADAPTER, LABELS, PREDICTIONS, RECORD, Place
from loretta.training.forms import Data, form_of
from loretta.training.forms.prompts import judge
from loretta.training.model import TASK_TYPES, Trained
from loretta.training.scores import named_values
from loretta.training.trainer import TwoRateTrainer
from loretta.tuners.card import leave_out_local_base, write_card
from loretta.tuners.config import LorettaConfig
from loretta.version import __version__
from loretta.wording import as_json_lines

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def finish(
    data: Data,
    trainer: TwoRateTrainer,
    *,
    place: Place,
    peak_memory_bytes: int,
    population: int | None = None,
    publishing: Callable[[Callable[[], None]], Any] = lambda publish: publish(),
) -> RunRecord:
    """Save the best adapter, score the test split, write the record, and return it.

    Of several processes all score and the first one writes. ``population`` is the number of runs that were trained
    together, this one among them. ``publishing`` gets the call that moves the finished files into the run's folder.
    """
    # in the precision of the training, which need not be the one that was asked for
    precision = data.config.model_copy(update={"bf16": trainer.args.bf16})
    rows, found = score(replace(data, config=precision), trainer)
    weights = trainer.whole_weights()
    found |= {"peak_memory_bytes": peak_memory_bytes, "population": population}
    return processes.by_first(lambda: _write(place, publishing, data, trainer, rows, weights, found))


def _write(place: Place, publishing: Callable[[Callable[[], None]], Any], *result: Any) -> RunRecord:
    failing = partial(stopping_if_not_written, f"the result to '{place.folder}'", "end the run with --resume")
    with ExitStack() as stack:
        with failing():
            new = stack.enter_context(temporary_folder(place.work))
            record = write_result(new, *result)
        unpublished = stack.pop_all()

    def publish() -> None:
        with unpublished, failing():
            place.finish(new)

    publishing(publish)
    return record


def score(data: Data, trainer: TwoRateTrainer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask the trained model, on all processes together. Returns its answers row by row, and fields of the record."""
    split = "test" if data.splits.get("test") is not None else "validation"
    form = form_of(data.task.kind)
    values, rows = form.answer(data, trainer, split)
    test, answers = values if split == "test" else None, form.describe(data, trainer, split, rows)
    history = read_history(trainer.state.log_history, data.task)
    best_step = trainer.state.best_global_step or trainer.state.global_step
    at_best = (point.values for point in history if point.split == "validation" and point.step == best_step)
    validation = next(at_best, {})
    if isinstance(data.task, PromptedTask) and data.task.metrics[0] not in validation:
        # the training chose by the loss and generated no answers
        validation = judge(cast(Trained, trainer.model), data, "validation").values
    scores = {"validation": validation, "test": test, "answers": answers}
    return rows, {**scores, "history": history, "best_step": best_step}


def write_result(
    folder: Path,
    data: Data,
    trainer: TwoRateTrainer,
    rows: list[dict[str, Any]],
    weights: dict[str, torch.Tensor] | None,
    found: Mapping[str, Any],
) -> RunRecord:
    """Write the files of a finished run into an empty folder; ``found`` are fields of the record."""
    config, task = data.config, data.task
    model, form = cast(Trained, trainer.model), form_of(task.kind)
    if (own := loretta_config(model)) is not None and TASK_TYPES[task.kind] != "CAUSAL_LM":
        own.label_names = list(task.label_names)
    model.save_pretrained(str(folder / ADAPTER), state_dict=weights)
    save_tokenizer(trainer, config, folder / ADAPTER)
    if isinstance(model, PeftModel) and TASK_TYPES[task.kind] != "CAUSAL_LM":
        # PEFT's files have no place for names of labels, and pipelines read the base's config: this one says all of it
        base: Any = model.get_base_model()
        base.config.save_pretrained(str(folder / ADAPTER / LABELS))
    if rows:
        (folder / PREDICTIONS).write_text(as_json_lines(rows), encoding="utf-8")
    record = RunRecord(
        config=config.model_dump(),
        command=shlex.join(["loretta", *sys.argv[1:]]),
        versions=versions(),
        model=config.model,
        task=task.name,
        method=config.method,
        kind=task.kind,
        seed=config.seed,
        device=torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        sizes={split: len(rows) for split, rows in data.splits.items()},
        notes=[*task.notes, *trainer.notes(), *form.notes(data)],
        label_names=list(task.label_names),
        label_counts=form.counts(task),
        metric=task.metrics[0],
        higher_is_better=higher_is_better(task),
        selected_by="loss" if choosing_metric(config, task) == "loss" else "metric",
        learning_rate=trainer.args.learning_rate,
        parameters=ParameterCounts(**trainable_by_kind(model), total=count_all(model)),
        trains=list_trains(model),
        adapter_bytes=sum(path.stat().st_size for path in (folder / ADAPTER).glob("*.safetensors")),
        train_seconds=trainer.stopwatch.seconds,
        **found,
    )
    write_json(folder / RECORD, record.model_dump())
    if loretta_config(model) is not None:
        write_card(folder / ADAPTER, record, learning_rate=trainer.args.learning_rate)
    elif isinstance(model, PeftModel):
        leave_out_local_base(folder / ADAPTER)
    return record


def save_tokenizer(trainer: TwoRateTrainer, config: RunConfig, folder: Path) -> None:
    """Beside the adapter, so that a pipeline needs nothing but the folder; it cuts where the training did."""
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    length = tokenizer.model_max_length
    tokenizer.model_max_length = config.max_length
    try:
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.model_max_length = length


@cache
def versions() -> dict[str, str]:
    """The versions of what computes a run."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "loretta": __version__, **packages}


def read_history(entries: list[dict[str, Any]], task: Task | PromptedTask) -> list[Point]:
    """The points of training and validation among what the Trainer logged."""
    history = []
    for entry in entries:
        where = {"step": entry["step"], "epoch": entry["epoch"]}
        if "eval_loss" in entry:
            history.append(Point(split="validation", values=named_values(entry, task, "eval_"), **where))
        elif "loss" in entry:
            kept: tuple[str, ...] = ("loss", "learning_rate", "grad_norm")
            values = {key: float(entry[key]) for key in kept if key in entry}
            history.append(Point(split="train", values=values, **where))
    return history


def count_all(model: Trained) -> int:
    """The parameters of the model, trained or not."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()[1]
    return sum(parameter.numel() for parameter in model.parameters())


def list_trains(model: Trained) -> list[Train]:
    """The trains of a LoRETTA adapter by kind; empty for other methods and for dense adapters."""
    config = loretta_config(model)
    if not isinstance(model, PeftModel) or config is None or getattr(config, "dense", False):
        return []
    plan = read_plan(model)
    if (shared := plan.shared) is not None:
        sides = [(f"left side, {side.in_features} wide", side) for side in shared.left]
        sides += [(f"right side, {side.out_features} wide", side) for side in shared.right]
        return [Train(at=at, count=1, **dataclasses.asdict(side)) for at, side in sides]
    return [
        Train(at=f"{placement.name.rpartition('.')[2]} {part}", count=count, **dataclasses.asdict(shape))
        for placement, count in plan.groups()
        for part, shape in (("down", placement.down), ("up", placement.up))
    ]


def loretta_config(model: Trained) -> LorettaConfig | None:
    """The configuration of a LoRETTA adapter, or None under another method."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config if isinstance(config, LorettaConfig) else None
