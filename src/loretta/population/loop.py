"""The training loop of a population.

The Trainer has one schedule, one loss and one best checkpoint; a population has P of each. So each member keeps the
Trainer that it would have alone, and the loop asks that Trainer for its decisions: the rates, the order of the data,
when to log and to evaluate, and which step is best.

Axes: P members, N trained numbers of each, b rows of one member in a batch.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl
from transformers.trainer_utils import PredictionOutput

from loretta.errors import InputError
from loretta.population.graphs import Graphs
from loretta.population.optimizer import MemberAdamW
from loretta.population.population import Population
from loretta.population.ranks import MemberRanks
from loretta.population.rows import Rows, mean_of_batches, near, row_losses
from loretta.training.batches import bucket
from loretta.training.forms import Data
from loretta.training.recordings import Recorder
from loretta.training.trainer import TwoRateTrainer

logger = logging.getLogger(__name__)

# a batch is cut into this many pieces, and parts of rows with similar lengths are made of them
PIECES = 4
# cost of a part whatever its size, in tokens times width: on a CPU its calls; on a GPU the launches of some 700 kernels
# and, above all, its share of recording another shape
FIXED = {"cuda": 2**23, "cpu": 2**13}
# largest part, in tokens times width, where memory is small: a larger one is no faster per token and takes more of it
MOST = {"cuda": 2**25, "cpu": 2**22}
# that of a large GPU, where fewer parts are fewer launches and fewer shapes to record
MOST_ON_LARGE = 2**26
# memory of a part for each of its tokens, numbers of their width, and layers; measured were 33, and more with graphs
BYTES = 128
# logits at once where each token has them: of a vocabulary of 49,152 a token of 576 numbers has 85 times as many
LOGITS = {"cuda": 2**30, "cpu": 2**28}
# rows that are scored keep no activations for a backward pass, so there may be as many times more tokens at once
SCORED = 8
# from this many rows times width on, padding costs a whole training more than the second that twice the shapes take
MANY_ROWS = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Member(Data):
    """One run of a population, with the Trainer that it would have alone."""

    trainer: TwoRateTrainer


class Rules:
    """The decisions of the members' own Trainers, collected while their model is still the ordinary one."""

    def __init__(self, members: Sequence[Member]) -> None:
        sizes = {tuple(len(member.splits[split]) for split in ("train", "validation")) for member in members}
        if len(sizes) > 1:
            # seeds hold out different numbers of rows where texts of a table occur twice
            raise InputError(
                f"members of a population have equally many examples to train and to validate, got {sizes}"
            )
        first = members[0]
        self.size, self.batch_size = sizes.pop()[0], first.trainer.args.per_device_train_batch_size
        self.steps_in_epoch = max(1, math.ceil(self.size / self.batch_size))
        args = first.trainer.args
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_in_epoch)
        self.rates: list[dict[str, tuple[float, float]]] = []  # name -> learning rate, weight decay
        self.logged: list[float] = []  # the rate that each Trainer logs
        factors = []
        for member in members:
            trainer: Any = member.trainer
            names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
            optimizer = trainer.create_optimizer()
            groups = [
                (group["lr"], group["weight_decay"], p) for group in optimizer.param_groups for p in group["params"]
            ]
            self.logged.append(optimizer.param_groups[0]["lr"])
            self.rates.append({names[id(parameter)]: (rate, decay) for rate, decay, parameter in groups})
            schedule = trainer.create_scheduler(self.steps, optimizer).lr_lambdas[0]
            factors.append([schedule(step) for step in range(self.steps + 1)])
            trainer.optimizer = trainer.lr_scheduler = None
        self.factors = torch.tensor(factors, dtype=torch.float64)  # (P, steps + 1)
        # members of one seed see the same data in the same order
        self.orders = {
            (member.config.seed, id(member.splits["train"])): member.trainer._get_train_sampler() for member in members
        }
        self.order_of = [(member.config.seed, id(member.splits["train"])) for member in members]

    def order(self, epoch: int) -> Tensor:
        """(P, examples): each member's examples in the order of an epoch."""
        found = {}
        for key, order in self.orders.items():
            order.set_epoch(epoch)  # type: ignore[attr-defined]
            found[key] = torch.tensor(list(order))
        return torch.stack([found[key] for key in self.order_of])

    def of_parameters(self, population: Population, which: int) -> Tensor:
        """The learning rates (0) or weight decays (1): (P, 1), or (P, parameters) where they differ within a member."""
        found = [[rules[name][which] for name in population.slices] for rules in self.rates]
        alike = all(len(set(of_member)) == 1 for of_member in found)
        return population.values.new_tensor([of_member[:1] for of_member in found] if alike else found)


class Loop:
    """Trains a population; :attr:`best` (P, N) holds the values of each member at its best step.

    The ``rules`` of the members were collected before the population replaced the modules of their model.
    """

    def __init__(self, population: Population, members: Sequence[Member], rules: Rules) -> None:
        first = members[0]
        self.population, self.members, self.rules = population, members, rules
        # called with this loop after each evaluation, and after each step and the evaluation that may follow it
        self.save: Callable[[Loop], None] = lambda loop: None
        self.after_step: Callable[[Loop], None] = lambda loop: None
        self.args, self.kind = first.trainer.args, first.task.kind
        self.ranks = MemberRanks(population, [member.trainer for member in members])
        self.device = population.values.device
        tokenizer: Any = first.trainer.processing_class
        cuda_graph = first.config.cuda_graph and self.device.type == "cuda"
        self._of_rows: dict[str, Any] = {
            "collator": first.trainer.data_collator,
            "device": self.device,
            "on_left": tokenizer.padding_side == "left",
            "kind": self.kind,
        }
        if cuda_graph:
            n_rows = rules.steps * rules.batch_size * population.size
            self._of_rows["padded"] = near if n_rows * population.width >= MANY_ROWS else bucket
        self.rows = {split: self._rows_of(split) for split in ("train", "validation")}
        fixed, most, logits = (each.get(self.device.type, each["cuda"]) for each in (FIXED, MOST, LOGITS))
        if self.device.type == "cuda" and (layers := population.layers) is not None:
            most = largest_part(torch.cuda.get_device_properties(self.device).total_memory, layers)
        self.fixed, tokens = fixed / population.width, most / population.width
        with_logits = logits / population.vocabulary if self.kind == "language_modeling" else math.inf
        self.most, self.most_scored = min(tokens, with_logits), min(SCORED * tokens, with_logits)
        tokens = population.size * self.rows["train"].longest  # of one row of each member
        if self.device.type == "cpu" and population.size > 1 and tokens > self.most:
            # a GPU refuses what is too large, but a system without memory kills; and more at once are no faster
            raise MemoryError(f"a row of each is {tokens:,} tokens, of which {int(self.most):,} are computed at once")
        self.parts = max(PIECES, math.ceil(rules.batch_size / max(1, int(self.most / tokens))))
        self.optimizer = MemberAdamW(
            population.values,
            population.gradient,
            rates=rules.of_parameters(population, 0),
            decays=rules.of_parameters(population, 1),
            slices=population.slices,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            max_norm=self.args.max_grad_norm,
            forgets=bool(self.ranks.of),
        )
        self.best = population.values.clone()
        self.step, self.logged, self.seconds = 0, 0, 0.0
        self.stopped = [False] * population.size  # early: such a member still computes, but nothing of it is noted
        self.not_finite: dict[int, int] = {}  # stopped member -> the step after which its values were not finite
        self.loss = population.values.new_zeros(population.size)  # summed since the last log
        self.factor = torch.ones(population.size, 1, dtype=population.values.dtype, device=self.device)
        self.graphs = Graphs() if cuda_graph else None
        self.scoring = Graphs() if cuda_graph else None
        for member in members:
            member.trainer.state.compute_steps(member.trainer.args, rules.steps)
            member.trainer.state.max_steps = rules.steps

    def in_parts(self, rows_Pb: Tensor) -> list[dict[str, Tensor]]:
        """The batch of each member's training examples ``rows_Pb``, in the parts that cost least."""
        return self.rows["train"].parts(rows_Pb, self.parts, fixed=self.fixed, most=self.most)

    def sample(self) -> dict[str, Tensor]:
        """The inputs of two rows of each member, cut to what is computed at once: for a look at the logits."""
        rows = torch.arange(min(2, self.rules.size)).expand(self.population.size, -1)
        inputs = self.rows["train"].batch(rows, most=max(1, int(self.most / rows.numel())))
        inputs.pop("labels")
        return inputs

    def try_largest(self) -> None:
        """Compute the largest part that the training can have, and forget it: too little memory is found at once."""
        rows, size = self.rows["train"], self.rules.size
        longest = rows.lengths[:size].topk(min(self.rules.batch_size, size)).indices
        self.population.train()
        self.losses(max(self.in_parts(longest.expand(self.population.size, -1)), key=lambda p: p["input_ids"].numel()))

    def _rows_of(self, split: str) -> Rows:
        return Rows([member.splits[split] for member in self.members], **self._of_rows)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes, with a row for each member."""
        return {
            "values": self.population.values, **self.optimizer.tensors(), "best": self.best, "loss": self.loss,
        }  # fmt: skip

    def kept(self, k: int) -> Tensor:
        """Where a member's row has the values that it keeps."""
        return self.best if self.members[k].trainer.state.best_global_step else self.population.values

    def train(self, until: int | None = None) -> None:
        """Train from :attr:`step` to the end, or to the step ``until``, after which all members are evaluated."""
        flow, rules, state = DefaultFlowCallback(), self.rules, copy(self.members[0].trainer.state)
        begin, before = time.perf_counter(), self.seconds
        self.ranks.begin()
        self.population.train()
        self.population.gradient.zero_()
        with ExitStack() as stack:
            if self.graphs is not None:
                stack.enter_context(Recorder.stream())
            while self.step < (rules.steps if until is None else until) and not all(self.stopped):
                epoch, done = divmod(self.step, rules.steps_in_epoch)
                batches = rules.order(epoch).split(rules.batch_size, 1)
                for k in range(done, len(batches)):
                    self._train_on(self.in_parts(batches[k]))
                    self.seconds = before + time.perf_counter() - begin
                    state.global_step, state.epoch = self.step, epoch + (k + 1) / rules.steps_in_epoch
                    control = flow.on_step_end(self.args, state, TrainerControl())
                    if k + 1 == len(batches) or self.step == rules.steps:
                        control = flow.on_epoch_end(self.args, state, control)
                    for member in self._running():
                        member.trainer.state.global_step, member.trainer.state.epoch = self.step, state.epoch
                    self.ranks.follow(self.optimizer, self.stopped)
                    if control.should_log:
                        self._log()
                    if control.should_evaluate or self.step == until:
                        self._evaluate()
                        self.seconds = before + time.perf_counter() - begin  # evaluations count, as in a Trainer's time
                    self.after_step(self)
                    if self.step in (rules.steps, until) or all(self.stopped):
                        return

    def _running(self) -> Iterator[Member]:
        return (member for member, stopped in zip(self.members, self.stopped, strict=True) if not stopped)

    def _train_on(self, parts: Sequence[dict[str, Tensor]]) -> None:
        factors = self.rules.factors[:, self.step, None]
        self.factor.copy_(factors, non_blocking=True)
        for part in parts:
            self.loss += self.losses(part) if self.graphs is None else self.graphs.replay(part, self.losses)
        if self.graphs is None:
            self._update({})
        else:
            self.graphs.replay({}, self._update)
        self.step += 1

    def losses(self, part: Mapping[str, Tensor]) -> Tensor:
        """(P): what a part of a batch adds to the loss of each member. Its gradient is accumulated."""
        inputs = dict(part)
        labels, weights = inputs.pop("labels"), inputs.pop("weights")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            logits = self.population(**inputs).logits
        sums, _ = row_losses(logits, labels, self.kind)
        losses = sums.view(self.population.size, -1).sum(1) * weights.to(sums.dtype)
        self.population.backward(losses, add=True)
        return losses.detach()

    def _update(self, nothing: Mapping[str, Tensor]) -> Tensor:
        """One step of all members; the next gradient begins at zero."""
        self.optimizer.step(self.factor)
        self.population.gradient.zero_()
        return self.optimizer.norms

    def _log(self) -> None:
        each = zip(self.members, self.loss.tolist(), self.optimizer.norms.tolist(), strict=True)
        for k, (member, loss, norm) in enumerate(each):
            if self.stopped[k]:
                continue
            rate = self.rules.logged[k] * float(self.rules.factors[k, self.step - 1])
            entry = {"loss": loss / (self.step - self.logged), "grad_norm": norm, "learning_rate": rate}
            _append(member, entry)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._give_up(k)
        self.loss.zero_()
        self.logged = self.step

    def _evaluate(self) -> None:
        for k, is_finite in enumerate(self.population.values.isfinite().all(1).tolist()):
            if not is_finite and not self.stopped[k]:
                self._give_up(k)
        scores = self.evaluate()
        better = [False] * len(scores)
        for k, (member, values) in enumerate(zip(self.members, scores, strict=True)):
            if not self.stopped[k]:
                _append(member, values)
                better[k] = member.trainer._determine_best_metric(values, None)
                # as many evaluations in a row as the run allows were no better than the best
                state, patience = member.trainer.state, member.config.patience
                since = [e for e in state.log_history if "eval_loss" in e and e["step"] > (state.best_global_step or 0)]
                self.stopped[k] = patience is not None and len(since) >= patience
        keep = torch.tensor(better, device=self.device)[:, None]
        torch.where(keep, self.population.values, self.best, out=self.best)
        self._say(scores)
        self.save(self)

    def _give_up(self, k: int) -> None:
        self.stopped[k], self.not_finite[k] = True, self.step
        logger.warning("'%s' is not finite at step %d, and stops", self.members[k].config.folder, self.step)

    def evaluate(self) -> list[dict[str, float]]:
        """The scores of each member on its validation split, by the Trainer's names."""
        with self._recordable():
            return [output.metrics or {} for output in self._score("validation", self.rows["validation"], "eval")]

    def _recordable(self) -> AbstractContextManager[None]:
        return nullcontext() if self.scoring is None else Recorder.stream()

    @torch.no_grad()
    def answers(self, split: str) -> list[PredictionOutput]:
        """The output of each member's Trainer for a split, with the values that the member keeps."""
        now, kept = self.population.values.clone(), torch.stack([self.kept(k)[k] for k in range(len(self.members))])
        rows = self.rows.get(split) or self._rows_of(split)
        with self._recordable():
            self.population.values.copy_(kept)
            try:
                return self._score(split, rows, split)
            finally:
                self.population.values.copy_(now)

    @torch.no_grad()
    def _score(self, split: str, rows: Rows, prefix: str) -> list[PredictionOutput]:
        """The scores of each member, by names that begin with ``prefix``, and its logits but in language modelling."""
        size = self.population.size
        n = len(self.members[0].splits[split])
        logits, losses = [], []
        self.population.eval()
        # rows of similar length together, and no more of them at once than in a step, for which there is memory
        order = rows.by_length(n)
        fit = max(1, int(self.most_scored / (size * rows.longest)))
        for chunk in order.split(min(self.rules.batch_size, self.args.per_device_eval_batch_size, fit)):
            inputs = rows.batch(chunk.expand(size, -1))
            labels = inputs.pop("labels")
            # cloned, because a recorded pass writes its result to the same place each time
            found = self._logits(inputs) if self.scoring is None else self.scoring.replay(inputs, self._logits).clone()
            losses.append(torch.stack(row_losses(found, labels, self.kind)).view(2, size, -1))
            if self.kind != "language_modeling":
                logits.append(found.float().view(size, len(chunk), -1))
        self.population.train()
        back = order.argsort().to(self.device)
        sums, counts = torch.cat(losses, 2)[:, :, back]
        means = mean_of_batches(sums, counts, self.args.per_device_eval_batch_size).tolist()
        together = torch.cat(logits, 1)[:, back].cpu().numpy() if logits else None
        outputs = []
        # whole columns: reading a Dataset row by row takes longer than the scores
        distinct = {id(member.splits[split]): member.splits[split] for member in self.members} if logits else {}
        golds = {key: np.asarray(data["labels"][:]) for key, data in distinct.items()}
        for k, member in enumerate(self.members):
            scores: dict[str, float] = {f"{prefix}_loss": means[k]}
            predictions: Any = None
            gold: Any = None
            if together is not None:
                compute: Any = member.trainer.compute_metrics
                predictions, gold = together[k], golds[id(member.splits[split])]
                found = compute(EvalPrediction(predictions=predictions, label_ids=gold))
                scores |= {f"{prefix}_{name}": float(value) for name, value in found.items()}
            outputs.append(PredictionOutput(predictions=predictions, label_ids=gold, metrics=scores))
        return outputs

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            return self.population(**inputs).logits

    def _say(self, scores: Sequence[Mapping[str, float]]) -> None:
        name = str(self.args.metric_for_best_model).removeprefix("eval_")
        values = sorted(score[f"eval_{name}"] for score in scores)
        left = self.seconds / self.step * (self.rules.steps - self.step)
        print(
            f"{len(scores)} runs together, step {self.step}/{self.rules.steps}, {name} {values[0]:.4f} to "
            f"{values[-1]:.4f}, {left:.0f} s left",
            flush=True,
        )


def largest_part(memory: int, layers: int) -> int:
    """Tokens times width that a GPU with so many bytes computes at once. Its size decides, and not what is free now:
    parts are added up in another order where they are cut differently.
    """
    return max(MOST["cuda"], min(MOST_ON_LARGE, memory // (BYTES * layers)))


def _append(member: Member, values: Mapping[str, float]) -> None:
    state = member.trainer.state
    state.log_history.append({**values, "step": state.global_step, "epoch": state.epoch})
