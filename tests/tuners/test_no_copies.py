"""A call takes nothing from the CPU to its device: a CUDA graph could not hold that, and a CPU would wait for it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tuners.families import build
from tuners.wrapped import CONFIGS, config_for

from loretta import get_peft_model
from loretta.layers import fused
from loretta.tuners import calls, contraction
from loretta.tuners.contraction import Contraction
from loretta.tuners.layer import LorettaLayer

DEVICE = torch.device("meta")  # stands for any that is not the CPU
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "denoised": {"init_weights": "denoised"},
    "scaled": {"lora_alpha": 5},
}


class NothingFromTheCPU(TorchDispatchMode):
    """A number that is set (``x[0, 1] = 2``) is a tensor first, which torch puts on the CPU where x is on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        assert devices <= {DEVICE.type}, f"{func} is between {devices}"
        assert func is not torch.ops.aten.scalar_tensor.default, "a number is set"
        return out


def test_the_mode_sees_what_it_is_to_see():
    x = torch.zeros(2, 3, device=DEVICE)
    with NothingFromTheCPU():
        x[0, 1].fill_(2)
        with pytest.raises(AssertionError, match="is set"):
            x[0, 1] = 2
        with pytest.raises(AssertionError, match="lift_fresh"):
            torch.tensor([1.0])


@pytest.mark.parametrize("trains", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("one_matrix", [False, True], ids=["two halves", "one matrix"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", CONFIGS)
def test_layers_and_the_joint_contraction(method, options, one_matrix, trains, monkeypatch):
    own = {key: value for key, value in OPTIONS[options].items() if method != "adp" or key != "lora_alpha"}
    base, _ = build("llama", "CAUSAL_LM")
    model = get_peft_model(base, config_for(method, task_type="CAUSAL_LM", **own)).to(DEVICE)
    monkeypatch.setattr(calls, "is_recorded", lambda: False)  # the mode looks like a recording
    monkeypatch.setattr(fused, "one_matrix_pays", lambda *_: one_matrix)
    monkeypatch.setattr(contraction, "_are_plain", lambda tensors: True)
    layers = [module for module in model.modules() if isinstance(module, LorettaLayer)]
    joint = Contraction.of(base)
    xs = [torch.zeros(2, 3, layer.in_features, device=DEVICE, requires_grad=trains) for layer in layers]
    joint.contract()  # what is made once is there
    with NothingFromTheCPU(), torch.set_grad_enabled(trains):
        factors = joint.contract()
        outputs = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        found = [*outputs, *(factor for each in factors.values() for factor in each)]
        assert len(factors) == sum(layer.n_pairs["default"] for layer in layers)
        if trains:
            torch.stack([value.sum() for value in found if value.requires_grad]).sum().backward()
