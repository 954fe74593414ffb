"""What the layers of all methods share: their trains, and the rules of a PEFT layer."""

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from loretta import quantizer_logs, tt
from loretta.layers.fused import HALF
from loretta.layers.trains import Cores
from loretta.tuners.adapted import AdaptedModule, transformers_loads
from loretta.tuners.calls import Factors, hidden_from_checkpoints
from loretta.tuners.contraction import find_factors, note_change
from loretta.tuners.joint import JointLayer, Place, finish
from loretta.tuners.mixed import rows_by_adapter, side_by_side
from loretta.tuners.placement import Placement, require_linear
from loretta.tuners.scales import Scales

BY_ADAPTER = ("known", "scaling", "placements", "n_pairs", "drops")  # what every layer keeps beside its modules


class LorettaLayer(JointLayer, AdaptedModule):
    """A module wrapped by pairs of tensor trains, one pair per adapter.

    The trains lie in dictionaries by adapter: ``down`` and ``up``, and ``start_down`` and ``start_up`` for the frozen
    start that "denoised" subtracts. PEFT demands that the names of these begin with the method's ``prefix``.
    """

    prefix: str
    parameter_name = "weight"  # the parameter of the base layer that is adapted
    trains: tuple[str, ...] = ("down", "up", "start_down", "start_up")  # names of the dictionaries

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self._size(name)
        keep_differentiable(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        if self.quantization_backend is not None:
            quantizer_logs.show()
        for part in (*self.trains, "dropout"):
            self.add_module(self.prefix + part, nn.ModuleDict())
        self.scaling = Scales()
        self.placements: dict[str, Placement] = {}
        self.narrow: set[str] = set()  # adapters that were asked to be held in the dtype of the base
        # plain dictionaries, because torch is slow to look up attributes of modules
        self.n_pairs: dict[str, int] = {}
        self.drops: dict[str, bool] = {}
        self.on_read: Callable[[LorettaLayer], None] | None = None  # called when others read the weight
        self.was_bypassed = False  # others computed with the weight and did not call the layer

    def _size(self, name: str) -> tuple[int, int]:
        """(in, out) of the adapted layer. Raises InputError, which names the module, for a layer of another kind."""
        return require_linear(name, self.get_base_layer())

    @property
    def weight(self) -> Tensor:
        """The base layer's weight without any update, for models that read its dtype or compute with it."""
        if self.on_read is not None:
            self.on_read(self)
        base_layer: Any = self.get_base_layer()
        return base_layer.qweight if hasattr(base_layer, "qweight") else base_layer.weight

    def _part(self, part: str) -> nn.ModuleDict:
        return getattr(self, self.prefix + part)

    def active_pairs(self, adapter_names: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
        if not (self.disable_adapters or self.merged):
            for name in self.active_adapters if adapter_names is None else adapter_names:
                yield from ((name, pair) for pair in range(self.n_pairs.get(name, 0)))

    def stacked_parameters(self, adapter_name: str, pair: int) -> tuple[Place, ...]:
        start = "start_" if pair else ""
        return tuple((self._part(start + part), adapter_name, "values") for part in ("down", "up"))

    def group_key(self, adapter_name: str, pair: int) -> Hashable:
        placement = self.placements[adapter_name]
        return type(self), placement.down, placement.up, self._base_dtype()

    def working_dtype(self) -> torch.dtype:
        """The dtype of activations here: that of autocast, or of the base weight where it is a plain number's."""
        device, dtype = self._base_weight().device.type, self._base_dtype()
        if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    def _base_weight(self) -> Tensor:
        return cast(Tensor, getattr(self.get_base_layer(), self.parameter_name))

    def _base_dtype(self) -> torch.dtype:
        dtype = self._base_weight().dtype
        return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else torch.float32

    def contracted(self, adapter_name: str) -> list[Factors]:
        """The factors of each pair of trains of one adapter, as the model's call has contracted them for all layers.

        A layer that is called on its own, or whose cores are sharded or on another device, contracts them itself.
        """
        return [
            find_factors(self, adapter_name, pair) or self._contract_alone(adapter_name, pair)
            for pair in range(self.n_pairs[adapter_name])
        ]

    def _contract_alone(self, adapter_name: str, pair: int) -> Factors:
        down, up = self._trains(adapter_name)[pair]
        places = self.stacked_parameters(adapter_name, pair)[2:]
        biases = [parameter_of(modules[name], parameter) for modules, name, parameter in places]
        with hidden_from_checkpoints():
            # called as modules, so that hooks run which bring offloaded parameters here
            factors = self.to_factors(adapter_name, down(), up(), biases)
            return finish(factors, self.scaling.of(adapter_name, factors[-1]), self.working_dtype())

    def _trains(self, adapter_name: str) -> list[tuple[Cores, Cores]]:
        """(down, up) of one adapter, and after it the frozen start that is subtracted, if the adapter has one."""
        pairs = [("down", "up"), ("start_down", "start_up")]
        return [
            (cast(Cores, self._part(down)[adapter_name]), cast(Cores, self._part(up)[adapter_name]))
            for down, up in pairs
            if adapter_name in self._part(down)
        ]

    def _add_trains(self, adapter_name: str, placement: Placement, init_weights: str, dropout: float) -> None:
        """New trains with their starting values, on the device of the base layer, in float32 or wider as it is."""
        self.placements[adapter_name] = placement
        down, up = Cores(placement.down), Cores(placement.up)
        starting_cores(down, up, init_weights, n_experts=placement.experts)
        self._part("down")[adapter_name], self._part("up")[adapter_name] = down, up
        self._finish_adding(adapter_name, dropout)
        if init_weights == "denoised":
            # after the move: the start has to equal the trained cores to the last bit
            for part in ("down", "up"):
                self._part("start_" + part)[adapter_name] = copy.deepcopy(self._part(part)[adapter_name])
                self._part("start_" + part)[adapter_name].requires_grad_(False)
        self.n_pairs[adapter_name] = 2 if init_weights == "denoised" else 1
        note_change()

    def _start_larger(self, adapter_name: str) -> None:
        """With ``even_rates``: multiply each core by its factor of :meth:`Placement.larger_starts`."""
        for pair in self._trains(adapter_name):
            for cores, larger in zip(pair, self.placements[adapter_name].larger_starts(), strict=True):
                cores.assign([factor * core for core, factor in zip(cores, larger, strict=True)])

    def _finish_adding(self, adapter_name: str, dropout: float) -> None:
        self._part("dropout")[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.drops[adapter_name] = bool(dropout)
        self._cast(adapter_name, torch.promote_types(self.working_dtype(), torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.scaling.move(self._base_weight().device)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """As PEFT's. Of a layer that accelerate offloads, the device that computes: its weight lies on none now."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return (
            torch.device(cast(Any, base_layer)._hf_hook.execution_device) if is_offloaded(base_layer) else device
        ), dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the device and not the dtype: PEFT's own, which it calls after a load, would round float32 tensors."""
        target = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] if device is None else device
        for module in self._modules_of(adapter_name):
            if target is not None and not any(parameter.is_meta for parameter in module.parameters()):
                module.to(target)

    def to_base_dtype(self, adapter_name: str) -> None:
        """Cast one adapter to the dtype in which its base computes."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        if dtype is not None and dtype.is_floating_point:
            self._cast(adapter_name, dtype)
            self.narrow.add(adapter_name)
            note_change()

    def narrowed(self) -> list[str]:
        """Active adapters whose trained cores somebody else has cast to half precision."""
        trains = self._part(self.trains[0])
        cores = {name: cast(Cores, trains[name]) for name in self.active_adapters if name in trains}
        return [
            name
            for name, train in cores.items()
            if train.values.requires_grad and train.values.dtype in HALF and name not in self.narrow
        ]

    def _cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        for module in self._modules_of(adapter_name):
            module.to(dtype)

    def _modules_of(self, adapter_name: str) -> list[nn.Module]:
        parts = [getattr(self, part) for part in (*self.adapter_layer_names, *self.other_param_names)]
        return [part[adapter_name] for part in parts if isinstance(part, nn.ModuleDict) and adapter_name in part]

    def freeze(self) -> None:
        """Freeze the starts that are subtracted, which nobody trains, and round them as the cores have been rounded.

        TRL rounds what trains alone: an untrained adapter would be the error of that.
        """
        for part in self.trains:
            if part.startswith("start_"):
                for name, start in self._part(part).items():
                    freeze_in_dtype(start, cast(Cores, self._part(part.removeprefix("start_"))[name]).values.dtype)

    def set_scaling(self, adapter_name: str, config: Any) -> None:
        """Take the factor on one adapter's effect from its config."""
        raise NotImplementedError

    def rename_adapter(self, old: str, new: str) -> None:
        super().rename_adapter(old, new)
        note_change()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, but a name that is given twice acts once, just as it is merged once."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        super().set_adapter(names, inference_mode=inference_mode)
        note_change(activity_alone=True)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        note_change(activity_alone=True)

    @property
    def held(self) -> list[str]:
        """The adapters that are placed here."""
        return list(self.placements)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        note_change()

    def _apply(self, *args: Any, **kwargs: Any) -> "LorettaLayer":
        super()._apply(*args, **kwargs)
        self.scaling.move(self._base_weight().device)  # not to another dtype, which would round the scale
        note_change()
        return self

    def dropout(self, adapter_name: str, x: Tensor) -> Tensor:
        """One adapter's dropout."""
        return self._part("dropout")[adapter_name](x) if self.drops[adapter_name] else x

    def _factors_by_row(self, adapter_names: Sequence[str], known: Sequence[str], dtype: torch.dtype) -> Factors | None:
        """The factors of every row of a mixed batch, (rows, ...) each; None where adapters must be computed in turn."""
        names = set(adapter_names) & set(known)
        if self.training or not names or any(self.n_pairs[name] != 1 for name in names):
            return None
        return side_by_side(adapter_names, {name: self.contracted(name)[0] for name in sorted(names)}, dtype)

    @staticmethod
    def _rows_by_adapter(adapter_names: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        """(adapter, its rows) for every adapter of a mixed batch that this layer has; "__base__" is none of them."""
        return ((name, rows) for name, rows in rows_by_adapter(adapter_names) if name in known)


def freeze_in_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Freeze a module, and cast it to ``dtype``.

    What is so already is left alone: within torch.func's transforms torch lets nobody freeze, and crashes behind them
    where a cast has set the ``data`` of a parameter.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    if any(tensor.dtype != dtype for tensor in (*module.parameters(), *module.buffers())):
        module.to(dtype)


def within_updates(parent: nn.Module, child: str, prefix: str) -> tuple[nn.Module, str]:
    """Where the method with this ``prefix`` has its layer, or puts it: within the updates that other methods add.

    So adp sees what the base computes, whichever came first. And LoRA's tensors keep the names that its file has, where
    ours are translated. Transformers' ``load_adapter`` finds ours around all others only.
    """
    layer: Any = getattr(parent, child)
    while getattr(layer, "prefix", "") != prefix and _is_update(layer) and not transformers_loads():
        parent, child, layer = layer, "base_layer", layer.base_layer
    return parent, child


def _is_update(module: nn.Module) -> bool:
    """Whether a layer adds to what the layer within computes, and knows that by one name."""
    if isinstance(module, LorettaLayer):
        return not module.cannot_merge
    # LoRA's layer for GPTQ and AWQ calls it as ``quant_linear_module``
    return isinstance(module, LoraLayer) and [*module._modules.values()].count(module.base_layer) == 1


def is_bare_linear(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer without hooks, with its own forward and a whole weight.

    Hooks may change the input or look at the output, accelerate replaces the forward of the instance, and profilers
    hook all modules at once.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor)  # FSDP 1 and functional_call put plain tensors there
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not (module._backward_pre_hooks or _has_any_global_hook())
        and "forward" not in module.__dict__
    )


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the parameters of a module elsewhere, and brings them here for each call."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return any(getattr(each, "offload", False) for each in hooks)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module that is not called, brought here where accelerate offloads it."""
    with align_module_device(module) if is_offloaded(module) else nullcontext():
        return getattr(module, name)


def brought_here(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors, by their names in ``model``; those that accelerate has offloaded are copied from where they lie."""
    found = dict(tensors)
    for key in (key for key, tensor in tensors.items() if tensor.is_meta):
        path, _, name = key.rpartition(".")
        if is_offloaded(module := model.get_submodule(path)):
            with align_module_device(module):
                found[key] = getattr(module, name).detach().clone()
    return found


def lies_in_rows(x: Tensor) -> bool:
    """Whether torch's linear layer treats ``x`` as one matrix of rows. If not, it adds the bias in another order."""
    return x.dim() == 2 or x.is_contiguous()


def works_in(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with ``x`` come out in ``dtype``, by themselves or because autocast sees to it."""
    # autocast leaves float64 as it is
    return x.dtype is dtype or (torch.float64 not in (x.dtype, dtype) and torch.is_autocast_enabled(x.device.type))


def fitting(factor: Tensor, x: Tensor) -> Tensor:
    """``factor`` in the dtype of ``x``, unless autocast is going to cast both."""
    return factor if works_in(x, factor.dtype) else factor.to(x.dtype)


@contextmanager
def at_least_float32() -> Iterator[None]:
    """Make trains in float32, in which they train, also where torch's default dtype is half precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(before, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit weights within ``model`` in the layout that backward passes and merging read.

    On a CPU with bf16 instructions the first evaluation packs them into another layout. From then on the layer passes
    no gradient, without an error, and dequantising gives noise (bitsandbytes 0.50).
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()  # unpacks what an earlier evaluation has packed


def starting_cores(down: Cores, up: Cores, init_weights: str, *, n_experts: int) -> None:
    """Assign starting values to a pair of trains; ``init_weights`` as in the config.

    "zero": the last core of ``up`` is zero. The others are random orthonormal maps scaled so that an input with
    entries of variance 1 keeps that variance through the train: a core that sums over a piece of the input is
    orthonormal, one that spells a piece of the output is sqrt(its mode) times that. The zero core then meets
    inputs of size 1, as LoRA's B does, and the same learning rates suit it and the layer norms.
    Otherwise Gaussian, with entries of standard deviation sqrt(1 / (in + out)) in each contracted matrix
    (LoRETTA section 3.3).

    With ``n_experts`` the first core of ``down`` picks one of them: an input passes one row of it and not a sum over
    all, so the core is sqrt(``n_experts``) times larger.
    """
    for cores in (down, up):
        shape = cores.shape
        picked = n_experts if n_experts and cores is down else 1
        if init_weights == "zero":
            values = [_variance_keeping(core, shape.out_part(k)) for k, core in enumerate(shape.cores)]
            values[0] = math.sqrt(picked) * values[0]
        else:
            values = tt.gaussian(shape, std=(shape.in_features // picked + shape.out_features) ** -0.5)
        if cores is up and init_weights == "zero":
            values[-1] = torch.zeros_like(values[-1])
        cores.assign(values)


def _variance_keeping(core: tuple[int, int, int], out_part: int) -> Tensor:
    left, mode, right = core
    return math.sqrt(out_part) * nn.init.orthogonal_(torch.empty(left * mode, right)).reshape(core)
