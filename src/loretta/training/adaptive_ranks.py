"""Ranks that adapt while the Trainer trains: :class:`AdaptiveRanks`."""

from collections.abc import Sequence
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from loretta import processes
from loretta.errors import InputError
from loretta.plan.budget import Budget
from loretta.tuners.ranks import RankedTrains, allot

LOOKS = 3  # at the singular values, for each cut
KEPT = 0.5  # of the earlier looks in their running mean
# what Adam and Adagrad hold, the latter from before its first step on
FROM_ZERO = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sum"}


class AdaptiveRanks(TrainerCallback, ExportableState):
    """Lowers the ranks of a rep adapter while it trains, each module's for itself, until all of it fits a budget.

    Make the adapter with a ``tensor_rank`` above what the budget allows. Between ``begin`` and ``end`` of the training
    it follows the singular values of each update, and in ``cuts`` steps it removes the ranks that lose the least for
    each parameter. Then the ranks stay, and only evaluations from there on choose the best checkpoint. When training
    ends, the model holds an ordinary adapter of the final ranks (``rank_pattern``) within the budget.

    Args:
        budget: of all that is trained, as for ``loretta plan``: "20k" (parameters), "80kB" (bytes in float32), or a
            number of parameters.
        begin, end: shares of the steps.
        cuts: how often ranks are removed; the budget falls from cut to cut as AdaLoRA's does (Zhang et al. 2023).
        adapter_name: the adapter whose ranks adapt.

    Raises InputError at the start of the training for an adapter that is not rep, and a budget too small for rank 1.
    """

    def __init__(
        self, budget: str | int, *, begin: float = 0.2, end: float = 0.6, cuts: int = 4, adapter_name: str = "default"
    ) -> None:
        self.budget = Budget.parse(budget)
        if not (0 <= begin < end <= 1 and cuts >= 1):
            raise InputError(f"begin={begin}, end={end}, cuts={cuts}: give 0 <= begin < end <= 1 and at least one cut")
        self.begin, self.end, self.cuts, self.adapter_name = begin, end, cuts, adapter_name
        self.given = {"budget": budget, "begin": begin, "end": end, "cuts": cuts, "adapter_name": adapter_name}
        self.masses: dict[str, list[float]] = {}
        self.trains: RankedTrains | None = None
        self.room = self.widest = 0

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        ranks = {} if self.trains is None else self.trains.ranks
        return {"args": self.given, "attributes": {"ranks": dict(ranks), "masses": self.masses}}

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        saved: Any = state.stateful_callbacks.get(type(self).__name__)
        self.trains, self.masses = RankedTrains(model, self.adapter_name), {}
        counted = (
            (p for p in model.parameters() if p.requires_grad)
            if self.budget.unit == "parameters"
            else get_peft_model_state_dict(model, adapter_name=self.adapter_name).values()
        )
        self.widest = self.trains.n_params()
        others = sum(tensor.numel() for tensor in counted) - self.widest
        self.room = self.budget.amount // (1 if self.budget.unit == "parameters" else 4) - others
        allot(self.trains.masses(), self.trains.sizes(), self.room)  # refuses a budget that is too small
        if state.global_step > 0 and saved is not None and saved["attributes"]["ranks"]:
            self.trains.ranks |= saved["attributes"]["ranks"]
            self.masses = saved["attributes"]["masses"]

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        forget(optimizer, self.follow(state))

    def due(self, state: TrainerState) -> list[int]:
        """The looks, counted from 1, that fall on the step of now."""
        looks = self.cuts * LOOKS
        first, length = self.begin * state.max_steps, (self.end - self.begin) * state.max_steps
        return [k for k in range(1, looks + 1) if max(1, round(first + length * k / looks)) == state.global_step]

    def follow(self, state: TrainerState) -> list[nn.Parameter]:
        """Look and cut where that is due. Returns the cores that were rewritten, which an optimizer should forget."""
        due = self.due(state)
        if not due or self.trains is None:
            return []
        self._look()
        cut = max((k // LOOKS for k in due if k % LOOKS == 0), default=None)
        if cut is None:
            return []
        # as AdaLoRA's budget falls: fast at first, when the ranks that go have learned least
        above = max(0, self.widest - self.room) * (1 - cut / self.cuts) ** 3
        changed = self._lower(self.room + int(above))
        if changed:
            # an adapter of higher ranks is no candidate for the best one
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        return changed

    def settle(self) -> list[nn.Parameter]:
        """Cut what stopped before its last cut to the budget. Returns the cores that were rewritten."""
        if self.trains is None or self.trains.n_params() <= self.room:
            return []
        self._look()
        return self._lower(self.room)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trains is not None:
            self.settle()
            self.trains.shrink()

    def notes(self) -> list[str]:
        """What came of it, in a sentence."""
        if self.trains is None:
            return []
        ranks = sorted(self.trains.ranks.values())
        middle = ranks[len(ranks) // 2]
        found = [
            f"ranks adapted to {self.budget}: from {ranks[0]} to {ranks[-1]}, in the middle {middle}; the trains have "
            f"{self.trains.n_params():,} parameters, and had {self.widest:,}"
        ]
        if any(len(down.modes) > 1 for shapes in self.trains.shapes.values() for down, _ in shapes):
            found.append(
                "trains of several modes a side scored lower with adaptive ranks than with constant ones where both "
                "were measured (docs/choosing.md): compare the two"
            )
        return found

    def _look(self) -> None:
        assert self.trains is not None
        # of several processes all lower the same ranks, though their last bits may differ
        for name, now in processes.by_first(self.trains.masses).items():
            before = self.masses.get(name, now)
            self.masses[name] = [KEPT * b + (1 - KEPT) * n for b, n in zip(before, now, strict=True)]

    def _lower(self, room: int) -> list[nn.Parameter]:
        assert self.trains is not None
        ranks, sizes = self.trains.ranks, self.trains.sizes()
        masses = {name: self.masses[name][: ranks[name]] for name in ranks}
        return self.trains.lower(allot(masses, {name: sizes[name][: ranks[name]] for name in ranks}, room))


def forget(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Have an optimizer begin anew with parameters that were rewritten, whose moments belong to other directions.

    The tensors of Adam stay where they are, for recorded steps read them there.
    """
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if state.keys() <= FROM_ZERO and all(type(value) is Tensor for value in state.values()):
            for value in state.values():
                value.zero_()
        else:  # made anew at the next step: quantised moments, copies of the parameter, rates of its entries
            del optimizer.state[parameter]
