"""AdamW for all members at once, each with its own rates and its own clipping.

torch's AdamW has a rate for each group of tensors, and a population would need P times as many groups. Here each member
is a row of one matrix.

Axes: P members, N trained numbers of each.
"""

import torch
from torch import Tensor


class MemberAdamW:
    """Clip the gradients of each member by its own norm, and step as :class:`torch.optim.AdamW` (without amsgrad).

    Args:
        values, gradient: (P, N).
        rates, decays: the highest learning rate and the weight decay, (P, N), or (P, 1) where they are the same for all
            numbers of a member.
        max_norm: of a member's gradient; 0 for no clipping.
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
    ) -> None:
        self.values, self.gradient, self.rates, self.decays = values, gradient, rates, decays
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)
        # a tensor, so that a recorded step can count it up
        self.steps = torch.zeros((), dtype=torch.float64, device=values.device)
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
        unbiased, unbiased_square = 1 - beta**self.steps, 1 - beta_square**self.steps
        rates = self.rates * factor
        update = self.square.sqrt().div_(unbiased_square.sqrt().to(self.values.dtype)).add_(self.eps)
        torch.div(self.mean, update, out=update)
        update.mul_(rates / unbiased.to(self.values.dtype))
        self.values.mul_(1 - rates * self.decays).sub_(update)
