"""One cast of an activation for all products that read it.

Autocast casts the input of each product by itself: for rep on query and value the same activation five times a layer.
In the backward pass each of these casts writes a gradient of full width, and four sums add them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {nn.functional.linear, torch.bmm}


class OneCast(TorchFunctionMode):
    """In this block products under autocast that follow each other and read one activation share its cast.

    The values are the same to the last bit. The gradients of the products are added before they are cast, not behind.
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
        """``x`` as autocast would have it, if it is going to cast it."""
        kind = x.device.type
        if x.dtype is not torch.float32 or not torch.is_autocast_enabled(kind) or not x.is_contiguous():
            return x
        # the same numbers in other shapes: rows of a batch, rows of a member
        whole = x if x._base is None else x._base
        if not (whole.is_contiguous() and whole.dtype is x.dtype and whole.numel() == x.numel()):
            whole = x
        if self.last is None or self.last[0] is not whole or self.last[1] != whole._version:
            self.last = whole, whole._version, whole.to(torch.get_autocast_dtype(kind))
        return self.last[2].view(x.shape)
