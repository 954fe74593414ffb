"""Attention for many rows of few tokens.

A kernel works on blocks of 64 tokens of one row and one head, so with 16 tokens three quarters of its work is wasted.
Here several rows are packed into one block, and a mask keeps each row to itself. Longer rows share the kernels, and the
mask that is made once for all layers.

Axes: B rows, H heads, T tokens, D width of a head, G rows that are packed together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

AT_ONCE = 64  # tokens in a kernel's block
LINE = 8  # numbers to which the lines of a mask are aligned
# without cuDNN, which plans each of a training's dozen shapes for up to two seconds, and is slower on short rows
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PackedAttention(TorchFunctionMode):
    """Within it, :func:`torch.nn.functional.scaled_dot_product_attention` packs short rows together.

    The result differs by rounding only, and dropout draws other numbers. Each of the ``members`` has an equal share of
    the rows, and only rows of one member are packed together: the mask's zero times a value that is not finite would be
    NaN for the others.
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
        alike = query.dim() == 4 and query.shape == key.shape == value.shape
        whole = alike and attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[:2] == (n_rows, 1)
        # under vmap, in a layer that each member trains whole, the rows are those of one member
        if not whole or options.get("is_causal") or is_functorch_wrapped_tensor(query):
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        assert attn_mask is not None
        count = next(n for n in range(max(1, AT_ONCE // n_tokens), 0, -1) if n_rows % (n * self.members) == 0)
        mask = self._beside(attn_mask, count, query)
        # a view where tokens come before heads in memory, as in transformers
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
            # kernels copy a mask whose lines are not aligned
            joint = like.new_empty(n_rows // count, 1, side, -(-side // LINE) * LINE)[..., :side]
            joint.copy_(torch.where(same, added, -torch.inf).view_as(joint))
            self.masks[at] = mask, joint  # the mask is kept too, so that no other tensor gets its id
        return self.masks[at][1]
