"""One run: from its options to its folder, through Hugging Face's Trainer."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import set_seed

from loretta import processes
from loretta.errors import InputError
from loretta.locks import hold
from loretta.memory import free_memory, peak_memory, saying_what_helps
from loretta.record import RunRecord
from loretta.training.arguments import check_options, check_processes, make_trainer
from loretta.training.batches import stop_workers
from loretta.training.config import RunConfig
from loretta.training.data import check_tokens, encode_splits, load_task_to_train
from loretta.training.finish import finish
from loretta.training.folder import ADAPTER, Place, find_place, noting_failure
from loretta.training.forms import Data
from loretta.training.hub import check_hub, push
from loretta.training.lines import first_lines, say_lines
from loretta.training.methods import NO_FINAL_LAYER
from loretta.training.model import TASK_TYPES, Trained, check_positions, load_tokenizer, prepare_model
from loretta.training.pause import PauseBehind, Paused, paused_at, step_of
from loretta.training.stop import StopAtSignal, stopping_at_signals
from loretta.tuners.task_types import is_final_layer
from loretta.wording import spelled


def print_line(line: str) -> None:
    """On standard output at once, which may be a file that somebody follows; a run goes on when its reader has gone."""
    try:
        print(spelled(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, say: Callable[[str], None] = print_line
) -> RunRecord:
    """Train as ``config`` says and write the run folder.

    It holds ``adapter/``, ``run.json`` and, where there is a test split, its ``predictions.jsonl``.

    Everything that a user can get wrong is checked before anything is written. ``resume`` goes on from the last
    checkpoint in the folder (a finished run is returned as it is). ``overwrite`` replaces an earlier run once this one
    is whole, and removes nothing that LoRETTA did not write. ``say`` takes the lines about the run as it goes.

    Raises InputError for input that the user can mend, and Stopped where SIGTERM or SIGINT came, the disk
    is full, the memory is too small, or a loss is not finite.

    Where a launcher (``torchrun``, ``accelerate launch``) started several processes, all of them call this and get the
    record; the first one alone writes and says anything.
    """
    with _alone_in(config) as stop:
        record: RunRecord = _train(config, stop, say, resume=resume, overwrite=overwrite)
        return record


@contextmanager
def _alone_in(config: RunConfig) -> Iterator[StopAtSignal]:
    """Keep others out of the folder of a run, and take what may end it early."""
    with ExitStack() as stack:
        stop = stack.enter_context(stopping_at_signals())
        stack.enter_context(processes.joined(cpu=config.cpu, fsdp=config.fsdp))
        processes.together(lambda: stack.enter_context(hold(config.folder)) if processes.is_first() else None)
        yield stop


def train_until(config: RunConfig, share: float) -> RunRecord | Paused:
    """Train, or go on, up to ``share`` of the steps, and leave a checkpoint there; ``train`` resumes it."""
    with _alone_in(config) as stop:
        return _train(config, stop, print_line, resume=True, overwrite=False, pause=PauseBehind(share))


def _train(
    config: RunConfig,
    stop: StopAtSignal,
    say: Callable[[str], None],
    *,
    resume: bool,
    overwrite: bool,
    pause: PauseBehind | None = None,
) -> Any:
    place = processes.by_first(lambda: find_place(config, resume=resume, overwrite=overwrite))
    if place.finished and resume:
        return processes.by_first(lambda: _upload(place.result(config), config, place, say))
    helping = partial(saying_what_helps, *memory_words(config))
    before = 0  # the peak of an accelerator counts whole
    if config.cpu or not torch.cuda.is_available():
        free_memory()
        before = peak_memory()  # a process had memory before the run, which does not count
    with helping():
        data, model, bf16 = processes.together(lambda: _prepare(config))
    processes.by_first(lambda: place.begin(config, overwrite=overwrite))
    if not processes.is_first():
        say = lambda line: None  # noqa: E731
    if resume and place.goes_on:
        say(f"going on from the end of '{place.folder}': the learning rate follows the schedule of the longer run")
    noting = noting_failure(place.work) if processes.is_first() else nullcontext()
    with noting, processes.missing_others(), helping():
        computed = replace(data, config=config.model_copy(update={"bf16": bf16}))
        trainer = make_trainer(computed, model, place.work)
        trainer.add_callback(stop)
        if pause is not None:
            trainer.add_callback(pause)
        for line in first_lines(data, trainer):
            say(line)
        if not sys.stderr.isatty():
            say_lines(trainer, say)
        try:
            trainer.train(resume_from_checkpoint=processes.by_first(place.checkpoint) if resume else None)
            state = trainer.state
            if pause is not None and state.global_step == step_of(pause.share, state.max_steps) < state.max_steps:
                return paused_at(state.log_history, data.task, state.global_step, state.max_steps)
            (memory,) = processes.largest(max(0, peak_memory() - before))
            record = finish(data, trainer, place=place, peak_memory_bytes=memory)
        finally:
            stop_workers(trainer)
    return _upload(record, config, place, say) if processes.is_first() else record


def _upload(record: RunRecord, config: RunConfig, place: Place, say: Callable[[str], None]) -> RunRecord:
    """Send the adapter of a finished run to the Hub where it is asked for."""
    if config.push_to_hub is not None:
        say(f"uploaded: {push(place.folder / ADAPTER, config.push_to_hub)}")
    return record


def memory_words(config: RunConfig) -> tuple[str, str]:
    """What needs the memory in a training, and what helps."""
    return (
        f"{config.batch_size} examples of up to {config.max_length} tokens at once",
        "lower --batch-size and raise --accumulate as much (--auto-batch does both), lower --max-length or "
        "--eval-batch-size, or give --gradient-checkpointing",
    )


def _prepare(config: RunConfig) -> tuple[Data, Trained, bool]:
    """The data, the model before its first step, and whether in bfloat16.

    Everything that a user can get wrong is found here.
    """
    check_options(config)
    if config.push_to_hub is not None:
        check_hub(config.push_to_hub)
    check_processes(config)
    task = load_task_to_train(config)
    tokenizer = load_tokenizer(config.model)
    data = encode_splits(config, task, tokenizer)
    if TASK_TYPES[task.kind] != "CAUSAL_LM":  # a head keeps what it started from
        processes.load_in_each()
    set_seed(config.seed)
    model, bf16 = prepare_model(config, task, tokenizer)
    named = model.named_parameters()
    if config.head_learning_rate is not None and not any(p.requires_grad and is_final_layer(name) for name, p in named):
        raise InputError(NO_FINAL_LAYER.format(config.method))
    check_positions(config, model, data.splits)
    check_tokens(data, model)
    return data, model, bf16
