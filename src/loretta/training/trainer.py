"""Hugging Face's Trainer with what every run has in common: its order of the data, its rates, its checkpoints."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from loretta.training.batches import stop_workers
from loretta.training.checkpoints import WholeCheckpointsTrainer, find_checkpoint
from loretta.training.finite import FiniteSteps, RollBack
from loretta.tuners.task_types import is_final_layer

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
        # a checkpoint of an earlier version holds none
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.earlier, self.begin = saved["attributes"]["earlier"], time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.earlier, self.begin = self.seconds, None


class TwoRateTrainer(WholeCheckpointsTrainer):
    """A Trainer whose final layer may learn at a rate of its own: it starts from nothing, the rest does not.

    Args:
        lengths: of the training examples. Examples of similar lengths then come together.
    """

    def __init__(
        self,
        *args: Any,
        head_learning_rate: float | None,
        lengths: Sequence[int] | None = None,
        on_nan: str = "stop",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer: torch.optim.Optimizer | None
        self.head_learning_rate = head_learning_rate
        self.lengths = lengths
        self.stopwatch = Stopwatch()
        self.add_callback(self.stopwatch)
        self.finite = FiniteSteps(self, on_nan)
        self.add_callback(self.finite)
        if self._learns_prompt():
            # the Trainer would divide by the labels it sees, and behind a prompt the first one is predicted too
            self.model_accepts_loss_kwargs = False

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the Trainer does; with ``on_nan`` "rollback" as often as :class:`FiniteSteps` asks for it."""
        if self.finite.policy != "rollback":
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        start = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters().items() if p.requires_grad}
        random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        while True:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except RollBack:
                found = find_checkpoint(Path(self.args.output_dir))
            resume_from_checkpoint = None if found is None else str(found)
            stop_workers(self)
            self.optimizer = self.lr_scheduler = None
            parameters = self._parameters()
            with torch.no_grad():
                for name, value in start.items():
                    parameters[name].grad = None
                    parameters[name].copy_(value)
            torch.set_rng_state(random[0])
            torch.cuda.set_rng_state_all(random[1])

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(data), seed=self.args.seed, batch_size=self.args.train_batch_size, lengths=self.lengths)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        # the Trainer would group by length here too, and return predictions in that order
        return SequentialSampler(eval_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.head_learning_rate is not None:
            model = self.model if model is None else model
            assert model is not None
            final = [p for name, p in model.named_parameters() if p.requires_grad and is_final_layer(name)]
            ids = {id(p) for p in final}
            rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
            groups = [{"params": rest}, {"params": final, "lr": self.head_learning_rate}]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = cls(groups, weight_decay=self.args.weight_decay, **kwargs)
        return super().create_optimizer(model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finite.check_weights()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._learns_prompt() and self.args.should_save:
            trained = {name: p.detach().contiguous() for name, p in self._parameters().items() if p.requires_grad}
            save_file(trained, Path(output_dir or self.args.output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._learns_prompt():
            self._load_trained(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._learns_prompt():
            assert self.state.best_model_checkpoint is not None
            self._load_trained(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _learns_prompt(self) -> bool:
        """Whether PEFT saves the outputs of the trained parameters in their place: from these no training can go on."""
        return isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning

    @torch.no_grad()
    def _load_trained(self, checkpoint: str) -> None:
        parameters = self._parameters()
        for name, tensor in load_file(Path(checkpoint) / TRAINED).items():
            parameters[name].copy_(tensor)

    def _parameters(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return dict(self.model.named_parameters())
