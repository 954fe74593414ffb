"""Modules that compute for several members of a population at once, each with its own values.

Rows are grouped by member: the first b of P * b rows are those of member 0, and so on.

Axes: P members, b rows of one member, T tokens, I input features, O output features, H width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from loretta.layers.fused import has_triton
from loretta.population.attention import BACKENDS
from loretta.tuners.norms import TrainedNorm
from loretta.tuners.rescaled import TIMES, TrainedScale

WIDEST = 4096  # width of a norm whose rows a kernel can hold


class Members(nn.Module):
    """A module of the base, or a wrapped one, that is called once for all members.

    It runs the module's own forward pass under :func:`torch.func.vmap`, which is right for any module whose output rows
    depend only on their own input rows. Subclasses compute the same faster for the modules that take most of the time.
    ``values`` are those of all members, (P, ...), by their names in the module; all else in it is shared.
    """

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(values)
        self.size = len(next(iter(values.values())))
        for k, value in enumerate(values.values()):
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"values_{k}", value)
            else:
                self.register_buffer(f"values_{k}", value)
        device = next(iter(values.values())).device
        # else FourierFT's indices would be copied to the GPU in every step, which a recorded step cannot do
        for name, held in vars(module).items():
            for key, value in held.items() if isinstance(held, dict) and not name.startswith("_") else ():
                held[key] = value.to(device) if isinstance(value, Tensor) else value

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"values_{k}") for k, name in enumerate(self.names)}

    def __getattr__(self, name: str) -> Any:
        """The attributes that models and PEFT read from a module without calling it: sizes, dtypes, names."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def grouped(self, x: Tensor) -> Tensor:
        """(P * b, ...) -> (P, b, ...)."""
        return x.unflatten(0, (self.size, -1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values, tensors = self.values, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

        def one(values_of_one: dict[str, Tensor], rows: list[Tensor]) -> Tensor:
            left = iter(rows)
            own = [next(left) if isinstance(value, Tensor) else value for value in args]
            named = {key: next(left) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            first = next(iter(values_of_one.values()))
            # vmap has no rule for the CPU's flash attention
            with OfMembers(first), sdpa_kernel(BACKENDS if first.is_cuda else SDPBackend.MATH):
                return functional_call(self.module, values_of_one, tuple(own), named)

        # a tensor of one row serves all members' rows, as the positions of a decoder's layer do
        dims = [None if len(x) == 1 else 0 for x in tensors]
        rows = [x if dim is None else self.grouped(x) for x, dim in zip(tensors, dims, strict=True)]
        return vmap(one, in_dims=(0, dims), randomness="different")(values, rows).flatten(0, 1)


class OfMembers(TorchFunctionMode):
    """Under vmap, has ``torch.zeros`` and embeddings do for each member what they do for a run alone.

    Some methods write trained numbers into zeros, and vmap refuses to write them into a tensor that members share. Of
    an embedding with a ``padding_idx``, whose row does not train, vmap keeps that of the first member alone.

    Args:
        like: any tensor of the members.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.zero = torch.zeros_like(like.detach().flatten()[:1])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.embedding:
            return _embedding(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        return found + self.zero.to(found.dtype) if func is torch.zeros else found


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **options: Any) -> Tensor:
    found = nn.functional.embedding(ids, weight, None, *rest, **options)
    return found if padding_idx is None else torch.where((ids == padding_idx)[..., None], found.detach(), found)


class MemberVBLoRA(Members):
    """VB-LoRA. In training its layers look for infinite logits, which neither vmap nor a recorded step can do."""

    def train(self, mode: bool = True) -> "MemberVBLoRA":
        super().train(mode)
        self.module.training = False  # of the layer alone: its dropout keeps its mode
        return self


class MemberLinear(Members):
    """A linear layer with a bias, or a weight and a bias, for each member; ``scales`` (P) are factors on these."""

    module: nn.Linear

    def __init__(self, module: nn.Linear, values: Mapping[str, Tensor], scales: Tensor | None = None) -> None:
        super().__init__(module, values)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        values = self.values
        if self.scales is not None:
            values = {name: v * self.scales.view(-1, *[1] * (v.dim() - 1)) for name, v in values.items()}
        rows_PBI = x.reshape(self.size, -1, x.shape[-1])
        weight, bias = values.get("weight"), values.get("bias", self.module.bias)
        bias_PO = bias if bias is None or bias.dim() == 2 else bias.expand(self.size, -1)
        if weight is None:
            y_PBO = nn.functional.linear(rows_PBI, self.module.weight)
            y_PBO = y_PBO if bias_PO is None else y_PBO + bias_PO[:, None].to(y_PBO.dtype)
        elif bias_PO is None:
            y_PBO = torch.bmm(rows_PBI, weight.mT)
        else:
            y_PBO = torch.baddbmm(bias_PO[:, None], rows_PBI, weight.mT)
        return y_PBO.view(*x.shape[:-1], y_PBO.shape[-1])


class MemberScale(Members):
    """Factors on the input or the output of a frozen layer: those of IA3, or of a :class:`TrainedScale`."""

    module: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before, factors_PH = self._factors()
        y = x if before else self.module.base_layer(x, *args, **kwargs)
        scaled = (y.reshape(self.size, -1, y.shape[-1]) * factors_PH[:, None]).to(y.dtype).view(y.shape)
        return self.module.base_layer(scaled, *args, **kwargs) if before else scaled

    def _factors(self) -> tuple[bool, Tensor]:
        """Whether they are factors on the input, and (P, H): those of each member."""
        if not isinstance(self.module, TrainedScale):
            (values,) = self.values.values()
            return self.module.is_feedforward, values.flatten(1)
        scaled = {self.module.scaled_by(name.partition(".")[0]): values for name, values in self.values.items()}
        changes = torch.stack([each.spread(values) for each, values in scaled.items()]).sum(0)
        return next(iter(scaled)).side == "in", 1 + TIMES * changes


class MemberNorm(Members):
    """A layer norm that normalises once, then scales and shifts with each member's numbers.

    ``module`` is a norm with a weight and a bias for each member, or a :class:`TrainedNorm` with changes for each.
    """

    module: Any

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.module.base_layer if isinstance(self.module, TrainedNorm) else self.module
        fits = x.shape[-1:] == norm.normalized_shape and x.shape[-1] <= WIDEST and x.dtype is not torch.float64
        if fits and x.is_cuda and has_triton():
            from loretta.population.norm_kernels import MemberLayerNorm

            own = (self._own(norm, name) for name in ("weight", "bias"))
            dtype = torch.float32 if torch.is_autocast_enabled("cuda") else x.dtype
            y: Tensor = MemberLayerNorm.apply(x.reshape(self.size, -1, x.shape[-1]), *own, norm.eps, dtype)
            return y.view(x.shape)
        rows_PBH = nn.functional.layer_norm(x, norm.normalized_shape, eps=norm.eps).reshape(self.size, -1, x.shape[-1])
        weight_PH, bias_PH = (self._own(norm, name)[:, None].to(rows_PBH.dtype) for name in ("weight", "bias"))
        return torch.addcmul(bias_PH, rows_PBH, weight_PH).view(x.shape)

    def _own(self, norm: nn.Module, name: str) -> Tensor:
        """(P, H): the weight or the bias of each member."""
        base: Tensor = getattr(norm, name)
        for key, value in self.values.items():
            if key == name:
                return value
            if f"_norm_{name}." in key:
                return (base + value).to(base.dtype)
        return base.expand(self.size, -1)
