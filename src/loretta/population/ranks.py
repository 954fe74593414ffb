"""Adaptive ranks of members: each member's own :class:`AdaptiveRanks` decides, by the member's own values."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from transformers.trainer_callback import TrainerControl

from loretta.population.optimizer import MemberAdamW
from loretta.population.population import Population
from loretta.training.adaptive_ranks import AdaptiveRanks
from loretta.training.trainer import TwoRateTrainer


class MemberRanks:
    """The callbacks of all members whose ranks adapt.

    Equal trains stay in one stack: what is cut of a member is zero in its row and gets no gradient. So a member becomes
    the ordinary model only to be looked at, to be cut, and to be saved with small trains in the end.
    """

    def __init__(self, population: Population, trainers: Sequence[TwoRateTrainer]) -> None:
        self.population, self.trainers = population, trainers
        callbacks = [trainer.callback_handler.callbacks for trainer in trainers]
        self.of = {k: each for k, own in enumerate(callbacks) for each in own if isinstance(each, AdaptiveRanks)}

    def begin(self) -> None:
        """Start from the ranks in each Trainer's state, or from the widest. Raises InputError as the callback does."""
        for k, ranks in self.of.items():
            trainer = self.trainers[k]
            with self.population.released(k) as model:
                ranks.on_train_begin(trainer.args, trainer.state, TrainerControl(), model=model)

    def follow(self, optimizer: MemberAdamW, stopped: Sequence[bool]) -> None:
        """Where that is due behind the step of now, look at the members that have not stopped, and cut them.

        What came of it is put into each Trainer's state, for a checkpoint.
        """
        for k, ranks in self.of.items():
            state = self.trainers[k].state
            if not stopped[k] and ranks.due(state):
                with self.population.released(k):
                    optimizer.forget(k, self.population.take(k, ranks.follow(state), self.population.values))
                state.stateful_callbacks[type(ranks).__name__] = ranks.state()

    def settle(self, kept: Callable[[int], Tensor]) -> None:
        """Bring members within their budget that stopped before their last cut. ``kept`` (P, N) has a member's row."""
        for k, ranks in self.of.items():
            with self.population.released(k, kept(k)):
                self.population.take(k, ranks.settle(), kept(k))

    def shrunk(self, k: int) -> AbstractContextManager[None]:
        """Until the block ends, the released model has trains of the ranks that the member ended with."""
        trains = self.of[k].trains if k in self.of else None
        return nullcontext() if trains is None else trains.shrunk()
