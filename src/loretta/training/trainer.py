"""Hugging Face's Trainer with what every run has in common: its order of the data, its rates, its checkpoints."""

import gc
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PredictionOutput

from loretta import processes
from loretta.memory import is_out_of_memory
from loretta.tasks.prompted.encoding import IGNORED
from loretta.training.batches import stop_workers
from loretta.training.checkpoints import WholeCheckpointsTrainer, find_checkpoint
from loretta.training.finite import FiniteSteps, RollBack
from loretta.tuners.task_types import is_final_layer

logger = logging.getLogger(__name__)

TRAINED = "trained.safetensors"


class EpochOrder(Sampler[int]):
    """The order of the training examples, from the seed and the epoch alone.

    Random numbers that a method draws, at its start or in a step, do not change it: all methods see the same batches.
    With ``lengths`` examples of similar lengths come together.
    """

    def __init__(self, size: int, *, seed: int, batch_size: int, lengths: Sequence[int] | None = None) -> None:
        self.size, self.seed, self.batch_size, self.lengths, self.epoch = size, seed, batch_size, lengths, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # a generator of its own for each pair of seed and epoch
        mixed = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (self.epoch + 1,), generator=mixed)
        generator = torch.Generator().manual_seed(int(seeds[-1]))
        if self.lengths is None:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        return iter(get_length_grouped_indices(list(self.lengths), self.batch_size, generator=generator))


class Stopwatch(TrainerCallback, ExportableState):
    """The seconds that a training took, with those up to the checkpoint that it went on from."""

    def __init__(self) -> None:
        self.earlier = 0.0
        self.begin: float | None = None

    @property
    def seconds(self) -> float:
        return self.earlier + (0.0 if self.begin is None else time.perf_counter() - self.begin)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"earlier": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks[type(self).__name__]
        self.earlier, self.begin = saved["attributes"]["earlier"], time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.earlier, self.begin = self.seconds, None


def next_smaller(size: int) -> int | None:
    """The greatest divisor of ``size`` below it: several whole batches of that size are one of ``size``."""
    return next((k for k in range(size // 2, 0, -1) if size % k == 0), None)


class TwoRateTrainer(WholeCheckpointsTrainer):
    """A Trainer whose final layer may learn at a rate of its own: it starts from nothing, the rest does not.

    Args:
        lengths: of the training examples. Those of similar lengths then come together, by batches of ``order_by``.
        on_nan, auto_batch: as in :class:`~loretta.training.config.RunConfig`.
        loss_is_mean: the model gives the mean of a batch, which here becomes its share in the mean of an update.
    """

    def __init__(
        self,
        *args: Any,
        head_learning_rate: float | None,
        lengths: Sequence[int] | None = None,
        on_nan: str = "stop",
        auto_batch: bool = False,
        loss_is_mean: bool = False,
        order_by: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.auto_batch, self.given_batch_size = auto_batch, self.args.train_batch_size
        self.order_by = order_by or self.given_batch_size
        self._filler: Any = None  # a training batch of which no row counts, and whether it is at work
        self._fills = False
        # of an evaluation, for each batch: its mean loss, and over how many labels; None beside one
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.optimizer: torch.optim.Optimizer | None
        self.head_learning_rate = head_learning_rate
        self.lengths = lengths
        self.known: Mapping[str, PredictionOutput] = {}  # by split: what a population has answered for all its members
        self.stopwatch = Stopwatch()
        self.add_callback(self.stopwatch)
        self.finite = FiniteSteps(self, on_nan)
        self.add_callback(self.finite)
        # behind a prompt the first label is predicted too, which the Trainer would not count
        self.loss_is_mean = loss_is_mean or self._learns_prompt()
        if self.loss_is_mean:  # and no longer divided by the batches of an update, by either of the Trainer's names
            self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As the Trainer does, unless the answers to a split are known."""
        return self.known.get(metric_key_prefix) or super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the Trainer does. An attempt that has to be repeated goes on from the last checkpoint, or begins again.

        That is so where ``on_nan`` is "rollback" and :class:`FiniteSteps` asks for it, and with ``auto_batch`` where
        the memory is too small for a batch.
        """
        if self.finite.policy != "rollback" and not self.auto_batch:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        start = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters().items() if p.requires_grad}
        random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        while True:
            if self.auto_batch and resume_from_checkpoint is not None:
                before = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_bytes())
                self._take_batches_of(int(before["train_batch_size"]))
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except RollBack:
                size = self.args.per_device_train_batch_size
            except RuntimeError as error:
                is_step = self.model is not None and self.model.training  # and no evaluation
                if not (self.auto_batch and is_step and is_out_of_memory(error)):
                    raise
                if (smaller := next_smaller(self.args.per_device_train_batch_size)) is None:
                    raise
                size = smaller
            # outside of the exception, which holds on to what the step had allocated
            found = processes.by_first(lambda: find_checkpoint(Path(self.args.output_dir)))
            resume_from_checkpoint = None if found is None else str(found)
            self._forget(start, random)
            self._take_batches_of(size)

    def _forget(self, start: Mapping[str, torch.Tensor], random: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
        """Bring the trained parameters and the random numbers back to where the training began."""
        stop_workers(self)
        self.optimizer = self.lr_scheduler = None
        parameters = self._parameters()
        with torch.no_grad():
            for name, value in start.items():
                parameters[name].grad = None
                parameters[name].copy_(value)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state_all(random[1])
        torch.set_rng_state(random[0])

    def _take_batches_of(self, size: int) -> None:
        """Split the examples of an update into batches of ``size``, which divides their number."""
        args = self.args
        if size < args.per_device_train_batch_size:
            args.gradient_accumulation_steps *= args.per_device_train_batch_size // size
            args.per_device_train_batch_size = size
            self._train_batch_size = args.train_batch_size
            logger.warning(
                "the memory is too small: %d examples at once, %d batches an update",
                *(size, args.gradient_accumulation_steps),
            )

    def notes(self) -> list[str]:
        """What a reader of the result should know, a sentence each."""
        batches = []
        if self.args.train_batch_size != self.given_batch_size:
            batches = [
                f"the memory was too small for batches of {self.given_batch_size}: trained on "
                f"{self.args.train_batch_size} at once, {self.args.gradient_accumulation_steps} batches an update"
            ]
        callbacks = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "notes")]
        return [*(note for callback in callbacks for note in callback.notes()), *batches]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, or the share of a batch in the mean over the labels of an update."""
        if self.loss_is_mean:
            found = self.mean_loss(model, inputs, return_outputs)
        else:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        own: Any = 0
        total: Any = 1
        if not self._fills:
            if not self.loss_is_mean or num_items_in_batch is None:
                return found
            own, total = self.count(inputs), num_items_in_batch
        return (found[0] * own / total, found[1]) if return_outputs else found * own / total

    def mean_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The mean of a batch, with the model's outputs where they are wanted."""
        return super().compute_loss(model, inputs, return_outputs)

    def count(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The number of labels whose mean the loss of a batch is. Pairs of answers have none, and count themselves."""
        if "labels" not in inputs:
            return torch.tensor(len(inputs["input_ids"]))
        labels = inputs["labels"]
        # every score is one, of -100 too
        return torch.tensor(labels.numel()) if labels.is_floating_point() else labels.ne(IGNORED).sum()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As the Trainer does, without the rows that fill up the last batch of an epoch for several processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = self._own_rows()
        if own is None or not batches or not all(isinstance(value, torch.Tensor) for value in batches[-1].values()):
            return batches, items
        # a process of which no row is left takes part in the step, and its loss does not count
        last = {name: value[: max(1, own)] for name, value in batches[-1].items()}
        self._filler = None if own > 0 else last
        counted = last if own > 0 else {**last, "labels": torch.full_like(last["labels"], IGNORED, dtype=torch.long)}
        return [*batches[:-1], last], self._get_num_items_in_batch([*batches[:-1], counted], device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Of mean losses how many labels a process has in the mean, for the mean of their gradients is taken."""
        if not self.loss_is_mean or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        own = torch.stack([self.count(batch) for batch in batch_samples]).sum().to(device)
        return own if self._losses is not None else self.accelerator.gather(own).float().mean()

    def _own_rows(self) -> int | None:
        """How many rows of its batch this process counts: several processes fill the last batch of an epoch up."""
        loader = self.accelerator.gradient_state
        if processes.count() == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
            return None
        size = loader.active_dataloader.total_batch_size // processes.count()
        return min(size, max(0, loader.remainder - size * processes.rank()))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._fills = inputs is self._filler
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._fills = False

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the Trainer does, but the loss is the mean over all labels, whatever batches and processes they are in.

        The Trainer's is the mean over batches, each weighted by its rows, with those that fill up the last one.
        """
        self._losses = []
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            batches, self._losses = self._losses, None
        if batches:
            losses, counts = (torch.stack(column).cpu().double() for column in zip(*batches, strict=True))
            sums = processes.gather([(losses * counts).sum().item(), counts.sum().item()])
            total, count = torch.tensor(sums).double().sum(0)
            output.metrics[f"{metric_key_prefix}_loss"] = (total / count).item()
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if loss is not None and self._losses is not None:
            counted, own = loss, self._own_rows()
            if own is not None:  # all processes compute again, which FSDP needs
                inputs = self._prepare_inputs({name: value[: max(1, own)] for name, value in inputs.items()})
                with torch.no_grad(), self.compute_loss_context_manager():
                    counted = self.compute_loss(model, inputs)
            self._losses.append((counted.detach(), self.count(inputs) * (own != 0)))
        return loss, logits, labels

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(data), seed=self.args.seed, batch_size=self.order_by, lengths=self.lengths)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        # the Trainer would group by length here too, and return predictions in that order
        return SequentialSampler(eval_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.head_learning_rate is not None:
            named = (self.model if model is None else model).named_parameters()
            ids = {id(parameter) for name, parameter in named if is_final_layer(name)}
            for group in list(optimizer.param_groups):
                final = [parameter for parameter in group["params"] if id(parameter) in ids]
                if final:  # it decays as it would without a rate of its own
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
                    optimizer.add_param_group({**group, "params": final, "lr": self.head_learning_rate})
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finite.check_weights()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._learns_prompt() and self.args.should_save:
            trained = {name: p.detach().contiguous() for name, p in self._parameters().items() if p.requires_grad}
            save_file(trained, Path(output_dir or self.args.output_dir) / TRAINED)

    @torch.no_grad()
    def load_trained(self, checkpoint: Path) -> bool:
        if not self._learns_prompt():
            return super().load_trained(checkpoint)
        parameters = self._parameters()
        for name, tensor in load_file(checkpoint / TRAINED).items():
            parameters[name].copy_(tensor)
        return True

    def _learns_prompt(self) -> bool:
        """Whether PEFT saves the outputs of the trained parameters in their place: from these no training can go on."""
        return isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning

    def _parameters(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return dict(self.model.named_parameters())
