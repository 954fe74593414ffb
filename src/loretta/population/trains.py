"""The LoRETTA layers of all members: equal trains are contracted together, over modules and members.

Axes: M modules with trains of one shape, P members, B rows of one member, I input features, O output features,
R rank of the update, H width, b bottleneck, C and D inner sizes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from loretta.layers.shared import Seat, shared_factors, take_apart
from loretta.layers.trains import arranged, fold_bias, halves, update_factors
from loretta.population.members import Members
from loretta.tuners.adp.layer import AdpLinear
from loretta.tuners.layer import LorettaLayer, fitting, works_in
from loretta.tuners.rep.layer import RepLinear

Factors = tuple[Tensor | None, ...]


class MemberTrains(Members):
    """A layer with trains. Its :class:`TrainGroup` gives it its factors before each pass."""

    module: LorettaLayer

    def __init__(self, module: LorettaLayer, adapter_name: str, size: int) -> None:
        nn.Module.__init__(self)
        self.module, self.adapter_name, self.size, self.names = module, adapter_name, size, ()
        self.factors: list[Factors] = []  # of the trains, then of a start that is subtracted; (P, ...) each
        self.bias_up: Tensor | None = None  # (P, 1, H); None where it is folded into the factors

    def dropout(self, x: Tensor) -> Tensor:
        return self.module.dropout(self.adapter_name, x)


class MemberRep(MemberTrains):
    """``base(x) + (x A) B`` with A and B of each member."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.module.base_layer(x)
        rows_PBI = self.dropout(x).reshape(self.size, -1, x.shape[-1])
        y_PBO = y.reshape(self.size, -1, y.shape[-1])
        pairs = [_alike(factors, rows_PBI) for factors in self.factors]
        inner, last = zip(*((torch.bmm(rows_PBI, cast(Tensor, a)), cast(Tensor, b)) for a, b in pairs), strict=True)
        if len(pairs) == 1 and works_in(y, last[0].dtype):
            return torch.baddbmm(y_PBO, inner[0], last[0]).reshape(y.shape)
        delta_PBO = torch.bmm(inner[0], last[0])
        if len(pairs) == 2:
            # as in a run alone, outputs are subtracted, not factors: an untrained member then changes not one bit
            delta_PBO = delta_PBO - torch.bmm(inner[1], last[1])
        return (y_PBO + delta_PBO.to(y.dtype)).reshape(y.shape)


class MemberAdp(MemberTrains):
    """``y + up(act(down(y)))`` with the trains and biases of each member; y is the base's output or its input."""

    module: AdpLinear

    def forward(self, x: Tensor) -> Tensor:
        if self.module.placements[self.adapter_name].where == "before":
            return self.module.base_layer(self.adapted(x))
        return self.adapted(self.module.base_layer(x))

    def adapted(self, y: Tensor) -> Tensor:
        rows_PBH = y.reshape(self.size, -1, y.shape[-1])
        now, *start = [_alike(factors, rows_PBH) for factors in self.factors]
        inner_PBD, up_PDH = self.inner(rows_PBH, now)
        if self.bias_up is None and not start and works_in(y, up_PDH.dtype):
            return torch.baddbmm(rows_PBH, inner_PBD, up_PDH).view(y.shape)
        delta_PBH = torch.bmm(inner_PBD, up_PDH)
        for factors in start:
            inner_PBD, up_PDH = self.inner(rows_PBH, factors)
            delta_PBH = delta_PBH - torch.bmm(inner_PBD, up_PDH)
        if self.bias_up is not None:
            delta_PBH = delta_PBH + self.bias_up.to(delta_PBH.dtype)
        return (rows_PBH + delta_PBH.to(y.dtype)).view(y.shape)

    def inner(self, rows_PBH: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """The adapter's last hidden state (P, B, D), and the matrix (P, D, H) that ends it."""
        act = self.module.loretta_adp_act[self.adapter_name]
        one_PC, left_PHC, mid_PCb, one_PD, mid_PbD, up_PDH = factors
        assert left_PHC is not None
        assert up_PDH is not None
        hidden_PBb = _product(rows_PBH, left_PHC, one_PC)
        hidden_PBb = self.dropout(act(hidden_PBb if mid_PCb is None else hidden_PBb @ mid_PCb))
        return (hidden_PBb if mid_PbD is None else _product(hidden_PBb, mid_PbD, one_PD)), up_PDH


def _product(rows_PBI: Tensor, matrix_PIO: Tensor, bias_PO: Tensor | None) -> Tensor:
    if bias_PO is None:
        return torch.bmm(rows_PBI, matrix_PIO)
    return torch.baddbmm(bias_PO[:, None], rows_PBI, matrix_PIO)


def _alike(factors: Factors, rows: Tensor) -> Factors:
    return tuple(None if factor is None else fitting(factor, rows) for factor in factors)


class TrainGroup:
    """Equal layers of rep or adp.

    Args:
        sites: the M layers.
        parts: "down", "up", and where there are "bias.down", "bias.up", "start_down", "start_up": the values of all
            layers and members, (P, M, ...).
        scales: (M, P), the factor of each layer on the effect of each member.
    """

    def __init__(self, sites: Sequence[MemberTrains], parts: Mapping[str, Tensor], scales: Tensor) -> None:
        self.sites, self.parts = sites, parts
        self.placement = sites[0].module.placements[sites[0].adapter_name]
        same = bool((scales == scales.flatten()[0]).all())
        self.scale: float | Tensor = float(scales.flatten()[0]) if same else scales[:, :, None, None]
        self.dense = len(self.placement.down.modes) == 1
        # as in a run alone, the last bias stays apart where a start is subtracted; a plain matrix has no row for it
        self.folds = not (self.dense or "start_down" in parts)

    def hand_over(self) -> None:
        """Contract the trains and give each layer its factors for the next pass."""
        parts_MP = {part: value.transpose(0, 1) for part, value in self.parts.items()}
        pairs = [self._assembled(parts_MP, "")]
        if "start_down" in parts_MP:
            pairs.append(self._assembled(parts_MP, "start_"))
        for k, site in enumerate(self.sites):
            site.factors = [tuple(None if f is None else f[k] for f in factors) for factors in pairs]
            site.bias_up = None
        if "bias.up" in parts_MP and not self.folds:
            biases_MPH = parts_MP["bias.up"] * (self.scale if isinstance(self.scale, float) else self.scale[..., 0])
            for site, bias_PH in zip(self.sites, biases_MPH.unbind(), strict=True):
                site.bias_up = bias_PH[:, None]

    def take_back(self) -> None:
        """Drop the factors after the pass: a graph kept alive would bind the gradients to its stream."""
        for site in self.sites:
            site.factors, site.bias_up = [], None

    def _assembled(self, parts_MP: Mapping[str, Tensor], which: str) -> list[Sequence[Tensor | None]]:
        """A and B of an update, or the six factors of an adapter: for each factor a (P, ...) for every module."""
        dtype = self.sites[0].module.working_dtype()
        down, up = self.placement.down, self.placement.up
        down_MP, up_MP = parts_MP[which + "down"], parts_MP[which + "up"]
        bias_down, bias_up = (None if which else parts_MP.get(part) for part in ("bias.down", "bias.up"))
        factors: tuple[Tensor | None, ...]
        if isinstance(self.sites[0].module, RepLinear):
            a_IR, b_RO = arranged(*update_factors(halves(down_MP, down), halves(up_MP, up)))
            factors = (a_IR, b_RO * self.scale)
        elif self.dense:
            left, last = (v.unflatten(-1, (s.in_features, s.out_features)) for v, s in ((down_MP, down), (up_MP, up)))
            factors = (bias_down, left, None, None, None, last * self.scale)
        else:
            folded = self.folds
            down_halves, up_halves = self.placement.evened(halves(down_MP, down), halves(up_MP, up))
            one_C, left_HC, mid_Cb = _with_bias(*down_halves, bias_down)
            one_D, mid_bD, up_DH = _with_bias(*up_halves, bias_up if folded else None)
            factors = (one_C, left_HC, mid_Cb, one_D, mid_bD, up_DH * self.scale)
        # unbind and not an index: its backward pass is one stack
        none = [None] * len(self.sites)
        return [none if factor is None else factor.to(dtype).unbind() for factor in factors]


class SharedGroup(TrainGroup):
    """The layers of shared, which have one train for all: "train", and where there is "start_train", (P, 1, N)."""

    def __init__(self, sites: Sequence[MemberTrains], parts: Mapping[str, Tensor], scales: Tensor) -> None:
        self.sites, self.parts = sites, parts
        seats = [cast(Seat, site.module.placements[site.adapter_name].seat) for site in sites]
        self.shape = seats[0].train
        self.alike: dict[tuple[int, int], list[tuple[int, Seat]]] = defaultdict(list)  # layers with the same two sides
        for k, seat in enumerate(seats):
            self.alike[seat.left, seat.right].append((k, seat))
        # selected once: an index would be copied to the device in every pass, which a recorded step must not do
        self.scales_PM = {key: scales[[k for k, _ in numbered]].T for key, numbered in self.alike.items()}

    def hand_over(self) -> None:
        dtype = self.sites[0].module.working_dtype()
        for site in self.sites:
            site.factors = []
        for part in ("train", "start_train"):
            if part not in self.parts:
                continue
            matrices = take_apart(self.parts[part][:, 0], self.shape)
            for key, numbered in self.alike.items():
                numbers, seats = zip(*numbered, strict=True)
                a_PIR, b_PMRO = shared_factors(matrices, seats)
                a_PIR, b_PMRO = arranged(a_PIR[:, None], b_PMRO * self.scales_PM[key][..., None, None])
                # expanded and unbound, although it is the same for all: one kernel then sums its gradients
                each_a = a_PIR.to(dtype).expand(-1, len(numbers), -1, -1).unbind(1)
                for number, a, b in zip(numbers, each_a, b_PMRO.to(dtype).unbind(1), strict=True):
                    self.sites[number].factors.append((a, b))


def _with_bias(left: Tensor, right: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    return (None, *arranged(left, right)) if bias is None else fold_bias(left, right, bias)
