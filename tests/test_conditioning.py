"""What benchmarks/conditioning.py says of cores, against explicit Jacobians of the weights in float64."""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest
import torch
from draws import seeded
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import conditioning

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}


@pytest.fixture(scope="module", params=["rep", "LoRA r=8", "compact", "shared r=2"])
def adapted(request):
    """The updates of a small model with random cores and gradients, the explicit Jacobian by parameter, and steps."""
    generator = seeded(0)
    base = BertForSequenceClassification(BertConfig(**SIZES))
    model = get_peft_model(base, conditioning.CONFIGS[request.param]()).double()
    updates = conditioning.updates_of(model)
    parameters = {id(core.parameter): core.parameter for update in updates for core in update.cores}
    for parameter in parameters.values():
        parameter.data.normal_(generator=generator)
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    weights = torch.cat([layer.get_delta_weight("default").flatten() for layer in layers])
    jacobians = {}
    for key, parameter in parameters.items():
        rows = torch.autograd.grad(
            weights, parameter, torch.eye(len(weights)).double(), retain_graph=True, is_grads_batched=True
        )
        jacobians[key] = rows[0].flatten(1)
    for update in updates:
        update.weight.grad = torch.randn(update.weight.shape, generator=generator, dtype=torch.float64)
    wanted = torch.cat([update.weight.grad.flatten() for update in updates])
    for key, parameter in parameters.items():
        parameter.grad = (wanted @ jacobians[key]).view_as(parameter)
    steps = {
        key: torch.randn(p.shape, generator=generator, dtype=torch.float64).mul_(p.grad.abs())
        for key, p in parameters.items()
    }
    return updates, jacobians, wanted, steps


def columns(core, jacobian):
    """What each number of a core does to all weights: (weights, n, R S)."""
    numbers = torch.arange(jacobian.shape[1], dtype=torch.float64).view_as(core.parameter)
    return jacobian[:, conditioning.by_pair(core(numbers)).long()]


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_the_gram_matrix_of_a_core_is_that_of_its_explicit_jacobian(adapted):
    updates, jacobians, _, _ = adapted
    found = conditioning.grams(updates)
    for core in [core for update in updates for core in update.cores]:
        each = columns(core, jacobians[id(core.parameter)])
        n = each.shape[1]
        near(torch.einsum("wna,wmb->nmab", each, each), torch.einsum("nm,ab->nmab", torch.eye(n), found[core.key]))


def test_what_is_said_of_cores_is_what_their_jacobians_say(adapted):
    updates, jacobians, wanted, steps = adapted
    used, moved, idle = defaultdict(list), defaultdict(list), defaultdict(list)
    for core in {core.key: core for update in updates for core in update.cores}.values():
        each = columns(core, jacobians[id(core.parameter)]).flatten(1)
        change = each @ conditioning.by_pair(core(steps[id(core.parameter)])).flatten()
        best = each @ torch.linalg.lstsq(each, wanted, driver="gelsd").solution
        moved[core.role].append(float(change.norm()))
        used[core.role].append(float(wanted @ change / change.norm() / best.norm()))
        idle[core.role].append(1 - int(torch.linalg.matrix_rank(each)) / each.shape[1])
    said = conditioning.of_cores(updates, steps)
    for role in used:
        assert said[role]["adam"] == pytest.approx(median(moved[role]), rel=1e-3)
        assert said[role]["used"] == pytest.approx(median(used[role]), rel=1e-3, abs=1e-3)
        assert said[role]["idle"] == pytest.approx(median(idle[role]), rel=1e-3)
        assert said[role]["condition"] >= 1


def test_the_cosine_of_a_step_and_the_largest_are_those_of_the_whole_jacobian(adapted):
    updates, jacobians, wanted, steps = adapted
    whole = torch.cat(list(jacobians.values()), dim=1)
    change = whole @ torch.cat([steps[key].flatten() for key in jacobians])
    best = whole @ torch.linalg.lstsq(whole, wanted, driver="gelsd").solution
    said = conditioning.of_updates(updates, steps)
    assert said["cosine"] == pytest.approx(float(wanted @ change / change.norm() / wanted.norm()), rel=1e-3, abs=1e-4)
    if said["reach"] is not None:  # of cores that modules share it is not computed
        assert said["reach"] == pytest.approx(float(best.norm() / wanted.norm()), rel=1e-3)


def test_even_directions_move_the_update_alike(adapted):
    updates, _, _, _ = adapted
    found = conditioning.grams(updates)
    for key, root in conditioning.roots(updates).items():
        gram = found[key] / torch.linalg.eigvalsh(found[key]).mean()
        values = torch.linalg.eigvalsh(root @ gram @ root)
        floored = torch.linalg.eigvalsh(gram) < conditioning.FLOOR
        near(values[~floored], torch.ones_like(values[~floored]))
        assert bool((values[floored] < 1).all())
