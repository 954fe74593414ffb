"""Finds losses, gradients and weights that are no numbers within one line of the log, and names where they began."""

import logging
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from loretta import processes
from loretta.errors import Stopped
from loretta.training.sharded import part_here

logger = logging.getLogger(__name__)

STATUS = 3
MEND = "lower the learning rate, give float32 where it is half precision, or --on-nan rollback or skip"
MOST_ROLLBACKS = 3
CUT = 0.5  # of the learning rates at each rollback: the same steps at the same rates would end alike


class RollBack(Exception):
    """Asks the Trainer to go on from its last checkpoint, or to begin again where there is none."""


class FiniteSteps(TrainerCallback, ExportableState):
    """Looks for the first step whose loss or gradients are NaN or infinite.

    ``policy`` "stop" ends the run at the next line of the log or checkpoint, so that every checkpoint is finite.
    "rollback" raises RollBack there, at most MOST_ROLLBACKS times, and cuts the learning rates each time. "skip" looks
    at the gradients of every step and leaves out the updates of such steps; when it left out all steps of a window of
    the log, the run ends too.
    """

    def __init__(self, trainer: Trainer, policy: str) -> None:
        self.trainer: Any = trainer
        self.policy = policy
        self.skipped: list[int] = []
        self.rollbacks: list[int] = []  # the steps that were not finite
        self.first = torch.tensor(-1)  # on the device from now on: to look at every step would make the GPU wait
        self.before = torch.tensor(0.0)  # the sum of the losses up to the step before

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"skipped": self.skipped, "rollbacks": self.rollbacks}}

    def notes(self) -> list[str]:
        """What a reader of the result should know, a sentence each."""
        notes = []
        if self.skipped:
            notes.append(f"{len(self.skipped)} updates were skipped (the first at step {self.skipped[0]}): not finite")
        if self.rollbacks:
            steps = ", ".join(map(str, self.rollbacks))
            notes.append(
                f"not finite at step {steps}: each time the training went back to its last checkpoint, and on at half "
                "the learning rate"
            )
        return notes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step == 0:
            saved = {"skipped": [], "rollbacks": []}
        self.skipped = self.skipped or list(saved["skipped"])
        self.rollbacks = max(self.rollbacks, list(saved["rollbacks"]), key=len)
        # the rates in the checkpoint were cut for the earlier ones
        cut_rates(kwargs["optimizer"], kwargs["lr_scheduler"], CUT ** (len(self.rollbacks) - len(saved["rollbacks"])))
        self.first = torch.full((), -1, dtype=torch.int64, device=self.trainer._tr_loss.device)
        self.before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.policy != "skip":
            return
        trained = [parameter for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        finite = [part_here(parameter.grad).isfinite().all() for parameter in trained]
        losses = self.trainer._tr_loss
        if not finite or not processes.in_any(not bool(torch.stack([*finite, losses.isfinite().all()]).all())):
            return
        for parameter in trained:
            parameter.grad = None  # the optimizer passes over what has none
        # the step counts in the mean of its window as one like the others in it
        losses.copy_(self.before * (1 + 1 / max(1, state.global_step - self.trainer._globalstep_last_logged)))
        self.skipped.append(state.global_step + 1)
        if len(self.skipped) >= state.logging_steps and self.skipped[-int(state.logging_steps)] == (
            state.global_step + 2 - int(state.logging_steps)
        ):
            self.stop(self.skipped[-int(state.logging_steps)], "all updates since then were skipped")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = self.trainer._tr_loss
        if self.policy == "skip":
            self.before = losses.clone()
        else:
            bad = (self.first < 0) & ~losses.isfinite()
            self.first = torch.where(bad, torch.full_like(self.first, state.global_step), self.first)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.policy != "skip" and "loss" in (logs or {}):
            values = torch.tensor([logs["loss"], logs.get("grad_norm", 0.0)])
            if not bool(values.isfinite().all()):
                self.stop(self._first_step(state.global_step))

    def check_weights(self) -> None:
        """Stop where a trained parameter, or a loss since the last log, is not finite: what is saved now is lost."""
        trained = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        finite = torch.stack([part_here(parameter).isfinite().all() for parameter in trained]).all()
        if processes.in_any(not bool(finite & (self.trainer._tr_loss.isfinite() | (self.policy == "skip")))):
            self.stop(self._first_step(self.trainer.state.global_step))

    def _first_step(self, latest: int) -> int:
        seen = [first for first in processes.gather(int(self.first)) if first >= 0]
        return min(seen, default=latest)

    def stop(self, step: int, words: str = "") -> None:
        """End the run, with the step and the first module that gives something else than numbers; or roll it back."""
        module = first_not_finite(self.trainer)
        found = f"the loss or its gradient is not finite at step {step}" + (f", first in '{module}'" if module else "")
        if self.policy == "rollback" and len(self.rollbacks) < MOST_ROLLBACKS:
            self.rollbacks.append(step)
            count = f"{len(self.rollbacks)} of at most {MOST_ROLLBACKS} times"
            if processes.is_first():
                logger.warning("%s: back to the last checkpoint, at half the learning rate (%s)", found, count)
            raise RollBack
        if self.rollbacks:
            words = f"{len(self.rollbacks)} rollbacks (at steps {', '.join(map(str, self.rollbacks))}) did not help"
        best = self.trainer.state.best_model_checkpoint
        raise Stopped(
            found
            + (f"; {words}" if words else "")
            + (f" (the best checkpoint before it stays: '{best}')" if best else "")
            + f": {MEND}",
            exit_status=STATUS,
        )


def cut_rates(optimizer: Any, schedule: Any, factor: float) -> None:
    """Multiply the learning rates of an optimizer, now and for the rest of its schedule."""
    if factor != 1:
        for group in optimizer.param_groups:
            group["lr"], group["initial_lr"] = group["lr"] * factor, group["initial_lr"] * factor
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]


@torch.no_grad()
def first_not_finite(trainer: Any) -> str | None:
    """The first module, in the order of computation, that gives out NaN or infinity on a batch of the training.

    The base alone is looked at first: one bad update later, every trained weight is NaN and hides where it came from.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
            floats = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
            if not found and not all(bool(tensor.isfinite().all()) for tensor in floats):
                found.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in trainer.model.named_modules() if name]
    try:
        batch = next(iter(trainer.get_train_dataloader()))
        inputs = trainer._prepare_inputs(batch)
        if isinstance(trainer.model, PeftModel):
            with trainer.model.disable_adapter():
                trainer.compute_loss(trainer.model, dict(inputs))
        if not processes.in_any(bool(found)):
            trainer.compute_loss(trainer.model, dict(inputs))
    finally:
        for handle in handles:
            handle.remove()
    found += [name for name, p in trainer.model.named_parameters() if not bool(part_here(p).isfinite().all())]
    return next((names[0] for names in processes.gather(found[:1]) if names), None)
