"""Train runs together, from their options to their folders: each folder is as if its run had been trained alone."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import set_seed

from loretta.errors import InputError, NotRecorded, Stopped
from loretta.locks import hold
from loretta.memory import free_memory, peak_memory, saying_what_helps
from loretta.population.checkpoints import WRITERS, Checkpoints, for_all, remove_files, restore, save
from loretta.population.loop import Loop, Member, Rules
from loretta.population.population import Population, Start
from loretta.record import RunRecord
from loretta.tasks.base import Task
from loretta.tasks.glue import GLUE
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import check_tokens, encode_splits, load_task_to_train
from loretta.training.finish import finish
from loretta.training.finite import MEND, STATUS
from loretta.training.folder import Place, find_place
from loretta.training.forms import Data
from loretta.training.methods import FULL, find_method, virtual_tokens
from loretta.training.model import load_tokenizer, prepare_model
from loretta.training.pause import Paused, paused_at, step_of
from loretta.training.run import memory_words
from loretta.training.stop import StopAtSignal, stopping_at_signals
from loretta.tuners.in_place import SCALES

# options that may differ between the runs of a population; of the method's own options only SCALES may
OF_EACH_MEMBER = {
    "seed", "learning_rate", "head_learning_rate", "weight_decay", "warmup", "warmup_steps", "schedule", "output",
    "start_from",
}  # fmt: skip
# tensors of its trained numbers at once: values, gradient, two of AdamW, the best, its start, and two of a step
OF_A_MEMBER = 8
TOGETHER = ("classification", "regression", "language_modeling")


def why_alone(config: RunConfig) -> str | None:
    """The first option for which a run cannot be trained with others; None where it can."""
    obstacles = {
        f"method={config.method}": find_method(config.method) is FULL,
        "gradient_checkpointing": config.gradient_checkpointing,
        "target_parameters": bool(config.method_args.get("target_parameters")),
        "tensorboard": config.tensorboard,
        f"report_to={config.report_to}": config.report_to is not None,
        f"optimizer={config.optimizer}": config.optimizer is not None,
        f"quantize={config.quantize}": config.quantize is not None,
        f"accumulate={config.accumulate}": config.accumulate > 1,
        "auto_batch": config.auto_batch,
        "fsdp": config.fsdp,
        f"push_to_hub={config.push_to_hub}": config.push_to_hub is not None,
        f"on_nan={config.on_nan}": config.on_nan != "stop",
    }
    return next((option for option, is_so in obstacles.items() if is_so), None)


def population_key(config: RunConfig) -> tuple[Any, ...] | None:
    """The options that runs must share to be trained together; None for a run that can only be trained alone."""
    if why_alone(config) is not None:
        return None
    shared = {key: value for key, value in config.model_dump().items() if key not in OF_EACH_MEMBER}
    shared["method_args"] = {key: value for key, value in config.method_args.items() if key not in SCALES}
    return tuple(sorted((key, repr(value)) for key, value in shared.items()))


def train_together(
    configs: Sequence[RunConfig],
    *,
    resume: bool = False,
    overwrite: bool = False,
    until: float | None = None,
    graphs: bool | None = None,
) -> list[RunRecord | Paused]:
    """Train several runs on one base at once and write the folder of each, as ``loretta.training.run.train`` does.

    On a GPU steps are recorded as CUDA graphs where they can be, unless ``graphs`` is False. A step that spoils its
    recording is trained without, from the last checkpoint on; with True it raises NotRecorded. A finished run stays as
    it is. ``run.json`` says how many runs were trained together; its seconds are the run's share, its memory is that of
    all. With ``until`` the runs pause after that share of their steps; with ``resume`` they go on from there, together
    or with others.

    Raises InputError for runs that do not fit together, OutOfMemory for too many, and whatever ``train`` raises; a
    signal saves a checkpoint of each. A run with values that are not finite ends alone: Stopped is raised after the
    others are written.
    """
    if alone := next((option for option in map(why_alone, configs) if option is not None), None):
        raise InputError(f"a run with {alone} is trained alone: leave that option out, or train the runs one by one")
    if len({population_key(config) for config in configs}) != 1:
        raise InputError("these runs cannot be trained together: they differ in more than seeds and rates")
    needed, mend = memory_words(configs[0])
    if len(configs) > 1:
        needed, mend = f"{len(configs)} runs of {needed}", f"train fewer together (--population), or {mend}"
    with stopping_at_signals() as stop, ExitStack() as folders, saying_what_helps(needed, mend):
        for config in configs:
            folders.enter_context(hold(config.folder))
        attempt = partial(_train_all, configs, stop, until=until)
        try:
            return attempt(resume=resume, overwrite=overwrite, graphs=graphs is not False)
        except NotRecorded as error:
            if graphs:
                raise
            print(f"without CUDA graphs: {error}", flush=True)
        free_memory()  # outside of the exception, which holds on to what the step had allocated
        return attempt(resume=True, overwrite=False, graphs=False)


def _train_all(
    configs: Sequence[RunConfig],
    stop: StopAtSignal,
    *,
    until: float | None,
    resume: bool,
    overwrite: bool,
    graphs: bool,
) -> list[RunRecord | Paused]:
    places = [find_place(config, resume=resume, overwrite=overwrite) for config in configs]
    left = [(config, place) for config, place in zip(configs, places, strict=True) if not (resume and place.finished)]
    records = iter(_train(left, stop, overwrite=overwrite, until=until, graphs=graphs) if left else [])
    return [
        place.result(config) if resume and place.finished else next(records)
        for config, place in zip(configs, places, strict=True)
    ]


def _train(
    runs: Sequence[tuple[RunConfig, Place]], stop: StopAtSignal, *, overwrite: bool, until: float | None, graphs: bool
) -> Sequence[RunRecord | Paused]:
    configs = [config.model_copy(update={"output": str(place.work), "cuda_graph": graphs}) for config, place in runs]
    memory = 0 if torch.cuda.is_available() and not configs[0].cpu else peak_memory()
    # in a scratch folder, because a Trainer makes its folder at once and a refused population must leave nothing
    with tempfile.TemporaryDirectory() as scratch:
        loop = prepare(configs, Path(scratch))
    if loop.device.type == "cuda":
        loop.try_largest()
    loop.save = Checkpoints()
    for_all(lambda run: run[1].begin(run[0], overwrite=overwrite), runs)
    set_seed(configs[0].seed)
    restore(loop)
    pause = None if until is None else step_of(until, loop.rules.steps)

    def save_at_signal(loop: Loop) -> None:
        if stop.received is not None:
            save(loop)
            raise stop.stopped(f"behind step {loop.step} of {loop.rules.steps}, which is saved")

    loop.after_step = save_at_signal
    stop.begin()
    loop.train(pause)
    stop.end()
    if pause is not None and loop.step <= pause < loop.rules.steps:
        save(loop)
        return _paused(loop)
    if len(runs) > 1:
        # without it, runs that a kill leaves unwritten would go on with fewer others and other numbers of dropout
        save(loop)
    used = max(0, peak_memory() - memory)
    loop.ranks.settle(loop.kept)
    predict_at_once(loop)
    records = _write(loop, runs, used)
    finished = [member for k, member in enumerate(loop.members) if k not in loop.not_finite]
    for_all(lambda member: remove_files(member.config.folder), finished)
    if loop.not_finite:
        where = ", ".join(f"'{runs[k][1].folder}' from step {step} on" for k, step in sorted(loop.not_finite.items()))
        raise Stopped(
            f"{len(loop.not_finite)} of {len(runs)} runs are not finite ({where}), the others are written: {MEND}",
            exit_status=STATUS,
        )
    return records


def _paused(loop: Loop) -> list[Paused]:
    # a member that is not finite has no score
    logs = [[] if k in loop.not_finite else m.trainer.state.log_history for k, m in enumerate(loop.members)]
    return [paused_at(log, loop.members[k].task, loop.step, loop.rules.steps) for k, log in enumerate(logs)]


def _write(loop: Loop, runs: Sequence[tuple[RunConfig, Place]], memory: int) -> list[RunRecord]:
    """Write the folders of all members that are finite, and publish them where that is asked, many at once."""
    records, published = [], []
    with ThreadPoolExecutor(WRITERS) as pool:
        for k, member in enumerate(loop.members):
            if k in loop.not_finite:
                continue
            member.trainer.stopwatch.earlier = loop.seconds / len(runs)
            with loop.population.released(k, loop.kept(k)), loop.ranks.shrunk(k):
                record = finish(
                    replace(member, config=runs[k][0]),
                    member.trainer,
                    place=runs[k][1],
                    peak_memory_bytes=memory,
                    population=len(runs),
                    publishing=lambda publish: published.append(pool.submit(publish)),
                )
            records.append(record)
    for each in published:
        each.result()
    return records


def predict_at_once(loop: Loop) -> None:
    """Predict for all members at once, where their splits have one length, and give the answers to their Trainers."""
    split = "test" if loop.members[0].splits.get("test") is not None else "validation"
    if loop.kind == "language_modeling" and split == "validation":
        return  # its scores are those of the training
    if len({len(member.splits[split]) for member in loop.members}) == 1:
        for member, output in zip(loop.members, loop.answers(split), strict=True):
            member.trainer.known = {split: output}


def refuse_too_many(needed: int, device: torch.device) -> None:
    """Raise MemoryError where trained numbers need more bytes than are free: a CPU's system lends them, and kills."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(f"{needed:,} bytes of trained numbers, where {free:,} are free")


def prepare(configs: Sequence[RunConfig], scratch: Path) -> Loop:
    """Get some runs ready for their first step: each starts from the values from which it would start alone.

    The Trainers of the members write nothing, but make their folder in ``scratch``.

    Raises InputError where the runs do not fit together, and MemoryError where they are too many.
    """
    tokenizer = load_tokenizer(configs[0].model)
    known: dict[Any, Data] = {}
    models: dict[str, Start] = {}
    skeleton: Any = None
    data, starts = [], []
    for config in configs:
        # the seed chooses the rows held out of a table; GLUE tasks have splits of their own
        key = None if config.data in GLUE else config.seed
        if key not in known:
            task = load_task_to_train(config)
            if not isinstance(task, Task) or task.kind not in TOGETHER:
                raise InputError(f"'{config.data}' is of the kind {task.kind}, which is trained one run at a time")
            if task.kind == "language_modeling" and virtual_tokens(config.method, config.method_args):
                raise InputError("the texts behind a prompt are trained one run at a time: their losses are PEFT's own")
            known[key] = encode_splits(config, task, tokenizer)
        same = repr((config.seed, config.method_args, config.start_from))
        if same not in models:
            set_seed(config.seed)
            model, _ = prepare_model(config, known[key].task, tokenizer)
            assert isinstance(model, PeftModel)
            check_tokens(known[key], model)
            skeleton = model if skeleton is None else skeleton
            models[same] = Start.of(model, skeleton)
        starts.append(models[same])
        data.append(replace(known[key], config=config))
    # a member's Trainer only scores the test split, so it need not record steps
    alone = [replace(each, config=each.config.model_copy(update={"cuda_graph": False})) for each in data]
    trainers = [make_trainer(each, skeleton, scratch) for each in alone]
    members = [
        Member(config=each.config, task=each.task, tokenizer=tokenizer, splits=each.splits, trainer=trainer)
        for each, trainer in zip(data, trainers, strict=True)
    ]
    rules = Rules(members)
    numbers = sum(value.nbytes for value in starts[0].values.values())
    refuse_too_many(len(starts) * OF_A_MEMBER * numbers, next(skeleton.parameters()).device)
    loop = Loop(Population(skeleton, starts), members, rules)
    loop.population.check(loop.sample())
    return loop
