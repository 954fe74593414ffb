"""Two layers of one size with trained adapters, and what they compute by the dense matrices of their cores."""

import os
import warnings
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from tt.trains import oracle, randn
from tuners.wrapped import Two, config_for, layers_of, shared_by_hand, trained

from loretta import get_peft_model
from loretta.layers.shared import take_apart
from loretta.tuners import joint
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.shared import SharedLinear

SCALE = 1.5


def adapted(method: str, **options) -> nn.Module:
    scale = {"scaling": SCALE} if method == "adp" else {"lora_alpha": SCALE * 3}
    model = get_peft_model(Two(), config_for(method, target_modules=["one", "two"], **scale, **options))
    return trained(model).double().eval()


def cores_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(".values") and p.requires_grad]


def by_hand(layer: LorettaLayer, x: Tensor, adapter: str = "default") -> Tensor:
    """One layer with the dense matrices that its cores spell now."""
    method, y = ("rep" if hasattr(layer, "loretta_rep_down") else "adp"), layer.get_base_layer()(x)
    if isinstance(layer, SharedLinear):
        left, inner, right = shared_by_hand(layer, adapter)
        return y + SCALE * (x @ left @ inner @ right)
    trains = [getattr(layer, f"loretta_{method}_{part}")[adapter] for part in ("down", "up")]
    down, up = (oracle(list(cores), cores.shape) for cores in trains)
    if method == "rep":
        return y + SCALE * (x @ down @ up)
    biases = layer.loretta_adp_bias[adapter]
    return y + SCALE * (torch.relu(y @ down + biases["down"]) @ up + biases["up"])


def expected(model: nn.Module, x: Tensor) -> Tensor:
    one, two = layers_of(model)
    return by_hand(two, torch.tanh(by_hand(one, x)))


X = randn(3, 12, seed=5)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def assert_fresh(model: nn.Module) -> None:
    """The model computes what its cores say now, in every mode, and so do its gradients."""
    assert_near("without gradients", answer(model), expected(model, X))
    with torch.inference_mode():
        assert_near("in inference mode", model(X), expected(model, X))
    got, ref = model(X), expected(model, X)
    assert_near("with gradients", got, ref)
    weights, cores = randn(*ref.shape, seed=7), dict(enumerate(cores_of(model)))
    grads = [torch.autograd.grad((out * weights).sum(), list(cores.values())) for out in (got, ref)]
    assert_gradients_near(*(dict(zip(cores, each, strict=True)) for each in grads))


def add_to_data(model: nn.Module) -> None:
    for values in cores_of(model):
        values.data.add_(randn(*values.shape, seed=9), alpha=0.1)


def copy_average(model: nn.Module) -> None:  # as the moving averages of diffusers and others do
    for values in cores_of(model):
        values.data.copy_(0.9 * values.data)


def write_in_another_process(model: nn.Module) -> None:
    model.share_memory()
    views = [values.detach().numpy() for values in cores_of(model)]
    answer(model)
    with warnings.catch_warnings(action="ignore"):  # of threads, which the child does not use
        child = os.fork()
    if child == 0:
        for view in views:
            view *= 2
        os._exit(0)
    os.waitpid(child, 0)


def before_every_train(patch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Have something done before the joint contraction comes to a train; a shared one counts for its two sides."""

    def then(function: Callable) -> Callable:
        def call(*args):
            do()
            return function(*args)

        return call

    patch.setattr(joint, "halves", then(joint.halves))
    patch.setattr("loretta.tuners.shared.layer.take_apart", then(then(take_apart)))
