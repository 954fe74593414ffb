"""Rep on the matrices of all experts of a layer, which transformers keeps in one parameter of three dimensions.

They are found by the names of parameters, and get two trains for all experts.

Axes: E experts, I input features, O output features, R rank of the update.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from loretta import tt
from loretta.errors import InputError
from loretta.layers.trains import own_precision
from loretta.tuners.config import LorettaConfig
from loretta.tuners.names import name_in_base
from loretta.tuners.placement import NothingMatchedError, Placement, plan_trains, planner, rank_for
from loretta.tuners.rep.layer import RepLinear

# a module is called with another parameter for the length of a call, which two threads cannot do at once
_locks: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
# modules of transformers that do not say themselves whether a matrix is (in, out), by class name
_TRANSPOSED = {"Llama4TextExperts": True}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def experts_size(name: str, module: nn.Module, parameter: str) -> tuple[int, tuple[int, int], bool]:
    """How many matrices a parameter of a module of experts holds, (in, out) of each, and whether each lies as that.

    Raises InputError with the reason where the parameter does not hold one matrix for each expert, is quantised, or
    nobody says which of its dimensions is the input.
    """
    weight = getattr(module, parameter)
    if weight.dim() != 3:
        raise InputError(
            f"the target parameter '{name}' has {weight.dim()} dimensions, and target_parameters is for those of 3, "
            "which hold one matrix for each expert: name linear layers in target_modules"
        )
    if weight.dtype not in _DTYPES:
        raise InputError(
            f"the target parameter '{name}' is quantised ({weight.dtype}): load the model in bfloat16 to adapt its "
            "experts, or leave them out of target_parameters"
        )
    # transformers writes this on the experts of Mixtral, Qwen-MoE, DeepSeek, gpt-oss and most others
    transposed = getattr(module, "is_transposed", _TRANSPOSED.get(type(module).__name__))
    if transposed is None:
        raise InputError(
            f"the target parameter '{name}' is one of a {type(module).__name__}, whose matrices may lie as (in, out) "
            "or as (out, in): known are experts that transformers marks with is_transposed (Mixtral, Qwen-MoE, "
            f"DeepSeek, gpt-oss, ...), and {', '.join(_TRANSPOSED)}; leave it out of target_parameters"
        )
    count, rows, columns = weight.shape
    return count, (rows, columns) if transposed else (columns, rows), transposed


def matched_parameters(config: LorettaConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, the module that holds it, its name there) of what ``target_parameters`` names, by their ends.

    Names are those of the model without adapters. Raises InputError for a target that matches nothing.
    """
    found: set[str] = set()
    three: set[str] = set()
    for at, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        at = name_in_base(at)
        for parameter, value in sorted(module.named_parameters(recurse=False)):
            name = f"{at}.{parameter}"
            if value.dim() == 3:
                three.add(".".join(name.split(".")[-2:]))
            matched = [t for t in config.target_parameters or () if name == t or name.endswith(f".{t}")]
            if matched:
                found.update(matched)
                yield name, module, parameter
    if lost := [target for target in config.target_parameters or () if target not in found]:
        has = f"there are {', '.join(sorted(three))}" if three else "its experts, if any, are linear layers"
        raise NothingMatchedError(
            f"target_parameters: no parameter of this model is called {' or '.join(map(repr, lost))}; of those that "
            f"hold the matrices of experts {has}"
        )


def plan_experts(config: LorettaConfig, name: str, module: nn.Module, parameter: str, bottleneck: int) -> Placement:
    """Two trains for all matrices of one parameter; the first mode of ``down`` is the expert.

    Raises InputError as :func:`experts_size` does, and where a given shape does not fit.
    """
    (count, size, _), rank = experts_size(name, module, parameter), rank_for(config, name)
    down, up = plan_trains(name, size, size, bottleneck, rank=rank, **planner(config))
    return Placement(name=name, where="update", down=tt.stacked(down, count, rank), up=up, experts=count)


class RepExperts(RepLinear):
    """A module of experts that computes with ``parameter + scaling * A B`` in place of one of its parameters.

    The train down holds all experts: its first mode is the expert, so A is (E, I, R), and expert e gets the update
    ``A[e] B`` of rank R, exactly. What experts have in common is in the other cores and in B.
    The sum is built anew in each call, as large as the parameter, as PEFT's LoRA does with such parameters: which rows
    of the input go to which expert is known only inside the module. Several parameters of one module are several of
    these layers, one inside the other.
    """

    def __init__(self, base_layer: nn.Module, *, name: str, parameter_name: str, **quantization_kwargs: Any) -> None:
        self.parameter_name = parameter_name  # the constructor looks at its size
        super().__init__(base_layer, name=name, **quantization_kwargs)

    def _size(self, name: str) -> tuple[int, int]:
        self.n_experts, size, self.transposed = experts_size(name, self.get_base_layer(), self.parameter_name)
        return size

    @property
    def weight(self) -> Tensor:
        """None: a module of experts has several parameters."""
        raise AttributeError(f"the experts have no weight, but {self.parameter_name}")

    def get_base_weight(self) -> Tensor:
        """The parameter, (E, I, O) or (E, O, I)."""
        return self._base_weight().data

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put other values into the parameter."""
        self._base_weight().data = weight_data.detach()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weight = self._base_weight()
        return weight.device, weight.dtype

    def working_dtype(self) -> torch.dtype:
        """That of the parameter: the sum is not rounded to autocast's dtype before the experts compute."""
        return self._base_dtype()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = self._take_names(kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._running()
        if adapter_names is not None and not self.disable_adapters:
            if set(adapter_names) & self.n_pairs.keys():
                raise InputError(
                    "adapter_names: experts get the rows of a batch in an order of their own, so they cannot have one "
                    "adapter for each row: call the model once for each adapter"
                )
            names = []
        if not names:
            return self.base_layer(*args, **kwargs)
        with _alone(self.get_base_layer()):
            return functional_call(self.base_layer, {self._path(): self._updated(names)}, args, kwargs)

    def _path(self) -> str:
        path, layer = self.parameter_name, self.base_layer
        while isinstance(layer, RepExperts):
            path, layer = f"base_layer.{path}", layer.base_layer
        return path

    def _updated(self, names: Sequence[str]) -> Tensor:
        weight = self._base_weight()
        with own_precision(weight):
            for name in names:
                now, *start = self.contracted(name)
                if start:
                    # their difference first: an untrained adapter then cancels to the last bit
                    weight = weight + (torch.bmm(*self._operands(*now)) - torch.bmm(*self._operands(*start[0])))
                else:
                    weight = torch.baddbmm(weight, *self._operands(*now))
        return weight

    def _operands(self, a_IR: Tensor, b_RO: Tensor) -> tuple[Tensor, Tensor]:
        """Two batches of matrices whose products lie as the parameter does. A holds one expert after the other."""
        a_EIR = a_IR.unflatten(0, (self.n_experts, -1))[:, : self.in_features]  # sizes may be padded
        b_ERO = b_RO.expand(self.n_experts, *b_RO.shape)
        return (a_EIR, b_ERO) if self.transposed else (b_ERO.mT, a_EIR.mT)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's scaled update in the layout of the parameter."""
        return self.scaling[adapter_name] * torch.bmm(*self._operands(*self.factors(adapter_name)))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, on request with the updates of all of its parameters: PEFT would see the outer one."""
        if merge:  # all below, too
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        layer: Any = self
        while isinstance(layer, RepExperts):
            layer = layer.base_layer
        return layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never. Raises InputError, for PEFT's conversion knows linear layers alone."""
        raise InputError(
            "the adapter also trains experts, which PEFT's conversion to LoRA does not know: export with --to merged"
        )

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Keep other threads from calling a module meanwhile. Compiled code is traced once and takes no lock."""
    if torch.compiler.is_compiling():
        yield
        return
    with _locks.setdefault(module, threading.RLock()):
        yield
