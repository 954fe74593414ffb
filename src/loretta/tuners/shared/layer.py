"""The shared layer: a linear module whose weight gets its update from a train that all layers share.

Axes: I input features, O output features, R rank, M modules of one size.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from loretta.errors import InputError
from loretta.layers.shared import Seat, SharedCores, shared_factors, take_apart
from loretta.layers.stacks import apart
from loretta.layers.trains import arranged
from loretta.tuners.calls import Factors, Pair, hidden_from_checkpoints
from loretta.tuners.contraction import note_change
from loretta.tuners.joint import Place, finish
from loretta.tuners.layer import BY_ADAPTER
from loretta.tuners.placement import Placement
from loretta.tuners.rep.layer import RepLinear
from loretta.tuners.shared.config import LorettaSharedConfig


class SharedLinear(RepLinear):
    """``base(x) + scaling * (x A) B`` summed over the active adapters, as rep: A and B come from a shared train.

    The first layer of an adapter holds its cores, and the others refer to that layer. So PEFT switches, moves, saves
    and deletes the cores as one module, under one name.
    """

    prefix = "loretta_shared_"
    has_own_trains = False
    adapter_layer_names = ("loretta_shared_train",)
    other_param_names = ("loretta_shared_start_train", "loretta_shared_dropout", "beside", "holders", *BY_ADAPTER)
    trains = ("train", "start_train")

    def __init__(self, base_layer: nn.Module, *, name: str, **quantization_kwargs) -> None:
        super().__init__(base_layer, name=name, **quantization_kwargs)
        self.holders: dict[str, SharedLinear] = {}  # by adapter, the layer that holds its cores: a plain dictionary

    def hold(self, adapter_name: str, trains: Mapping[str, SharedCores]) -> None:
        """Take the cores of one adapter for all layers: "train", and "start_train" that is subtracted, if any."""
        for part, train in trains.items():
            self._part(part)[adapter_name] = train

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, placement: Placement, config: LorettaSharedConfig, holder: "SharedLinear"
    ) -> None:
        """Have one adapter take this layer's update from the train that ``holder`` holds."""
        self.placements[adapter_name] = placement
        self.holders[adapter_name] = holder
        self._finish_adding(adapter_name, config.lora_dropout)
        self.n_pairs[adapter_name] = sum(adapter_name in holder._part(part) for part in self.trains)
        note_change()
        self.set_scaling(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def stacked_parameters(self, adapter_name: str, pair: int) -> tuple[Place, ...]:
        return ((self.holders[adapter_name]._part(self.trains[pair]), adapter_name, "values"),)

    def group_key(self, adapter_name: str, pair: int) -> Hashable:
        seat, train = self._seat(adapter_name), self._train(adapter_name, pair)
        return type(self), train, seat.left, seat.right, self._base_dtype(), self._device()

    @classmethod
    def stack(cls, columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [columns[0][0].clone()]  # the same for each of them; a copy, as a stack is: nobody writes to it

    @classmethod
    def contract_stacks(
        cls, pairs: Sequence[Pair], stacks: Sequence[Tensor], scale: float | Tensor, dtype: torch.dtype
    ) -> Factors:
        layers = [(cast(SharedLinear, layer), name) for layer, name, _ in pairs]
        seats = [layer._seat(name) for layer, name in layers]
        factors = finish(arranged(*shared_factors(take_apart(stacks[0], seats[0].train), seats)), scale, dtype)
        return tuple(factor.to(layers[0][0]._device()) for factor in factors)

    @classmethod
    def unstack(cls, stacked: Factors, count: int) -> list[Factors]:
        a_IR, b_MRO = stacked
        # A is the same for all layers; expanded and unbound, one kernel sums its gradients
        traced = torch.compiler.is_dynamo_compiling()
        if traced:
            (a_IR,) = apart(a_IR[None])  # computed once
        each_RO = apart(b_MRO) if traced else b_MRO.unbind()
        return list(zip(a_IR.expand(count, *a_IR.shape).unbind(), each_RO, strict=True))

    def _contract_alone(self, adapter_name: str, pair: int) -> Factors:
        train = self._train(adapter_name, pair)
        if hasattr(train.values, "full_tensor"):
            raise InputError(
                f"the train of the adapter {adapter_name!r} is used by all layers, and FSDP has sharded it with the "
                "block that holds it: train it with DDP, or take rep, whose trains are the modules' own"
            )
        with hidden_from_checkpoints():
            # called as a module: hooks that bring offloaded parameters here run
            a_IR, b_MRO = arranged(*shared_factors(train(), [self._seat(adapter_name)]))
            scale = self.scaling.of(adapter_name, train.values)
            return tuple(f.to(self._device()) for f in finish((a_IR, b_MRO[0]), scale, self.working_dtype()))

    def _updates(self, adapter_name: str) -> list[tuple[Tensor, Tensor]]:
        seat = self._seat(adapter_name)
        pairs = [self._train(adapter_name, pair)() for pair in range(self.n_pairs[adapter_name])]
        return [(a_IR, b_MRO[0]) for a_IR, b_MRO in (shared_factors(parts, [seat]) for parts in pairs)]

    def _seat(self, adapter_name: str) -> Seat:
        return cast(Seat, self.placements[adapter_name].seat)

    def _train(self, adapter_name: str, pair: int) -> SharedCores:
        return cast(SharedCores, self.holders[adapter_name]._part(self.trains[pair])[adapter_name])

    def _device(self) -> torch.device | None:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def __repr__(self) -> str:
        return super().__repr__().replace("loretta_rep.", "loretta_shared.", 1)
