"""Modules that own cores and apply them in the cut form. They know nothing of PEFT.

Axes: B batch and token positions, I input features, O output features, b bottleneck, C inner size at a boundary.
"""

import torch
from torch import Tensor, nn

from loretta import tt


class Cores(nn.ParameterList):
    """The trainable cores of one tensor train, with its plan.

    Args:
        shape: the plan; core ``k`` is the parameter named ``k``.
        dtype: of the cores (the plan's maths is the same in any floating dtype).

    The cores start as zeros: call :meth:`assign` with starting values.
    """

    def __init__(
        self,
        shape: tt.TTShape,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            [nn.Parameter(torch.zeros(core, dtype=dtype, device=device)) for core in shape.cores]
        )
        self.shape = shape

    @torch.no_grad()
    def assign(self, values: list[Tensor]) -> None:
        """Overwrite the cores in place. Does nothing on the meta device, where values arrive later."""
        for core, value in zip(self, values, strict=True):
            if not core.is_meta:
                core.copy_(value)

    def halves(self) -> tuple[Tensor, Tensor]:
        """L (I, C) and R (C, O) of the train, contracted in the dtype of the cores whatever autocast says."""
        with torch.autocast(device_type=self[0].device.type, enabled=False):
            return tt.halves(list(self), self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


class TTLinear(nn.Module):
    """A linear layer whose weight is a tensor train: ``x -> (x L) R + bias`` (LoRETTA section 3.1).

    Args:
        shape: the plan of the in x out matrix.
        bias: whether a dense bias of ``out_features`` is learned.
    """

    def __init__(
        self,
        shape: tt.TTShape,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.cores = Cores(shape, dtype=dtype, device=device)
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_dense(cls, dense: nn.Linear, shape: tt.TTShape) -> "TTLinear":
        """The TT-SVD of a dense layer at the ranks of ``shape``, with its bias and its dtype."""
        weight = dense.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        layer = cls(shape, bias=dense.bias is not None, dtype=dtype, device=weight.device)
        with torch.no_grad():
            if not weight.is_meta:
                layer.cores.assign(tt.pad_ranks(tt.tt_svd(weight.T, shape), shape.ranks))
            if dense.bias is not None and not dense.bias.is_meta:
                layer.bias.copy_(dense.bias)
        return layer

    def to_dense(self) -> nn.Linear:
        """The dense layer with the same weight, for merging and export."""
        first = self.cores[0]
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, dtype=first.dtype, device=first.device
        )
        with torch.no_grad():
            dense.weight.copy_(tt.matrix(list(self.cores), self.cores.shape).T)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense

    def forward(self, x_BI: Tensor) -> Tensor:
        left_IC, right_CO = self.cores.halves()
        y_BO = (x_BI @ left_IC.to(x_BI.dtype)) @ right_CO.to(x_BI.dtype)
        return y_BO if self.bias is None else y_BO + self.bias.to(y_BO.dtype)


def update_factors(down: Cores, up: Cores) -> tuple[Tensor, Tensor]:
    """A (I, R) and B (R, O) with ``A @ B`` the weight update TT(down) TT(up) of rep (LoRETTA eq. 4).

    R is the smallest of the bottleneck and the two cut ranks: an update is exactly a LoRA of that rank.
    """
    (left_IC, mid_Cb), (mid_bD, right_DO) = down.halves(), up.halves()
    inner_down, bottleneck, inner_up = left_IC.shape[1], mid_Cb.shape[1], mid_bD.shape[1]
    with torch.autocast(device_type=left_IC.device.type, enabled=False):
        if bottleneck < min(inner_down, inner_up):
            return left_IC @ mid_Cb, mid_bD @ right_DO
        mid_CD = mid_Cb @ mid_bD
        if inner_down <= inner_up:
            return left_IC, mid_CD @ right_DO
        return left_IC @ mid_CD, right_DO
