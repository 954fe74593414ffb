"""AdamW for all members at once, each with its own rates and its own clipping.

torch's AdamW has a rate for each group of tensors, and a population would need P times as many groups. Here each member
is a row of one matrix.

Axes: P members, N trained numbers of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class MemberAdamW:
    """Clip the gradients of each member by its own norm, and step as :class:`torch.optim.AdamW` (without amsgrad).

    Args:
        values, gradient: (P, N).
        rates, decays: the highest learning rate and the weight decay, (P, N), or (P, 1) where they are the same for all
            numbers of a member.
        max_norm: of a member's gradient; 0 for no clipping.
        forgets: whether :meth:`forget` will be called, for which each number needs a count of its own.
    """

    def __init__(
        self,
        values: Tensor,
        gradient: Tensor,
        *,
        rates: Tensor,
        decays: Tensor,
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
        # (P, N): the step behind which the moments of a number began
        self.began = torch.zeros_like(values, dtype=torch.int32) if forgets else None
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
        update = self.square.sqrt().div_(unbiased_square.sqrt().to(self.values.dtype)).add_(self.eps)
        torch.div(self.mean, update, out=update)
        update.mul_(rates / unbiased.to(self.values.dtype))
        self.values.mul_(1 - rates * self.decays).sub_(update)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside :attr:`steps`, with a row for each member."""
        began = {} if self.began is None else {"began": self.began}
        return {"mean": self.mean, "square": self.square, **began}

    @torch.no_grad()
    def forget(self, member: int, numbers: Sequence[slice]) -> None:
        """Begin anew with numbers of a member that were rewritten, whose moments belong to other directions."""
        assert self.began is not None
        for where in numbers:
            self.mean[member, where] = self.square[member, where] = 0
            self.began[member, where] = self.steps.to(torch.int32)
