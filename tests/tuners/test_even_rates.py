"""One learning rate for every rank: larger cores and a smaller scale, which is a rate for each core."""

import json

import pytest
import torch
from draws import seed_torch, seeded
from peft import PeftModel
from tolerances import assert_near
from torch import nn
from tuners.families import build
from tuners.wrapped import layers_of

from loretta import LorettaAdpConfig, LorettaRepConfig, get_peft_model

# of a layer 24 -> 32 with two modes a side: each core's numbers, and how many of a rank it sums beside those of compact
PLAN = {"r": 6, "tensor_rank": 6, "modes_per_side": 2, "lora_alpha": 12, "target_modules": ["lin"]}


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 32).double()

    def forward(self, x):
        return self.lin(x)


def wrapped(**options):
    seed_torch(0)
    model = get_peft_model(Single(), LorettaRepConfig(**PLAN, **options), autocast_adapter_dtype=False).double()
    return model, model.get_base_model().lin


def cores(layer):
    return [core for part in (layer.loretta_rep_down, layer.loretta_rep_up) for core in part["default"]]


def factors(layer) -> list[float]:
    """By the shapes: beside 4 numbers within a side; at the bottleneck all 6 that the second train sums."""
    down, up = ([core.shape[0] / 4 if core.shape[0] > 1 else 1 for core in layer_part] for layer_part in parts(layer))
    return [*down, 6 * up[0], *up[1:]]


def parts(layer):
    return [list(part["default"]) for part in (layer.loretta_rep_down, layer.loretta_rep_up)]


@pytest.mark.parametrize("start", ["zero", "gaussian", "denoised"])
def test_nothing_else_is_computed_at_the_start(start):
    (_, plain), (_, even) = wrapped(init_weights=start), wrapped(init_weights=start, even_rates=True)
    expected = factors(plain)
    assert sum(factor > 1 for factor in expected) >= 3
    for small, large, factor in zip(cores(plain), cores(even), expected, strict=True):
        assert_near("core", large, factor * small)
    if start == "gaussian":
        assert_near("update", even.get_delta_weight("default"), plain.get_delta_weight("default"))
    else:
        assert even.get_delta_weight("default").abs().max() <= 1e-15


def test_each_core_has_a_rate_of_its_own():
    """Adam's first step is its rate wherever a gradient is: so the cores of both come apart by their factors alone."""
    rate, moved = 1e-3, []
    for even in (False, True):
        model, layer = wrapped(init_weights="gaussian", even_rates=even)
        before = [core.clone() for core in cores(layer)]
        x = torch.randn(7, 24, generator=seeded(1), dtype=torch.float64)
        model(x).square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.AdamW(trained, lr=rate, weight_decay=0, eps=1e-30).step()
        larger = factors(layer) if even else [1.0] * len(before)
        moved.append([(now - then) / k for now, then, k in zip(cores(layer), before, larger, strict=True)])
    for plain, even, factor in zip(*moved, factors(layer), strict=True):
        assert_near("step", even, plain / factor)
        assert plain.abs().max().item() == pytest.approx(rate, rel=1e-6)


def test_clipping_and_decay_see_the_larger_numbers():
    gradients, shares = [], []
    for even in (False, True):
        model, layer = wrapped(init_weights="gaussian", even_rates=even)
        trains = [part["default"] for part in (layer.loretta_rep_down, layer.loretta_rep_up)]
        model(torch.randn(7, 24, generator=seeded(1), dtype=torch.float64)).square().sum().backward()
        gradients.append([gradient for train in trains for gradient in train.split(train.values.grad)])
        before = [train.values.detach().clone() for train in trains]
        for train in trains:
            train.values.grad.zero_()
        torch.optim.AdamW([train.values for train in trains], lr=0.1, weight_decay=0.5).step()
        shares += [train.values / held for train, held in zip(trains, before, strict=True)]
    for plain, even, factor in zip(*gradients, factors(layer), strict=True):
        assert_near("gradient", even, plain / factor)
    for share in shares:
        assert_near("share", share, torch.full_like(share, 0.95))


def test_compacts_own_ranks_keep_their_rates_and_higher_ones_have_it():
    """So a default changes nothing of what was measured."""
    for options, same in (({}, True), ({"r": 4}, False), ({"tensor_rank": 8, "lora_alpha": 16}, False)):
        models = []
        for even in ({}, {"even_rates": False}):
            seed_torch(0)
            base, _ = build("bert", "SEQ_CLS", hidden_size=96, intermediate_size=192)
            config = LorettaRepConfig.compact(task_type="SEQ_CLS", train_norms=False, **options, **even)
            models.append(get_peft_model(base, config))
        pairs = list(zip(*(layers_of(model) for model in models), strict=True))
        alike = [torch.equal(a.loretta_rep_up["default"].values, b.loretta_rep_up["default"].values) for a, b in pairs]
        alike += [
            torch.equal(a.loretta_rep_down["default"].values, b.loretta_rep_down["default"].values) for a, b in pairs
        ]
        assert all(alike) is same
        assert all(a.scaling["default"] == b.scaling["default"] for a, b in pairs) is same


def test_a_saved_adapter_keeps_what_it_has(tmp_path):
    x = torch.randn(5, 24, dtype=torch.float64, generator=seeded(2))
    for even in (True, False):
        model, layer = wrapped(init_weights="gaussian", even_rates=even)
        model.save_pretrained(tmp_path / str(even))
        file = tmp_path / str(even) / "adapter_config.json"
        config = json.loads(file.read_text())
        if not even:
            del config["even_rates"]  # as one of before the option
            file.write_text(json.dumps(config))
        base = Single()
        base.lin.load_state_dict(layer.base_layer.state_dict())
        again = PeftModel.from_pretrained(base, tmp_path / str(even), autocast_adapter_dtype=False).double()
        assert again.get_base_model().lin.scaling == layer.scaling
        with torch.no_grad():
            assert (again(x) - model(x)).norm() <= 1e-6 * model(x).norm()


# of an adapter of width 24 and a bottleneck of 6 with three modes each, by the ranks of 8 that the cores sum beside 4
ADAPTER = {"bottleneck_size": 6, "tensor_rank": 8, "target_modules": ["lin"]}
LARGER = [1, 2, 2, 6, 2, 2]


class Square(Single):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 24).double()


def adapted(even, **options):
    seed_torch(0)
    config = LorettaAdpConfig(**{**ADAPTER, "even_rates": even, **options})
    model = get_peft_model(Square(), config, autocast_adapter_dtype=False).double()
    layer = model.get_base_model().lin
    for bias in layer.loretta_adp_bias["default"].values():
        nn.init.normal_(bias, generator=seeded(3))
    return model, layer


def adapter_cores(layer):
    return [core for part in (layer.loretta_adp_down, layer.loretta_adp_up) for core in part["default"]]


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("start", ["zero", "gaussian", "denoised"])
def test_an_adapter_of_larger_cores_computes_the_same(start, act):
    x = torch.randn(5, 24, dtype=torch.float64, generator=seeded(2))
    (plain_model, plain), (even_model, even) = (
        adapted(even, init_weights=start, non_linearity=act) for even in (False, True)
    )
    for small, large, factor in zip(adapter_cores(plain), adapter_cores(even), LARGER, strict=True):
        assert_near("core", large, factor * small)
    assert_near("output", even_model(x), plain_model(x))
    if start == "denoised":
        return  # the start is subtracted
    cores = adapter_cores(even)
    down, up = (torch.einsum("aib,bjc,ckd->ijk", *three) for three in (cores[:3], cores[3:]))
    biases = even.loretta_adp_bias["default"]
    y = even.base_layer(x)
    hidden = getattr(nn.functional, act)(y @ down.reshape(24, 6) / 4 + biases["down"])
    assert_near("by hand", even_model(x), y + hidden @ up.reshape(6, 24) / 24 + biases["up"])


def test_each_core_of_an_adapter_has_a_rate_of_its_own_and_its_biases_keep_theirs():
    rate, moved = 1e-3, []
    for even in (False, True):
        model, layer = adapted(even, init_weights="gaussian", non_linearity="gelu")
        numbers = [*adapter_cores(layer), *layer.loretta_adp_bias["default"].values()]
        before = [value.detach().clone() for value in numbers]
        model(torch.randn(7, 24, generator=seeded(1), dtype=torch.float64)).square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.AdamW(trained, lr=rate, weight_decay=0, eps=1e-30).step()
        now = [*adapter_cores(layer), *layer.loretta_adp_bias["default"].values()]
        larger = [*(LARGER if even else [1.0] * 6), 1.0, 1.0]
        moved.append([(a - b) / k for a, b, k in zip(now, before, larger, strict=True)])
    for plain, even, factor in zip(*moved, [*LARGER, 1, 1], strict=True):
        assert_near("step", even, plain / factor)
        assert plain.abs().max().item() == pytest.approx(rate, rel=1e-6)


def test_adapters_with_and_without_it_lie_on_one_model(tmp_path):
    """Trains of one shape are contracted together: those that are divided, and those that are not, are not."""
    x = torch.randn(6, 24, dtype=torch.float64, generator=seeded(2))
    expected = {}
    for even in (False, True):
        model, layer = adapted(even, init_weights="gaussian")
        model.save_pretrained(tmp_path / str(even))
        expected[str(even)] = model(x).detach()
    base = Square()
    base.lin.load_state_dict(layer.base_layer.state_dict())
    both = PeftModel.from_pretrained(base, tmp_path / "True", "True", autocast_adapter_dtype=False).double().eval()
    both.load_adapter(tmp_path / "False", "False", autocast_adapter_dtype=False)
    both.double()
    with torch.no_grad():
        for name, wanted in expected.items():
            both.set_adapter(name)
            assert (both(x) - wanted).norm() <= 1e-6 * wanted.norm()
        names = ["True", "False"] * 3
        rows = torch.stack([expected[name][k] for k, name in enumerate(names)])
        assert (both(x, adapter_names=names) - rows).norm() <= 1e-6 * rows.norm()
        both.base_model.set_adapter(["True", "False"])
        together = expected["True"] + expected["False"] - layer.base_layer(x)
        assert (both(x) - together).norm() <= 1e-6 * together.norm()


def test_dense_adapters_have_no_cores_to_give_a_rate():
    with pytest.raises(ValueError, match="even_rates gives each core of a train its rate"):
        LorettaAdpConfig(dense=True, even_rates=True)
