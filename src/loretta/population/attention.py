"""Attention among few tokens, for many rows at once.

A kernel takes 64 tokens of one row and one head at a time, and with 16 tokens three quarters of its work is on nothing.
So the tokens of several rows are laid beside each other, and a mask keeps each row to itself.

Axes: B rows, H heads, T tokens, D width of a head, G rows that are laid beside each other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

AT_ONCE = 64  # tokens of a kernel's block
LINE = 8  # numbers
# cuDNN's plans each new shape, for up to two seconds, and is slower on short rows
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PackedAttention(TorchFunctionMode):
    """In this block :func:`torch.nn.functional.scaled_dot_product_attention` lays short rows beside each other.

    The result is the same but for rounding, and for which numbers dropout draws.

    Args:
        members: of whom each has an equal share of the rows. Theirs do not lie beside each other: nothing times what is
            not finite is not finite.
    """

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = members
        self.masks: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}  # one serves all layers of a model

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """(B, H, T, D) each, and a mask (B, 1, T or 1, T) of bools or of numbers to add."""
        n_rows, n_tokens = query.shape[0], query.shape[-2]
        count = next(n for n in range(max(1, AT_ONCE // n_tokens), 0, -1) if n_rows % (n * self.members) == 0)
        alike = query.dim() == 4 and query.shape == key.shape == value.shape
        whole = alike and attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[:2] == (n_rows, 1)
        if count == 1 or not whole or options.get("is_causal"):
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        assert attn_mask is not None
        mask = self._beside(attn_mask, count, query)
        # tokens come before heads in memory, so that this is a view
        q, k, v = (
            x.transpose(1, 2).reshape(n_rows // count, -1, *x.shape[1::2]).transpose(1, 2) for x in (query, key, value)
        )
        with sdpa_kernel(BACKENDS):
            found = nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)
        return found.transpose(1, 2).reshape(n_rows, n_tokens, *query.shape[1::2]).transpose(1, 2)

    def _beside(self, mask: Tensor, count: int, like: Tensor) -> Tensor:
        """(B / G, 1, G * T, G * T): the masks of G rows along the diagonal, of numbers to add."""
        at = id(mask), count, like.dtype
        if at not in self.masks:
            n_rows, n_tokens = like.shape[0], like.shape[-2]
            own = mask.expand(n_rows, 1, n_tokens, n_tokens).reshape(-1, count, n_tokens, 1, n_tokens)
            added = torch.where(own, 0.0, -torch.inf) if mask.dtype == torch.bool else own
            same = torch.eye(count, dtype=torch.bool, device=mask.device)[:, None, :, None]
            side = count * n_tokens
            # kernels copy a mask whose lines begin anywhere
            joint = like.new_empty(n_rows // count, 1, side, -(-side // LINE) * LINE)[..., :side]
            joint.copy_(torch.where(same, added, -torch.inf).view_as(joint))
            self.masks[at] = mask, joint  # with the mask, whose id would else be free for another
        return self.masks[at][1]
