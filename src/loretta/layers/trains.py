"""Modules that own cores and apply them in the cut form. They know nothing of PEFT.

Axes: B batch and token positions, I input features, O output features, b bottleneck, C inner size at a boundary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from loretta import tt
from loretta.tt.ops import product


class _Parametrizations(nn.ModuleDict):
    """A ModuleDict that takes any key. Torch's refuses the names of its methods, of which ``values`` is one."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        setattr(self, key, module)


class Cores(nn.Module):
    """The cores of one tensor train, with its plan. Iterates over the cores, left to right.

    The cores are views of the single parameter ``values`` (``shape.n_params`` entries) and lie one after the other in
    it: one tensor is stored, sharded, updated and stacked with those of other modules, not a handful of tiny ones.

    Args:
        shape: the plan.
        trainable: a parameter, or a buffer: saved and moved with the module, and never trained.
        dtype: of the cores (the plan's maths is the same in any floating dtype).

    The cores start as zeros: call :meth:`assign` with starting values.
    """

    values: Tensor

    def __init__(
        self,
        shape: tt.TTShape,
        *,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        values = torch.zeros(shape.n_params, dtype=dtype, device=device)
        if trainable:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.utils.parametrize makes this attribute, with the name of the parameter as a key
        super().__setattr__(name, _Parametrizations() if name == "parametrizations" else value)

    def __len__(self) -> int:
        return len(self.shape.modes)

    def __getitem__(self, k: int) -> Tensor:
        return self.split(self.values)[k]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.split(self.values))

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """What lies in ``values``, or in their gradient, as one tensor for each core."""
        return tt.split_cores(values, self.shape)

    @torch.no_grad()
    def assign(self, values: list[Tensor]) -> None:
        """Overwrite the cores in place. Does nothing to or from the meta device, where values arrive later."""
        for core, value in zip(self, values, strict=True):
            if not (core.is_meta or value.is_meta):
                core.copy_(value)

    def forward(self) -> tuple[Tensor, Tensor]:
        """L (I, C) and R (C, O) of the train, contracted in the dtype of the cores whatever autocast says."""
        return halves(self.values, self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


def halves(values: Tensor, shape: tt.TTShape) -> tuple[Tensor, Tensor]:
    """:func:`loretta.tt.halves` of cores that lie one after the other in ``values``, away from autocast.

    Dimensions in front of the last stay in front: the trains of many modules are contracted at once.
    """
    with own_precision(values):
        return tt.halves(tt.split_cores(values, shape), shape)


def own_precision(tensor: Tensor) -> AbstractContextManager:
    """Keep autocast away from the cores: their products are small, and rounding them would round the weight."""
    # the meta device has no autocast
    return nullcontext() if tensor.is_meta else torch.autocast(device_type=tensor.device.type, enabled=False)


class TTLinear(nn.Module):
    """A linear layer whose weight is a tensor train: ``x -> (x L) R + bias`` (LoRETTA section 3.1).

    Args:
        shape: the plan of the in x out matrix.
        bias: whether a dense bias of ``out_features`` is learned.
        as_change: subtract the layer's own frozen start. The layer then computes the *change* of a pretrained dense
            layer, and the caller adds the two outputs.
    """

    def __init__(
        self,
        shape: tt.TTShape,
        *,
        bias: bool = True,
        as_change: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.cores = Cores(shape, dtype=dtype, device=device)
        self.start = Cores(shape, trainable=False, dtype=dtype, device=device) if as_change else None
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_dense(cls, dense: nn.Linear, shape: tt.TTShape, *, as_change: bool = False) -> "TTLinear":
        """Start as the TT-SVD of a dense layer at the ranks of ``shape``, in its dtype.

        With ``as_change`` the start is subtracted and the bias begins at zero: no change. Without, the layer
        stands in for the dense one and takes over its bias.
        """
        weight = dense.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        layer = cls(shape, bias=dense.bias is not None, as_change=as_change, dtype=dtype, device=weight.device)
        if weight.is_meta:
            return layer
        with torch.no_grad():
            # rounded once, at the end: half precision would round the factors that balance the cores, too
            layer.cores.assign(tt.pad_ranks(tt.balance(tt.tt_svd(weight.T.double(), shape)), shape.ranks))
            if layer.start is not None:
                layer.start.assign(list(layer.cores))
            elif layer.bias is not None:
                layer.bias.copy_(dense.bias)
        return layer

    @torch.no_grad()
    def to_dense(self, pretrained: nn.Linear | None = None) -> nn.Linear:
        """The dense layer with the same effect, for merging and export; a change is added to ``pretrained``."""
        weight_IO = tt.matrix(list(self.cores), self.cores.shape)
        bias_O: Tensor | None = self.bias
        if self.start is not None:
            weight_IO = weight_IO - tt.matrix(list(self.start), self.start.shape)
        if pretrained is not None:
            weight_IO = weight_IO + pretrained.weight.T
            biases: list[Tensor] = [bias for bias in (self.bias, pretrained.bias) if bias is not None]
            bias_O = torch.stack(biases).sum(0) if biases else None
        dense = nn.Linear(
            self.in_features, self.out_features, bias_O is not None, dtype=weight_IO.dtype, device=weight_IO.device
        )
        dense.weight.copy_(weight_IO.T)
        if bias_O is not None:
            dense.bias.copy_(bias_O)
        return dense

    def forward(self, x_BI: Tensor) -> Tensor:
        """(B, I) -> (B, O) in the dtype of ``x_BI``; the in x out matrix is never built."""
        y_BO = _apply(x_BI, self.cores)
        if self.start is not None:
            y_BO = y_BO - _apply(x_BI, self.start)
        return y_BO if self.bias is None else y_BO + self.bias.to(y_BO.dtype)


def _apply(x_BI: Tensor, cores: Cores) -> Tensor:
    left_IC, right_CO = cores()
    return (x_BI @ left_IC.to(x_BI.dtype)) @ right_CO.to(x_BI.dtype)


def update_factors(down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A (I, R) and B (R, O) with ``A @ B`` the weight update TT(down) TT(up) of rep (LoRETTA eq. 4), from the halves.

    R is the smallest of the bottleneck and the two cut ranks: an update is exactly a LoRA of that rank.
    """
    (left_IC, mid_Cb), (mid_bD, right_DO) = down, up
    inner_down, bottleneck, inner_up = left_IC.shape[-1], mid_Cb.shape[-1], mid_bD.shape[-1]
    with own_precision(left_IC):
        if bottleneck < min(inner_down, inner_up):
            return product(left_IC, mid_Cb), product(mid_bD, right_DO)
        mid_CD = product(mid_Cb, mid_bD)
        if inner_down <= inner_up:
            return left_IC, product(mid_CD, right_DO)
        return product(left_IC, mid_CD), right_DO


def add_update(y_BO: Tensor, x_BI: Tensor, a_IR: Tensor, b_RO: Tensor) -> Tensor:
    """``y + (x A) B`` on matrices of one dtype, written into y: y must be new, and no gradient may need it."""
    inner_BR = x_BI @ a_IR
    # a compiler works in place by itself; under vmap over adapters one y has no room for the results of all
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(inner_BR) or is_functorch_wrapped_tensor(b_RO):
        return torch.addmm(y_BO, inner_BR, b_RO)
    return y_BO.addmm_(inner_BR, b_RO)


def fold_bias(left_IC: Tensor, right_CO: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x L R + bias`` as ``(x L + one) R``: as one more row of R, neither the bias nor its gradient costs a kernel.

    Returns one (C), L and R, the latter as :func:`arranged`.
    """
    inner = left_IC.shape[-1]
    right_CO = torch.cat([right_CO, bias_O[..., None, :].to(right_CO.dtype)], dim=-2)
    left_IC, right_CO = arranged(nn.functional.pad(left_IC, (0, 1)), right_CO)
    one_C = left_IC.new_zeros(*left_IC.shape[:-2], left_IC.shape[-1])
    one_C[..., inner].fill_(1)
    return one_C, left_IC, right_CO


def one_matrix_each(
    down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], bias_b: Tensor | None, bias_O: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(x L M + bias) N U + bias`` as ``relu(x D^T + bias) U``: the bias (b), D (b, I) and U (b, O).

    A ReLU leaves a one as it is. With a one behind the first bias, the last bias is one more row of U, for no kernel.
    b is padded by zeros to a multiple of 8.
    """
    (left_IC, mid_Cb), (mid_bD, right_DO) = down, up
    lead, bottleneck, ones = mid_Cb.shape[:-2], mid_Cb.shape[-1], int(bias_O is not None)
    padding = -(bottleneck + ones) % 8 + ones
    with own_precision(left_IC):
        tail = mid_bD.new_zeros(padding, mid_bD.shape[-1] + ones)
        if bias_O is not None:
            tail[0, -1].fill_(1)  # a number that is set is copied from the CPU: no CUDA graph could hold that
            right_DO = torch.cat([right_DO, bias_O[..., None, :].to(right_DO.dtype)], dim=-2)
        mid_bD = torch.cat([nn.functional.pad(mid_bD, (0, ones)), tail.expand(*lead, -1, -1)], dim=-2)
        down_bI = product(nn.functional.pad(mid_Cb, (0, padding)).mT, left_IC.mT)
        up_bO = product(mid_bD, right_DO)
    first_b = left_IC.new_zeros(*lead, bottleneck) if bias_b is None else bias_b.to(left_IC.dtype)
    last = tail[:, -1].expand(*lead, -1) if ones else left_IC.new_zeros(*lead, padding)
    return torch.cat([first_b, last], dim=-1), down_bI, up_bO


def arranged(left_IC: Tensor, right_CO: Tensor) -> tuple[Tensor, Tensor]:
    """The same two thin matrices, as the kernels of their device want them.

    A GPU wants the inner size padded by zeros to a multiple of 8. A CPU wants the left one stored column by column:
    with 5 columns the product then takes a quarter of the time, and its gradient, which gets the same layout, a seventh
    (MKL, 4096 x 384 activations).
    """
    if not left_IC.is_cuda:
        return left_IC.mT.contiguous().mT, right_CO
    padding = -left_IC.shape[-1] % 8
    if not padding:
        return left_IC, right_CO
    return nn.functional.pad(left_IC, (0, padding)), nn.functional.pad(right_CO, (0, 0, 0, padding))
