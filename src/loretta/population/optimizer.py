"""AdamW for all members at once, each with its own rates and its own clipping.

torch's AdamW has a rate for each group of tensors, and a population would need P times as many groups. Here each member
is a row of one matrix.

Axes: P members, N trained numbers of each, in K parameters.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class MemberAdamW:
    """Clip the gradients of each member by its own norm, and step as :class:`torch.optim.AdamW` (without amsgrad).

    Args:
        values, gradient: (P, N).
        rates, decays: the highest learning rate and the weight decay: (P, K), or (P, 1) where a member has one of them,
            or (P, N).
        slices: where the numbers of each parameter lie; only needed where something differs between parameters.
        max_norm: of a member's gradient; 0 for no clipping.
        forgets: whether :meth:`forget` will be called, for which each parameter needs a count of its own.
    """

    def __init__(
        self,
        values: Tensor,
        gradient: Tensor,
        *,
        rates: Tensor,
        decays: Tensor,
        slices: Mapping[str, slice] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_norm: float = 1.0,
        forgets: bool = False,
    ) -> None:
        self.values, self.gradient, self.rates, self.decays = values, gradient, rates, decays
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)
        # a tensor, so that a recorded step can count it up
        self.steps = torch.zeros((), dtype=torch.float64, device=values.device)
        self.slices = slices or {}
        # (P, K): the step behind which the moments of a parameter began
        self.began = values.new_zeros(len(values), len(self.slices), dtype=torch.float64) if forgets else None
        sizes = torch.tensor([where.stop - where.start for where in self.slices.values()], dtype=torch.int)
        self._parameter = torch.arange(len(sizes)).repeat_interleave(sizes).to(values.device, torch.int32)  # (N)
        self.norms = values.new_zeros(len(values))  # of the last gradients, before clipping

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """One update of all members, at ``factor`` times their rates."""
        beta, beta_square = self.betas
        self.steps += 1
        torch.linalg.vector_norm(self.gradient, dim=1, out=self.norms)
        if self.max_norm > 0:
            self.gradient *= (self.max_norm / (self.norms + 1e-6)).clamp(max=1)[:, None]
        self.mean.lerp_(self.gradient, 1 - beta)
        self.square.mul_(beta_square).addcmul_(self.gradient, self.gradient, value=1 - beta_square)
        steps = self.steps if self.began is None else self.steps - self.began
        unbiased, unbiased_square = 1 - beta**steps, 1 - beta_square**steps
        rates = self.rates * factor
        update = self.square.sqrt().div_(self.of_numbers(unbiased_square.sqrt().to(self.values.dtype))).add_(self.eps)
        torch.div(self.mean, update, out=update)
        update.mul_(self.of_numbers(rates / unbiased.to(self.values.dtype)))
        self.values.mul_(self.of_numbers(1 - rates * self.decays)).sub_(update)

    def of_numbers(self, of_parameters: Tensor) -> Tensor:
        """(P, N) from (P, K); what is the same for all parameters, or of numbers already, stays as it is."""
        if of_parameters.dim() == 0 or of_parameters.shape[1] in (1, self.values.shape[1]):
            return of_parameters
        return of_parameters.index_select(1, self._parameter)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside :attr:`steps`, with a row for each member."""
        began = {} if self.began is None else {"began": self.began}
        return {"mean": self.mean, "square": self.square, **began}

    @torch.no_grad()
    def forget(self, member: int, parameters: Sequence[str]) -> None:
        """Begin anew with parameters of a member that were rewritten, whose moments belong to other directions."""
        assert self.began is not None
        for k, (name, where) in enumerate(self.slices.items()):
            if name in parameters:
                self.mean[member, where] = self.square[member, where] = 0
                self.began[member, k] = self.steps
