"""Training steps recorded as CUDA graphs: a Trainer for models whose eager steps wait for the CPU.

A step of a small model, or of one with many small modules, is hundreds of kernels of a few microseconds that the CPU
cannot launch fast enough. Here each shape of batch is recorded once, and then launched with one call.
"""

import logging
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from loretta.training.batches import AsArrays, PadToBucket, Shapes, as_tensors, shapes_of
from loretta.training.model import room_of
from loretta.training.recordings import Gradients, Rates, Recorder, Recording, Work
from loretta.wording import one_line

logger = logging.getLogger(__name__)


class CudaGraphTrainer(Trainer):
    """A Trainer that replays its training steps as CUDA graphs, one for each shape of batch.

    It takes what :class:`transformers.Trainer` takes, and stands in front of a subclass of it as a mixin. Batches are
    padded up to a few lengths (:class:`~loretta.training.batches.PadToBucket`). The first batch of a shape is trained
    eagerly, the second is recorded, all others are replayed: forward, backward, clipping and the update, or, with
    gradient accumulation, forward and backward in one graph per shape and the update in another. The update is recorded
    for a fused Adam or AdamW, which is what the Trainer takes by default. The learning rate is an input of the
    recording, so any schedule works.

    The CPU waits for the GPU only to log, to evaluate and to save. Therefore a loss that is NaN is logged as NaN,
    whatever ``logging_nan_inf_filter`` says. To keep the GPU busy, batches must come fast enough: give
    ``dataloader_num_workers`` where a model is small.

    What runs in Python in a step runs when it is recorded, and not in a replay: hooks, ``compute_loss``, a module that
    changes with the number of the step. Callbacks find no gradients in ``on_pre_optimizer_step``. Which parameters
    are trained must not change within a call of :meth:`train`.

    Where nothing can be recorded it trains as its base class does, and says in one line why; :attr:`why_eager` has
    the reason.

    Args:
        max_graphs: Shapes of batches to record. Further ones are trained eagerly.
    """

    data_collator: Any
    optimizer: Any
    current_gradient_accumulation_steps: Any

    def __init__(self, *args: Any, max_graphs: int = 32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_graphs = max_graphs
        self.why_eager: str | None = None
        self.replayed = 0  # batches that were trained by a replay
        self._graphs: _Graphs | None = None
        self._norm: Tensor | None = None
        self._flops: dict[Shapes, int] = {}
        self._during_training = ExitStack()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.why_eager, self.replayed = None, 0
        if (obstacle := find_obstacle(self)) is not None:
            self._go_on_eagerly(obstacle)
            return super()._inner_training_loop(*args, **kwargs)
        looks_at_each_loss, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            with Recorder.stream(), self._during_training:
                self._graphs = _Graphs(Recorder())
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = looks_at_each_loss
            self._graphs = self._norm = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if self._graphs is not None:
            # they walk through all modules and look for packages, which takes as long as a replay
            for owner, name in ((model, "zero_grad"), (self.optimizer, "step")):
                self._during_training.enter_context(_replaced(owner, name, self._unless_replayed))
        return model, loader

    def _unless_replayed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Do ``work``, a part of the update in the Trainer's loop, only where no replay has done the update."""

        @wraps(work)
        def work_left(*args: Any, **kwargs: Any) -> Any:
            return work(*args, **kwargs) if self._norm is None else None

        return work_left

    def get_train_dataloader(self) -> DataLoader:
        if self._graphs is None:
            return super().get_train_dataloader()
        collator = self.data_collator
        self.data_collator = PadToBucket(collator, self._padding_token(), room_of(self.model))
        if self.args.dataloader_num_workers > 0:
            self.data_collator = AsArrays(self.data_collator)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        # Accelerate would copy a batch to the GPU and wait for it, behind all steps that are under way
        loader.device = None
        return loader

    def _padding_token(self) -> int:
        for owner in (self.processing_class, getattr(self.model, "config", None)):
            if isinstance(token := getattr(owner, "pad_token_id", None), int):
                return token
        return 0

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of an update, whose arrays (:class:`~loretta.training.batches.AsArrays`) are tensors again."""
        if self._graphs is not None and self.args.dataloader_num_workers > 0:
            pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
            epoch_iterator = (as_tensors(batch, pin=pin) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # the batches are still in the memory of the CPU, and so is their number
        return super()._get_num_items_in_batch(batch_samples, torch.device("cpu") if self._graphs else device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, which counts all parameters of the model at each step, but once for each shape."""
        shapes = shapes_of(inputs)
        if shapes is None:
            return super().floating_point_ops(inputs)
        if shapes not in self._flops:
            self._flops[shapes] = super().floating_point_ops(inputs)
        return self._flops[shapes]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Train on a batch: replay its graph, record it, or train eagerly."""
        self._norm = None
        if (graphs := self._graphs) is None:
            return super().training_step(model, inputs, num_items_in_batch)
        updates = self._can_record_update()
        if gathers := self.args.gradient_accumulation_steps > 1 or not updates:
            graphs.gradients.attach()
        if (recording := self._find_recording(model, inputs, num_items_in_batch, gathers=gathers)) is not None:
            recording.load(inputs, num_items_in_batch)
            graphs.load(self)
            loss, self._norm = recording.replay()
            self.replayed += 1
        else:
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(self.args.device)
            loss = super().training_step(model, inputs, num_items_in_batch)
            if gathers:
                graphs.gradients.keep(model)
        if gathers and updates and self.accelerator.sync_gradients and self._has_updated():
            loss = loss.clone()  # the graphs share their memory: that of the update may write where the loss stands
            self._replay_update(model, loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model) if self._norm is None else self._norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm=grad_norm) if self._norm is None else self._norm

    def _find_recording(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, *, gathers: bool
    ) -> Recording | None:
        """The recording for batches of this shape; None where it is, or stays, one to train eagerly."""
        graphs = self._graphs
        assert graphs is not None
        if self.why_eager is not None:
            return None
        if (shapes := shapes_of(inputs)) is None:
            names = [repr(name) for name, value in inputs.items() if not isinstance(value, Tensor)]
            self._go_on_eagerly(f"batches hold {', '.join(names)}, which is no tensor")
            return None
        if shapes in graphs.steps:
            return graphs.steps[shapes]
        if shapes not in graphs.seen:
            # once eagerly: kernels are compiled, libraries get their memory, the optimizer its state
            graphs.seen.add(shapes)
            return None
        if len(graphs.steps) == self.max_graphs or not (gathers or self._has_updated()):
            return None
        recording = Recording.of(inputs, num_items, self.args.device)
        try:
            recording.replay = self._record_step(model, recording, gathers=gathers)
        except RuntimeError as error:
            self._go_on_eagerly(f"a step of this model cannot be recorded ({one_line(error, 200)})")
            return None
        graphs.steps[shapes] = recording
        return recording

    def _record_step(self, model: nn.Module, recording: Recording, *, gathers: bool) -> Work:
        """Record the step of one shape. Nothing is computed, and where it fails nothing has changed."""
        graphs = self._graphs
        assert graphs is not None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        micro_steps, step, optimizer = (
            self.current_gradient_accumulation_steps,
            super().training_step,
            self._optimizer(),
        )
        known: Container[Tensor] = graphs.gradients.of if gathers else optimizer.state

        def work() -> tuple[Tensor, Tensor | None]:
            loss = step(model, dict(recording.inputs), recording.num_items)
            if not all(parameter.grad is None or parameter in known for parameter in trained):
                raise RuntimeError("not every batch trains the same parameters")
            return loss, None if gathers else self._update(model)

        try:
            if self.args.gradient_accumulation_steps > 1:
                self.current_gradient_accumulation_steps = graphs.micro_steps(self.args.device)
            with nullcontext() if gathers else graphs.rates.as_inputs(optimizer):
                return graphs.recorder.record(work)
        finally:
            self.current_gradient_accumulation_steps = micro_steps
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient

    def _update(self, model: nn.Module) -> Tensor:
        """Clip and step, as the Trainer's loop does after the backward pass. Returns the norm of the gradients."""
        clipped = super()._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        norm = super()._get_grad_norm(model, grad_norm=clipped)
        self.optimizer.step()
        return norm

    def _replay_update(self, model: nn.Module, loss: Tensor) -> None:
        """The update on its own, from gradients that were gathered over some batches."""
        graphs = self._graphs
        assert graphs is not None

        def work() -> tuple[Tensor, Tensor]:
            norm = self._update(model)
            graphs.gradients.set_to_zero()
            return loss, norm

        if graphs.update is None and self.why_eager is None:
            try:
                with graphs.rates.as_inputs(self._optimizer()):
                    graphs.update = graphs.recorder.record(work)
            except RuntimeError as error:
                self._go_on_eagerly(f"the update cannot be recorded ({one_line(error, 200)})")
        if graphs.update is not None:
            graphs.load(self)
            _, self._norm = graphs.update()

    def _optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _can_record_update(self) -> bool:
        # all other optimizers take the learning rate as a number, and some read their state on the CPU
        return all(group.get("fused") and "capturable" in group for group in self._optimizer().param_groups)

    def _has_updated(self) -> bool:
        """Whether the optimizer has its state. If its first step were recorded, every replay would be a first step."""
        return bool(self._optimizer().state)

    def _go_on_eagerly(self, reason: str) -> None:
        self.why_eager = reason
        logger.warning("no CUDA graphs, training is eager: %s", reason)


def find_obstacle(trainer: Trainer) -> str | None:
    """Why no step of ``trainer`` can be recorded, as far as that is known before the first one; None if it is not."""
    args, model = trainer.args, trainer.model
    assert model is not None
    obstacles = {
        f"the device is {args.device.type}, and CUDA graphs are for cuda": args.device.type != "cuda",
        "several GPUs share the work": args.n_gpu > 1 or args.world_size > 1 or trainer.is_model_parallel,
        "fp16 looks at the gradients of each step to scale the loss; bf16 does not": args.fp16,
        "the base model is quantized": getattr(model, "is_quantized", False),
        "gradient checkpointing reads the state of the random numbers": any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        ),
        "torch_compile has CUDA graphs of its own (mode reduce-overhead)": args.torch_compile,
        "torch_empty_cache_steps frees memory within a step": args.torch_empty_cache_steps is not None,
    }
    return next((reason for reason, is_there in obstacles.items() if is_there), None)


class _Graphs:
    """All that one call of :meth:`CudaGraphTrainer.train` has recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.seen: set[Shapes] = set()
        self.steps: dict[Shapes, Recording] = {}
        self.update: Work | None = None
        self.rates, self.gradients = Rates(), Gradients()
        self._micro_steps: Tensor | None = None

    def micro_steps(self, device: torch.device) -> Tensor:
        """How many batches the current update has, as an input: at the end of an epoch it may be fewer."""
        if self._micro_steps is None:
            self._micro_steps = torch.ones((), device=device)
        return self._micro_steps

    def load(self, trainer: CudaGraphTrainer) -> None:
        """Bring the inputs that are no part of a batch up to date."""
        self.rates.load(trainer._optimizer())
        if self._micro_steps is not None:
            self._micro_steps.fill_(trainer.current_gradient_accumulation_steps)


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the method ``name`` of ``owner`` by what ``by`` makes of it, until the block ends."""
    own = vars(owner).get(name)  # a scheduler, too, puts a method of its own into an optimizer
    setattr(owner, name, by(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
