"""The rep tuner."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from loretta.errors import InputError
from loretta.layers.fit import EXACT, Update, fit_update, smallest_fit
from loretta.layers.trains import TTLinear
from loretta.tuners.changes import ChangedModule
from loretta.tuners.layer import is_offloaded
from loretta.tuners.model import LorettaModel
from loretta.tuners.names import check_adapter_name, name_in_base
from loretta.tuners.placement import Placement, plan_trains, planner, rank_for, require_linear
from loretta.tuners.rep.config import LorettaRepConfig, of_ranks
from loretta.tuners.rep.experts import RepExperts, matched_parameters, plan_experts
from loretta.tuners.rep.layer import RepLinear
from loretta.tuners.targets import REP_TARGETS
from loretta.tuners.tokens import TokenRows


def _sum(layers: Mapping[str, RepLinear], weights: Mapping[str, float]) -> Update:
    """The weighted sum of one module's updates as two thin matrices. ``layers`` has the layer of each adapter."""
    factors = [(weights[a] * layer.scaling[a], *layer.factors(a)) for a, layer in layers.items()]
    a_IR = torch.cat([scale * a_IR.detach().float() for scale, a_IR, _ in factors], dim=1)
    return a_IR, torch.cat([b_RO.detach().float() for _, _, b_RO in factors], dim=0)


def _bad_budget(combination_type: str, rank: int | None, error: float | None, svd_rank: int | None) -> Iterator[str]:
    """A phrase on each mistake in what says how exact a sum of adapters is to be."""
    if combination_type not in ("linear", "svd"):
        yield f"combination_type={combination_type!r} is none of 'linear' and 'svd'"
    if rank is not None and error is not None:
        yield "rank and error are two budgets: give one of them"
    if svd_rank is not None and combination_type != "svd":
        yield "svd_rank is for combination_type='svd'"
    for name, value in (("rank", rank), ("svd_rank", svd_rank)):
        if value is not None and value < 1:
            yield f"{name}={value!r} must be at least 1"
    if error is not None and not 0 <= error < 1:
        yield f"error={error!r} must be from 0 to below 1"


class LorettaRepModel(LorettaModel):
    """Adds a weight update of two tensor trains to every target (LoRETTA section 3.3)."""

    prefix = "loretta_rep_"
    layer_cls = RepLinear
    target_module_mapping = REP_TARGETS  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As for all methods. Every layer also learns the parts that a conversion of the adapter to LoRA would lose."""
        self._check_same_experts(adapter_name)
        config = self.peft_config[adapter_name]
        patterns = {option: getattr(config, option) for option in ("rank_pattern", "alpha_pattern")}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            for option, pattern in patterns.items():
                setattr(config, option, pattern)
        beside = tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, RepLinear)
            if adapter_name in module._get_available_adapters()
        )
        for layer in self._layers(RepLinear):
            if adapter_name in layer.n_pairs:
                layer.beside[adapter_name] = beside

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether PEFT's conversion to LoRA loses nothing of an adapter; by default of any, as PEFT gives no name."""
        names = [name for name in self.peft_config if adapter_name in (None, name)]
        lossy = any(layer.beside.get(name) for layer in self._layers(RepLinear) for name in names)
        lossy |= any(name in layer.n_pairs for layer in self._layers(RepExperts) for name in names)
        lossy |= bool(self._layers(ChangedModule))  # those of other adapters, at which PEFT stops
        return not lossy and all(self.peft_config[name].bias == "none" for name in names)

    @classmethod
    def place_parameters(cls, config: Any, model: nn.Module) -> list[Placement]:
        """Two trains for each parameter, shared by its experts."""
        places = list(matched_parameters(config, model))
        if away := next((name for name, module, _ in places if is_offloaded(module)), None):
            raise InputError(
                f"'{away}' is offloaded by accelerate: give the model a device_map that keeps experts in place"
            )
        return [plan_experts(config, *place, config.r) for place in places]

    def _check_same_experts(self, adapter_name: str) -> None:
        """Refuse an adapter of other experts: which of the layers wraps the other would depend on the order."""
        wanted = set(self.peft_config[adapter_name].target_parameters or ())
        for name, config in self.peft_config.items():
            other = set(getattr(config, "target_parameters", None) or ())
            if wanted and other and other != wanted:
                raise InputError(
                    f"the adapter {name!r} has target_parameters={sorted(other)} and {adapter_name!r} has "
                    f"{sorted(wanted)}: adapters of one model have to agree on the experts they adapt"
                )

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """In the place of PEFT's, which looks for the class of LoRA."""
        places = list(matched_parameters(peft_config, model))
        for name, _, parameter in places:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_experts(peft_config, adapter_name, name, parameter)
        names = [name for name, _, _ in places]
        # every layer has its rank by now. PEFT looks for patterns in names of modules alone, and would warn that those
        # for experts match nothing
        for option in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(peft_config, option)
            left = [key for key in pattern if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
            setattr(peft_config, option, {key: pattern[key] for key in left})
        return names

    def _adapt_experts(self, config: Any, adapter_name: str, name: str, parameter: str) -> None:
        parent, _, child = name.rpartition(".")[0].rpartition(".")
        outermost: Any = self.model.get_submodule(parent).get_submodule(child)
        layer = outermost
        while isinstance(layer, RepExperts) and layer.parameter_name != parameter:
            layer = layer.base_layer
        if isinstance(layer, RepExperts):
            layer.update_layer(adapter_name, self.planned[name], config)
            return
        layer = RepExperts(outermost, name=name, parameter_name=parameter)
        layer.update_layer(adapter_name, self.planned[name], config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        setattr(self.model.get_submodule(parent), child, layer)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        rank: int | None = None,
        error: float | None = None,
        svd_rank: int | None = None,
        **of_lora: Any,
    ) -> None:
        """Add an adapter whose update is the weighted sum of the updates of others; it is not active.

        "linear" adds the trains up, so bottlenecks and ranks add up too (Oseledets 2011, section 4.1), and rounds
        the sum where ``rank`` or ``error`` asks for it. "svd" first cuts the sum to its ``svd_rank`` largest
        singular directions. Unlike LoRA's "linear", which adds up factors, the update is the sum itself. Norms are
        combined alike; a head, and rows of tokens, are taken over from the one adapter that has them.

        Args:
            adapters, weights: what is summed, and how much of each (negative to subtract).
            adapter_name: the name of the sum.
            combination_type: "linear" or "svd".
            rank: tensor rank of the new trains. Default: "linear" the sum of the ranks, which is exact; "svd" the
                largest rank of the given adapters.
            error: in place of ``rank``: the relative Frobenius error that each module's update may have.
            svd_rank: bottleneck of the new trains for "svd". Default: the largest ``r`` of the given adapters.
            of_lora: what LoRA's method of this name takes beside these, such as ``density``, and is refused.

        Raises InputError for unknown or taken names, budgets that make no sense, and adapters with heads of their own.
        """
        summands = self._bad_summands(adapters, weights, adapter_name)
        unknown = [f"{name}={value!r} is no option of rep's sums" for name, value in of_lora.items()]
        if problems := [*summands, *_bad_budget(combination_type, rank, error, svd_rank), *unknown]:
            raise InputError("cannot add a weighted adapter: " + "; ".join(problems))
        layers: dict[str, dict[str, RepLinear]] = {}  # by module and adapter: several where other methods' lie between
        for name, layer in self.model.named_modules():
            for adapter in adapters if isinstance(layer, RepLinear) else ():
                if adapter in layer.n_pairs:
                    layers.setdefault(name_in_base(name), {})[adapter] = layer
        weight_of = dict(zip(adapters, weights, strict=True))
        updates = {name: _sum(by_adapter, weight_of) for name, by_adapter in layers.items()}
        configs = [cast(LorettaRepConfig, self.peft_config[adapter]) for adapter in adapters]
        if combination_type == "svd":
            bottleneck = svd_rank or max(config.r for config in configs)
            rank = rank or max(config.tensor_rank for config in configs)
        else:
            bottleneck = max(a_IR.shape[1] for a_IR, _ in updates.values())
        fits = {}
        for name, update in updates.items():
            total = sum(rank_for(self.peft_config[a], name) * at.n_pairs[a] for a, at in layers[name].items())
            fits[name] = fit_update(update, bottleneck, rank or max(total, bottleneck))
            # trains whose shapes were given do not add up at the ranks of the planned ones
            if error is not None or (rank is None and fits[name].error > EXACT):
                fits[name] = smallest_fit(update, bottleneck, error or 0.0)
        ranks = {name: fit.rank for name, fit in fits.items()}
        self.peft_config[adapter_name] = self._config_of_sum(adapters, bottleneck, ranks)
        self.inject_adapter(self.model, adapter_name)
        # PeftModel does this for the adapters that it adds; a sum in the dtype of the base would be rounded
        dtypes = {at.factors(a)[0].dtype for by_adapter in layers.values() for a, at in by_adapter.items()}
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=torch.float32 in dtypes)
        for layer in self._layers(RepLinear):
            if adapter_name in layer.n_pairs:
                fit, (down, up) = fits[layer.placements[adapter_name].name], layer._trains(adapter_name)[0]
                down.assign(list(fit.down))
                up.assign(list(fit.up))
        self._combine_changes_and_heads(adapters, weights, adapter_name)

    def _config_of_sum(self, adapters: Sequence[str], bottleneck: int, ranks: Mapping[str, int]) -> LorettaRepConfig:
        """The config of one of the adapters, for the modules of all of them, whose trains have these ``ranks``."""
        configs = [cast(LorettaRepConfig, self.peft_config[adapter]) for adapter in adapters]
        # the sum takes over the modules trained whole of the adapter that has some
        heads = self._layers(ModulesToSaveWrapper)
        with_head = (a for a in adapters if any(a in head.modules_to_save for head in heads))
        first = cast(LorettaRepConfig, self.peft_config[next(with_head, adapters[0])])
        with_tokens = next((config for config in configs if config.trainable_token_indices), first)
        norms = any(config.train_norms for config in configs)
        # of the head's trains the config says the rank, and the shapes of their sizes
        head_sizes = {f"{train.in_features}x{train.out_features}" for train in self._layers(TTLinear)}
        scales = list(dict.fromkeys(place for config in configs for place in config.train_scales))
        return replace(
            first,
            r=bottleneck,
            **of_ranks(ranks, first.tensor_rank if head_sizes else None),
            use_rslora=False,
            shapes={size: modes for size, modes in first.shapes.items() if size in head_sizes},
            modes_per_side=None,
            init_weights="zero",
            train_norms=norms,
            train_scales=scales,
            trainable_token_indices=with_tokens.trainable_token_indices,
            ensure_weight_tying=with_tokens.ensure_weight_tying,
            target_modules=list(ranks),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            base_signature=None,
            head_origins=getattr(first, "_origins_found", first.head_origins),
        )

    @torch.no_grad()
    def _combine_changes_and_heads(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        for module in self._layers(ChangedModule):
            changes = [module.change(adapter) for adapter in adapters]
            for name, change in module.change(adapter_name).items():
                terms = [w * own[name] for own, w in zip(changes, weights, strict=True) if name in own]
                change.copy_(sum(terms, torch.zeros_like(change)))
        for head in self._layers(ModulesToSaveWrapper):
            having = [a for a in adapters if a in head.modules_to_save]
            if having and adapter_name in head.modules_to_save:
                head.modules_to_save[adapter_name].load_state_dict(head.modules_to_save[having[0]].state_dict())
        for rows in self._layers(TokenRows):
            for adapter in rows.held_of(adapters):
                rows.trainable_tokens_delta[adapter_name].copy_(rows.trainable_tokens_delta[adapter])

    def _bad_summands(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> Iterator[str]:
        """A phrase on each reason why these adapters cannot be added up under this name."""
        if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
            yield f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter once"
        if adapter_name in self.peft_config:
            yield f"the name {adapter_name!r} is taken"
        else:
            check_adapter_name(self.model, adapter_name)
        yield from (f"there is no adapter {a!r}" for a in adapters if a not in self.peft_config)
        known = {a: self.peft_config[a] for a in adapters if a in self.peft_config}
        if experts := [repr(a) for a, config in known.items() if config.target_parameters]:
            yield f"{', '.join(experts)}: trains of experts are not added up"
        if biased := [repr(a) for a, config in known.items() if config.bias != "none"]:
            yield f"{', '.join(biased)}: trained biases are not added up, so train with bias='none'"
        of_heads = ([a for a in adapters if a in head.modules_to_save] for head in self._layers(ModulesToSaveWrapper))
        if several := next((having for having in of_heads if len(having) > 1), None):
            yield f"the heads of {', '.join(several)} cannot be added up: leave one in, or train without"
        if len(of_tokens := [repr(a) for a, config in known.items() if config.trainable_token_indices]) > 1:
            yield f"the rows of tokens of {', '.join(of_tokens)} cannot be added up: leave one in, or train without"

    @staticmethod
    def place(config: LorettaRepConfig, name: str, module: nn.Module) -> Placement:
        """Plan in x r and r x out. Raises InputError when the target is not linear or a given shape does not fit."""
        in_features, out_features = require_linear(name, module)
        size = in_features, out_features
        rank = rank_for(config, name)
        down, up = plan_trains(name, size, size, config.r, rank=rank, **planner(config))
        return Placement(name=name, where="update", down=down, up=up)
