"""Checkpoints that are whole or not there, and from which a run goes on as if nothing had happened."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from loretta import processes
from loretta.convert.load import quiet_transformers
from loretta.folders import set_aside, stopping_if_not_written, sync, temporary_folder
from loretta.owned import describe, find_foreign, is_whole, remove_listed, write_list
from loretta.training.sharded import load_adapter, load_optimizer, share_blocks, whole_optimizer, whole_weights

logger = logging.getLogger(__name__)

NAME = "checkpoint-"
PATIENCE = "early_stopping_patience_counter"
GO_ON = "go on from the last one with --resume"


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder`` to go on from; None where there is none, to begin again.

    It is whole when all its files are as they were written, and so is the checkpoint that was the best up to there.
    Those that are newer cannot be used, and get another name.
    """
    for path in sorted(folder.glob(f"{NAME}*"), key=_step, reverse=True):
        if _step(path) < 0:
            continue
        if is_whole(path) and ((best := _best(path)) in (None, path) or is_whole(best)):
            logger.warning("going on from step %d ('%s')", _step(path), path)
            return path
        aside = set_aside(path)
        logger.warning("'%s' is damaged, or the best one before it is: set aside as '%s'", path, aside.name)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints in ``folder``, and it where nothing else is in it; what is not ours stays."""
    for path in folder.glob(f"{NAME}*"):
        remove_listed(path)
        _remove_empty(path)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _step(path: Path) -> int:
    number = path.name.removeprefix(NAME)
    return int(number) if number.isdecimal() else -1


def _best(path: Path) -> Path | None:
    step = json.loads((path / TRAINER_STATE_NAME).read_bytes()).get("best_global_step")
    return path.with_name(f"{NAME}{step}") if step else None


class LossWindow(TrainerCallback, ExportableState):
    """The losses since the last line of the log, which the Trainer would forget when it goes on from a checkpoint."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.loss = 0.0

    def take(self) -> None:
        """Note the mean of all processes, which the first one then saves."""
        trainer: Any = self.trainer
        self.loss = trainer.accelerator.gather(trainer._tr_loss).mean().item()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        logged = getattr(self.trainer, "_globalstep_last_logged", 0)
        return {"args": {}, "attributes": {"loss": self.loss, "logged": logged}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks[type(self).__name__]
        if state.global_step > 0:
            trainer: Any = self.trainer
            trainer._tr_loss.fill_(saved["attributes"]["loss"])
            trainer._globalstep_last_logged = saved["attributes"]["logged"]


@contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    parent.mkdir(exist_ok=True)  # where that of the run is gone, so are the checkpoints before this one
    with temporary_folder(parent) as folder:
        yield folder


class WholeCheckpointsTrainer(Trainer):
    """A Trainer whose checkpoints appear in one step, with the list of their files, and keep the window of the log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built_in: Path | None = None
        self.window = LossWindow()
        self.window.trainer = self
        self.add_callback(self.window)
        if processes.is_sharded():
            share_blocks(self)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._built_in is None else str(self._built_in)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        self.window.take()
        what = f"a checkpoint at step {self.state.global_step} to '{folder}'"
        try:
            with stopping_if_not_written(what, GO_ON), ExitStack() as stack:
                self._built_in = processes.by_first(lambda: stack.enter_context(_new_folder(folder)))
                super()._save_checkpoint(model, trial)
                self.state.best_model_checkpoint = self._best_checkpoint(folder)
                processes.gather(None)  # all have written their random numbers
                processes.by_first(lambda: self._put_into(folder))
        finally:
            self._built_in = None

    def _put_into(self, folder: Path) -> None:
        assert self._built_in is not None
        (new,) = self._built_in.iterdir()
        self.state.save_to_json(str(new / TRAINER_STATE_NAME))
        sync(new)
        write_list(new, describe(new))
        if (folder / new.name).exists():  # of a run that was stopped at this very step
            os.rename(folder / new.name, self._built_in / "old")
        os.rename(new, folder / new.name)
        self._rotate(folder)

    def _best_checkpoint(self, folder: Path) -> str | None:
        best = self.state.best_global_step
        is_there = best == self.state.global_step or (folder / f"{NAME}{best}").is_dir()
        return str(folder / f"{NAME}{best}") if best and is_there else None

    def _rotate(self, folder: Path) -> None:
        """Remove checkpoints but for the newest and the best, or the two newest where these are one.

        Each goes in one step, and none with files of the user.
        """
        found = sorted((path for path in folder.glob(f"{NAME}*") if _step(path) >= 0), key=_step)
        best = self.state.best_global_step
        kept = found[-2:] if best in (None, self.state.global_step) else [found[-1], folder / f"{NAME}{best}"]
        for path in found:
            if path not in kept and not find_foreign(path):
                with temporary_folder(folder) as trash:
                    os.rename(path, trash / path.name)
                    remove_listed(trash / path.name)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        with quiet_transformers():  # which says that the best checkpoint is gone: the folder may have moved since
            trained = super()._init_training_state(*args, **kwargs)
        self.state.best_model_checkpoint = self._best_checkpoint(Path(self.args.output_dir))
        for callback in self._early_stopping():
            # the Trainer would count anew from a checkpoint on
            saved: Any = self.state.stateful_callbacks.get(type(callback).__name__)
            is_resumed = self.state.global_step > 0 and saved is not None
            callback.early_stopping_patience_counter = saved["attributes"][PATIENCE] if is_resumed else 0
        return trained

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._early_stopping()
        ):
            # a checkpoint of the last step, in the middle of an epoch: the Trainer would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights to save, gathered from all processes; None where each of them has all."""
        return whole_weights(cast(PeftModel, self.model)) if self.is_fsdp_enabled else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=self.whole_weights())
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.load_trained(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self.load_trained(Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def load_trained(self, checkpoint: Path) -> bool:
        """Take what is trained from a checkpoint; False leaves it to the Trainer."""
        if self.is_fsdp_enabled:
            load_adapter(cast(PeftModel, self.model), checkpoint)
        return self.is_fsdp_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        optimizer = whole_optimizer(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        files = (Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        optimizer, schedule = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
        load_optimizer(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(schedule)

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
