"""Wrap the tiny models with either method, and pretend to have trained them."""

import pytest
import torch
from draws import seed_torch
from peft import PeftModel
from torch import Tensor, nn
from tuners.families import build, natural_task, randomise

from loretta import LorettaAdpConfig, LorettaRepConfig, LorettaSharedConfig, get_peft_model
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.shared import SharedLinear

CONFIGS = {"rep": LorettaRepConfig, "adp": LorettaAdpConfig, "shared": LorettaSharedConfig}
every_method = pytest.mark.parametrize("method", CONFIGS)
one_method = lambda test: pytest.mark.sampled("method")(every_method(test))  # noqa: E731  for tests that compile
own_trains = pytest.mark.parametrize("method", ["rep", "adp"])  # those that give every module trains of its own


class Two(nn.Module):
    """Two linear layers of one size, so that their trains are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def config_for(method: str, **options):
    # one scale for all: noise on everything that trains is then of one size
    alpha = {"lora_alpha": 16} if method == "shared" else {}
    return CONFIGS[method](**{"tensor_rank": 3, **alpha, **options})


def wrap(
    family: str, method: str, task: str | None = None, *, seed: int = 0, base: dict | None = None, **options
) -> tuple[PeftModel, dict[str, Tensor]]:
    """A fresh adapter on a tiny model, in eval mode; ``base`` are options of :func:`build`."""
    task = task or natural_task(family)
    model, inputs = build(family, task, **(base or {}))
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        return get_peft_model(model, config_for(method, task_type=task, **options)).eval(), inputs


def shared_by_hand(layer: SharedLinear, adapter: str = "default") -> tuple[Tensor, Tensor, Tensor]:
    """Left side (I, r), the product of the two small cores (r, r) and right side (r, O) that a layer uses."""
    seat = layer.placements[adapter].seat
    parts, n, rank = list(layer.holders[adapter].loretta_shared_train[adapter]), len(seat.train.left), seat.train.rank
    of_layer, of_projection = (part.view(-1, rank, rank) for part in parts[n : n + 2])
    left, right = parts[seat.left].view(-1, rank), parts[n + 2 + seat.right].view(rank, -1)
    return left, of_layer[seat.layer] @ of_projection[seat.projection], right


def take_reference(model: PeftModel) -> None:
    """As TRL's DPO, GRPO, RLOO and KTO: what has ``.default.`` in its name is copied to an adapter named ``ref``."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")


def trained(model: PeftModel, seed: int = 1, scale: float = 0.1) -> PeftModel:
    """Noise on everything that trains: no core, bias or norm keeps a value that it could have got by default.

    The updates become as large as the weights of the tiny models. With noise twice as large they would be five times
    those weights, and a whole model would make ten to a hundred times as much of each rounding.
    """
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad], seed=seed, scale=scale)
    return model


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def layers_of(model: nn.Module) -> list[LorettaLayer]:
    return [module for module in model.modules() if isinstance(module, LorettaLayer)]


def replica_of(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate, without its transfer to a GPU."""
    copied = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(copied, name, None if parameter is None else parameter.detach().clone())
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica_of(child)
    return copied
