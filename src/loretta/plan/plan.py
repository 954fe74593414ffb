"""What LoRETTA will do to a model, before a weight is loaded or a module replaced (and the same, read off after)."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftModel, PeftType, PrefixTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from loretta.errors import InputError
from loretta.layers.shared import SharedShape
from loretta.plan.counts import Holdings, trainable_by_kind
from loretta.plan.presets import Preset
from loretta.tuners.adp import LorettaAdpConfig, LorettaAdpModel
from loretta.tuners.config import LorettaConfig
from loretta.tuners.heads import CopyCost, copy_cost, head_names
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.model import LorettaModel
from loretta.tuners.names import name_in_base
from loretta.tuners.norms import named_whole, norms_of, outer_modules
from loretta.tuners.placement import Placement, linear_size, matched_modules, not_adaptable, unused_options
from loretta.tuners.rep import LorettaRepModel
from loretta.tuners.rescaled import Scaled, TrainedScale, scaled_modules

LORA_RANK = 8  # what everything is compared with
DENSE_BOTTLENECK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Per token: FLOPs of a forward pass, and numbers kept for the backward pass. Parameters are scalars."""

    parameters: int
    flops_per_token: int
    kept_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All trains of one adapter and what is trained beside them."""

    method: str
    model_type: str
    placements: tuple[Placement, ...]
    copies: CopyCost
    model_parameters: int
    not_adaptable: Mapping[str, str] = field(default_factory=dict)  # class -> reason
    unused: tuple[str, ...] = ()  # what was asked for and has no effect, a sentence each
    lora: Cost | None = None  # LoRA r=8 on PEFT's default targets of the same model
    scaled: tuple[Scaled, ...] = ()
    base_biases: int = 0  # numbers in the biases of the base model that are trained
    dense: Cost | None = None  # bottleneck-64 adapters with dense matrices at adp's default places

    @property
    def shared(self) -> SharedShape | None:
        """The train that all modules share, of that method."""
        return next((placement.seat.train for placement in self.placements if placement.seat), None)

    @property
    def cores(self) -> int:
        """Numbers in the trains."""
        shared = self.shared
        return sum(placement.core_params for placement in self.placements) + (shared.n_params if shared else 0)

    @property
    def biases(self) -> int:
        """Numbers in the biases of the adapters, and in those of the base model that are trained."""
        return sum(placement.bias_params for placement in self.placements) + self.base_biases

    @property
    def scales(self) -> int:
        """Numbers in the trained scales."""
        return sum(scaled.size for scaled in self.scaled)

    @property
    def parts(self) -> dict[str, int]:
        """The numbers that are trained, by kind (:class:`~loretta.record.ParameterCounts` says what each is)."""
        return {
            "cores": self.cores,
            "biases": self.biases,
            "norms": self.copies.norms,
            "scales": self.scales,
            "tokens": self.copies.tokens,
            "head": self.copies.head,
        }

    @property
    def trainable(self) -> int:
        """All numbers that are trained."""
        return sum(self.parts.values())

    @property
    def saved(self) -> int:
        """Numbers in the adapter's file: what is trained, and what is frozen but not part of the base model."""
        return self.trainable + self.copies.frozen

    @property
    def cost(self) -> Cost:
        # factors are multiplied with all inputs or outputs of a layer, keys' and values' with its outputs at once;
        # these are kept as they were before, but for inputs that a train of the same layer keeps
        inputs = {(placement.name, True) for placement in self.placements if placement.where == "update"}
        multiplied = {(scaled.name, scaled.side == "in"): scaled.width for scaled in self.scaled}
        before = sum(width for place, width in multiplied.items() if place not in inputs)
        return Cost(
            parameters=self.trainable,
            flops_per_token=sum(flops_per_token(placement) for placement in self.placements) + sum(multiplied.values()),
            kept_per_token=sum(kept_per_token(placement) for placement in self.placements) + before,
        )

    @property
    def fold_flops(self) -> int:
        """FLOPs that contract all cores, once per step."""
        if (shared := self.shared) is not None:
            return shared.fold_flops + sum(p.seat.fold_flops for p in self.placements if p.seat)
        trains = sum(p.down.fold_flops + p.up.fold_flops for p in self.placements)
        # the updates of experts are built, for they are added to the parameter itself
        return trains + sum(2 * _rank(p) * p.down.in_features * p.up.out_features for p in self.placements if p.experts)

    def groups(self) -> list[tuple[Placement, int]]:
        """One placement for each kind (ending of the name, sizes, shapes), with how many there are."""
        counts: Counter[tuple[Any, ...]] = Counter()
        first: dict[tuple[Any, ...], Placement] = {}
        for placement in self.placements:
            key = (placement.name.rpartition(".")[2], placement.where, placement.down, placement.up)
            counts[key] += 1
            first.setdefault(key, placement)
        return [(first[key], count) for key, count in counts.items()]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: totals, costs, and one row per module."""
        return {
            "method": self.method,
            "model_type": self.model_type,
            "trainable": self.trainable,
            **self.parts,
            "frozen_but_saved": self.copies.frozen,
            "head_parts": list(self.copies.parts),
            "model_parameters": self.model_parameters,
            "adapter_bytes": {"float32": 4 * self.saved, "bfloat16": 2 * self.saved},
            "per_token": {
                name: None
                if cost is None
                else {"flops": cost.flops_per_token, "kept_bytes_bf16": 2 * cost.kept_per_token}
                for name, cost in (("loretta", self.cost), ("lora_r8", self.lora), ("dense_adapters", self.dense))
            },
            "fold_flops_per_step": self.fold_flops,
            "not_adaptable": dict(self.not_adaptable),
            **self._shared_as_dict(),
            "modules": [_row(placement) for placement in self.placements],
        }

    def _shared_as_dict(self) -> dict[str, Any]:
        if (shared := self.shared) is None:
            return {}
        parts = [{"part": kind, "count": count, "parameters_each": each} for kind, count, each in shared.counts]
        return {"shared_train": {"rank": shared.rank, "parameters": shared.n_params, "parts": parts}}


def _row(placement: Placement) -> dict[str, Any]:
    row: dict[str, Any] = {"name": placement.name, "where": placement.where}
    if placement.seat is not None:
        row |= {"layer": placement.seat.layer, "projection": placement.seat.projection}
    for part, shape in (("down", placement.down), ("up", placement.up)):
        row[part] = {
            "in": shape.in_features,
            "out": shape.out_features,
            "modes": list(shape.modes),
            "ranks": list(shape.ranks),
            "cut_rank": shape.cut_rank,
            "aligned": shape.aligned,
            "parameters": shape.n_params,
        }
    return {**row, "biases": placement.bias_params, "parameters": placement.n_params}


def _rank(placement: Placement) -> int:
    return min(placement.down.cut_rank, placement.down.out_features, placement.up.cut_rank)


def flops_per_token(placement: Placement) -> int:
    """Forward FLOPs that a placement adds per token: rep's two thin products, adp's four; none for experts."""
    down, up = placement.down, placement.up
    if placement.experts:
        return 0
    if placement.where == "update":
        return 2 * _rank(placement) * (down.in_features + up.out_features)
    # a bias is one more row of each second factor
    biases = 2 * (down.in_features + down.out_features + up.in_features + up.out_features)
    return down.apply_flops() + up.apply_flops() + (biases if placement.bias_params else 0)


def kept_per_token(placement: Placement) -> int:
    """Numbers a placement keeps per token for the backward pass: its input, and what lies between its products."""
    down, up = placement.down, placement.up
    if placement.experts:
        return 0
    if placement.where == "update":
        return down.in_features + _rank(placement)
    return down.in_features + down.cut_rank + 2 * down.out_features + up.cut_rank


def method_name(config: LorettaConfig) -> str:
    """As ``loretta plan`` calls it: "rep", "adp" or "shared"."""
    return str(PeftType(config.peft_type).value).lower().removeprefix("loretta_")


def plan_model(model: nn.Module, config: LorettaConfig) -> Plan:
    """Plan ``config`` on a model that is not wrapped yet; the meta device is enough. Nothing is changed.

    The plan counts numbers, not bytes: what trains, what is saved, and per token FLOPs and what is kept beside LoRA's.

    Raises InputError when the targets match nothing or a shape does not fit.
    """
    tuner = cast(type[LorettaModel], PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)])
    model_config = BaseTuner.get_model_config(model)
    copies = copy_cost(model, config)
    asked = None if getattr(config, "_targets_by_default", False) else config.target_modules
    config = copy.copy(config)
    config.target_modules = tuner.default_targets(config, model_config)
    # what is copied whole is not adapted
    config.modules_to_save = [*(config.modules_to_save or []), *head_names(model, config)] or None
    modules = matched_modules(config, model, required=not config.target_parameters)
    placements = (*tuner.place_all(config, modules), *tuner.place_parameters(config, model))
    plan = Plan(
        method=method_name(config),
        model_type=model_config.get("model_type", "custom"),
        placements=placements,
        copies=copies,
        scaled=tuple(scaled_modules(model, config)),
        base_biases=_base_biases(model, config, placements),
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        not_adaptable=not_adaptable(model),
        unused=tuple(unused_options(config, asked, placements, model)),
        lora=_lora_cost(model, model_config),
        dense=_dense_cost(model, model_config),
    )
    if config.init_weights == "denoised":
        return replace(plan, copies=replace(copies, frozen=copies.frozen + plan.cores))
    return plan


def _base_biases(model: nn.Module, config: LorettaConfig, placements: Iterable[Placement]) -> int:
    """How many numbers of the base's own biases ``config.bias`` trains, beside those of norms and copied modules."""
    if config.bias == "none":
        return 0
    copied = named_whole(outer_modules(model), config)
    norms = norms_of(model) if config.train_norms else []
    apart = tuple(f"{name}." for name in (*copied, *norms))
    adapted = {f"{placement.name}.bias" for placement in placements}
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if (name in adapted if config.bias != "all" else name.endswith("bias") and not name.startswith(apart))
    )


def read_plan(model: PeftModel, adapter_name: str = "default") -> Plan:
    """The plan as it was carried out, read off a wrapped model: of an adapter that is active or not, trained or loaded.

    Raises InputError for another PEFT method.
    """
    if not isinstance(getattr(model, "peft_config", None), Mapping):
        raise InputError(
            f"a {type(model).__name__} without an adapter has nothing to explain: wrap it with get_peft_model(model, "
            "LorettaRepConfig()), or ask loretta.plan_model(model, LorettaRepConfig()) what that would do"
        )
    if not isinstance(model, PeftModel):
        raise InputError(
            f"a {type(model).__name__} with transformers' own adapters is not explained: load the adapter with "
            "PeftModel.from_pretrained"
        )
    config = model.peft_config.get(adapter_name)
    if config is None:
        names = ", ".join(map(repr, model.peft_config))
        raise InputError(f"the model has no adapter {adapter_name!r}: it has {names}")
    if not isinstance(config, LorettaConfig):
        raise InputError(f"the adapter {adapter_name!r} is not a LoRETTA adapter, but {type(config).__name__}")
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LorettaLayer) and adapter_name in m.scaling]
    held = Holdings.of(model, adapter_name)
    counts = trainable_by_kind(model, held.trained)
    placements = tuple(layer.placements[adapter_name] for _, layer in layers)
    base_config = BaseTuner.get_model_config(model.get_base_model())
    return Plan(
        method=method_name(config),
        model_type=base_config.get("model_type", "custom"),
        placements=placements,
        copies=CopyCost(norms=counts["norms"], head=counts["head"], tokens=counts["tokens"], frozen=held.frozen),
        scaled=tuple(
            module.scaled[side]._replace(name=name_in_base(name))
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, TrainedScale)
            for side in module.change(adapter_name)
        ),
        base_biases=counts["biases"] - sum(placement.bias_params for placement in placements),
        model_parameters=held.of_base,
        not_adaptable=not_adaptable(model),
    )


def _sizes(model: nn.Module, targets: Iterable[str] | str | None) -> list[tuple[int, int]]:
    """(in, out) of the linear layers that a target list matches; empty where the model has no such default."""
    if targets is None:
        return []
    config = LorettaConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    sizes = [linear_size(module) for _, module in matched_modules(config, model, required=False)]
    return [size for size in sizes if size is not None]


def _lora_cost(model: nn.Module, model_config: dict) -> Cost | None:
    sizes = _sizes(model, LorettaRepModel.target_module_mapping.get(model_config.get("model_type", "")))
    if not sizes:
        return None
    total = sum(i + o for i, o in sizes)
    return Cost(
        parameters=LORA_RANK * total,
        flops_per_token=2 * LORA_RANK * total,
        kept_per_token=sum(i + LORA_RANK for i, _ in sizes),
    )


def _dense_cost(model: nn.Module, model_config: dict) -> Cost | None:
    sizes = _sizes(model, LorettaAdpModel.target_module_mapping.get(model_config.get("model_type", "")))
    if not sizes:
        return None
    widths = [out for _, out in sizes]
    return Cost(
        parameters=sum(2 * DENSE_BOTTLENECK * width + DENSE_BOTTLENECK + width for width in widths),
        flops_per_token=sum(4 * DENSE_BOTTLENECK * width for width in widths),
        kept_per_token=sum(width + 2 * DENSE_BOTTLENECK for width in widths),
    )


def count_baseline(model: nn.Module, preset: Preset) -> int:
    """Trained parameters of a baseline of the paper on a (meta) model, through PEFT where PEFT has the method."""
    if preset.method == "ft":
        return sum(parameter.numel() for parameter in model.parameters())
    if preset.method == "adapters":
        # the paper counts the two matrices of each adapter, without biases
        placed = plan_model(model, LorettaAdpConfig(task_type=preset.task_type, **preset.options))
        matrices = sum(2 * DENSE_BOTTLENECK * placement.down.in_features for placement in placed.placements)
        return matrices + placed.copies.norms
    config = {"lora": LoraConfig, "ia3": IA3Config, "prefix": PrefixTuningConfig}[preset.method]
    with torch.device("meta"):
        return get_peft_model(
            model, config(task_type=preset.task_type, **preset.options)
        ).get_nb_trainable_parameters()[0]
