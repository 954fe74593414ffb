"""Adaptive ranks: the trains of a rep adapter share one budget of parameters, and lose rank where it matters least.

During training a train keeps its size. The part that is cut is zero on both sides of each cut, so that no gradient
reaches it and it stays zero: the optimizer, recorded steps and compiled code keep the tensors that they know. At the
end :meth:`RankedTrains.shrink` leaves an ordinary adapter with the final ranks in its ``rank_pattern``.
"""

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from loretta import tt
from loretta.errors import InputError
from loretta.layers.trains import Cores
from loretta.tuners.adapted import is_finite
from loretta.tuners.contraction import note_change
from loretta.tuners.placement import Placement, plan_trains, planner, rank_for
from loretta.tuners.rep import LorettaRepConfig, RepLinear

Shapes = tuple[tt.TTShape, tt.TTShape]


class RankedTrains:
    """The trains of one rep adapter. Each module's pair has one rank, which can be lowered.

    Raises InputError for an adapter that is not rep, that subtracts its start, or that is sharded or elsewhere.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        config = getattr(model, "peft_config", {}).get(adapter_name)
        if not isinstance(config, LorettaRepConfig):
            kind = type(config).__name__.removesuffix("Config")
            raise InputError(
                f"ranks adapt in rep alone, and the adapter {adapter_name!r} is {kind}: a shared train has one rank "
                "for all modules, and between adp's trains there is an activation, so give method rep or compact"
            )
        self.config: LorettaRepConfig = config
        if config.init_weights == "denoised":
            raise InputError(
                "ranks do not adapt where init_weights='denoised' subtracts a start: give init_weights='zero'"
            )
        if config.target_parameters:
            raise InputError(
                f"target_parameters={config.target_parameters!r}: the ranks of experts do not adapt; leave them out, "
                "or train with one rank"
            )
        found = [m for m in model.modules() if isinstance(m, RepLinear) and adapter_name in m.n_pairs]
        self.layers = {layer.placements[adapter_name].name: layer for layer in found}
        self.shapes = {name: self._plan(layer) for name, layer in self.layers.items()}
        self.ranks = {name: len(shapes) for name, shapes in self.shapes.items()}
        cores = [train.values for layer in found for train in self._trains(layer)]
        if any(type(values) is not nn.Parameter or values.is_meta for values in cores):
            raise InputError("ranks adapt where each process has whole cores, not with FSDP or DeepSpeed's ZeRO 3")

    def _trains(self, layer: RepLinear) -> tuple[Cores, Cores]:
        return layer._trains(self.adapter_name)[0]

    def _plan(self, layer: RepLinear) -> list[Shapes]:
        placement = layer.placements[self.adapter_name]
        size, shapes = (layer.in_features, layer.out_features), []
        for rank in range(1, rank_for(self.config, placement.name) + 1):
            shapes.append(plan_trains(placement.name, size, size, self.config.r, rank=rank, **planner(self.config)))
            if shapes[-1] == (placement.down, placement.up):  # higher ones are what the modes cannot use
                return shapes
        raise InputError(f"'{placement.name}': its train is none that the adapter's options plan")

    def sizes(self) -> dict[str, list[int]]:
        """Parameters of each module's pair at ranks 1, 2, ..."""
        return {name: [down.n_params + up.n_params for down, up in shapes] for name, shapes in self.shapes.items()}

    def n_params(self) -> int:
        """Parameters at the ranks of now."""
        return sum(sizes[self.ranks[name] - 1] for name, sizes in self.sizes().items())

    @torch.no_grad()
    def masses(self) -> dict[str, list[float]]:
        """What each module's change of its weight would lose at ranks 1, 2, ..., as squared singular values.

        A change that is not finite has nothing to lose.
        """
        found = {}
        for name, layer in self.layers.items():
            scale, factors = layer.scaling[self.adapter_name] ** 2, layer.factors(self.adapter_name)
            shapes = self.shapes[name]
            lost = tt.discarded_mass(*factors, shapes) if all(map(is_finite, factors)) else [0.0] * len(shapes)
            found[name] = [scale * mass for mass in lost]
        return found

    @torch.no_grad()
    def lower(self, ranks: Mapping[str, int]) -> list[nn.Parameter]:
        """Cut the modules whose rank in ``ranks`` is lower, to the nearest trains. Returns the cores that changed."""
        changed = []
        for name, rank in ranks.items():
            if rank >= self.ranks[name]:
                continue
            pair, shapes = self._trains(self.layers[name]), self.shapes[name][rank - 1]
            a_IR, b_RO = self.layers[name].factors(self.adapter_name)
            if is_finite(a_IR) and is_finite(b_RO) and tt.product_norm(a_IR, b_RO) > 0:
                cores = tt.fit_product(a_IR, b_RO, *shapes)
            else:  # before its first step, or where no gradient came: any part is as good, and of what is not finite
                cores = _leading(pair[0], shapes[0]), _leading(pair[1], shapes[1])
            for train, values in zip(pair, cores, strict=True):
                train.assign(tt.pad_ranks(values, train.shape.ranks))
                changed.append(cast(nn.Parameter, train.values))
            self.ranks[name] = rank
        return changed

    @torch.no_grad()
    def shrink(self) -> None:
        """Put trains of the ranks of now in the place of the larger ones that hold them, and say so in the config.

        The outputs stay as they are. The parameters are new ones: an optimizer holds the old ones.
        """
        for name, layer in self.layers.items():
            shapes, placement = self.shapes[name][self.ranks[name] - 1], layer.placements[self.adapter_name]
            if shapes == (placement.down, placement.up):
                continue
            layer.placements[self.adapter_name] = Placement(name=name, where="update", down=shapes[0], up=shapes[1])
            for part, train, shape in zip(("down", "up"), self._trains(layer), shapes, strict=True):
                smaller = Cores(shape, dtype=train.values.dtype, device=train.values.device)
                smaller.assign(_leading(train, shape))
                smaller.requires_grad_(train.values.requires_grad).train(train.training)
                layer._part(part)[self.adapter_name] = smaller
            self.shapes[name] = self.shapes[name][: self.ranks[name]]
        self._describe()
        note_change()

    @contextmanager
    def shrunk(self) -> Iterator[None]:
        """As :meth:`shrink`, and behind the block model and config have the larger trains again, for others to use."""
        described = dict(self.config.__dict__)
        large = [(layer, layer.placements[self.adapter_name], self._trains(layer)) for layer in self.layers.values()]
        self.shrink()
        try:
            yield
        finally:
            for layer, placement, trains in large:
                layer.placements[self.adapter_name] = placement
                for part, train in zip(("down", "up"), trains, strict=True):
                    layer._part(part)[self.adapter_name] = train
            self.config.__dict__.update(described)
            note_change()

    def _describe(self) -> None:
        """Write ranks and unchanged scales into the config, whose ``tensor_rank`` a train in the head has too."""
        power = 0.5 if self.config.use_rslora else 1.0
        alphas = {n: layer.scaling[self.adapter_name] * self.ranks[n] ** power for n, layer in self.layers.items()}
        self.config.rank_pattern = {_exactly(n): r for n, r in self.ranks.items() if r != self.config.tensor_rank}
        self.config.even_rates = False  # the scales are those of the wide trains
        self.config.alpha_pattern = {_exactly(n): a for n, a in alphas.items() if a != self.config.lora_alpha}


def allot(masses: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]], budget: int) -> dict[str, int]:
    """The rank of each module, from 1 up to ``len(sizes[name])``, so that all take at most ``budget`` parameters.

    From the highest ranks down, the next rank to go is the one that loses the least mass for each parameter it frees:
    ``masses`` are what a module loses at ranks 1, 2, ..., ``sizes`` its parameters there.

    Raises InputError where rank 1 everywhere takes more.
    """
    if (least := sum(each[0] for each in sizes.values())) > budget:
        raise InputError(f"trains of rank 1 take {least:,} parameters, and the budget leaves {budget:,}: raise it")
    ranks = {name: len(each) for name, each in sizes.items()}
    total = sum(each[-1] for each in sizes.values())

    def price(name: str) -> tuple[float, str]:
        k = ranks[name] - 1
        freed = sizes[name][k] - sizes[name][k - 1]
        return (masses[name][k - 1] - masses[name][k]) / freed if freed else 0.0, name

    heap = [price(name) for name in ranks if ranks[name] > 1]
    heapq.heapify(heap)
    while total > budget:
        name = heapq.heappop(heap)[1]
        ranks[name] -= 1
        total -= sizes[name][ranks[name]] - sizes[name][ranks[name] - 1]
        if ranks[name] > 1:
            heapq.heappush(heap, price(name))
    return ranks


def _leading(cores: Cores, shape: tt.TTShape) -> list[Tensor]:
    """The first entries of each rank: the whole train where the rest is zero."""
    return [core[:left, :, :right] for core, (left, _, right) in zip(cores, shape.cores, strict=True)]


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"
