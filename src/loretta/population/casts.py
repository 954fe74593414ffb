"""One cast of an activation for all products that read it.

Autocast casts the input of each product anew: with rep on query and value, the same activation five times in a layer.
In the backward pass each of these casts writes a gradient of full width, and four sums add them up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {nn.functional.linear, torch.bmm}


class OneCast(TorchFunctionMode):
    """Within it, products under autocast that follow each other and read the same activation share one cast of it.

    The values are the same to the last bit. The gradients of the products are added before the cast, not after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, int, Tensor] | None = None  # activation, its version, its cast

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in PRODUCTS and args:
            args = (self.cast(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in autocast's dtype where autocast is going to cast it."""
        kind = x.device.type
        if x.dtype is not torch.float32 or not torch.is_autocast_enabled(kind) or not x.is_contiguous():
            return x
        # views of one tensor hold the same numbers: as rows of a batch, as rows of a member
        whole = x if x._base is None else x._base
        if not (whole.is_contiguous() and whole.dtype is x.dtype and whole.numel() == x.numel()):
            whole = x
        if self.last is None or self.last[0] is not whole or self.last[1] != whole._version:
            self.last = whole, whole._version, whole.to(torch.get_autocast_dtype(kind))
        return self.last[2].view(x.shape)
