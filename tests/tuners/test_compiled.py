"""torch.compile takes an adapted model as one graph, and computes what the model computes without it."""

import shutil

import pytest
import torch
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from tuners.families import logits, loss_of
from tuners.matrix import options_for, wrapped
from tuners.wrapped import every_method, trainable, trained

from loretta import PeftModel

# one layer is enough: compiling takes seconds
SMALL = {
    "gpt2": {"n_layer": 1},
    "llama": {"num_hidden_layers": 1},
    "bert": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
    "modernbert": {"num_hidden_layers": 1},
    "deberta-v2": {"num_hidden_layers": 1},
    "mlp": {},
}
CASES = [
    ("gpt2", "rep"),
    ("llama", "rep"),
    ("llama", "adp"),
    ("bert", "rep"),
    ("t5", "adp"),
    ("modernbert", "adp"),
    ("deberta-v2", "rep"),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(family: str, method: str, **options) -> tuple[PeftModel, dict[str, Tensor]]:
    model, inputs = wrapped(family, method, base=SMALL[family], **options)
    return trained(model), inputs


def step(model: nn.Module, owner: PeftModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of everything that trains."""
    owner.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in trainable(owner).items()}


def assert_equal(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_near("loss", got[0], expected[0])
    assert_gradients_near(got[1], expected[1])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_one_graph_with_equal_gradients(family, method):
    model, inputs = small(family, method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(step(compiled, model, inputs), step(model, model, inputs))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # inductor's own imports
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++ on a CPU, and there is no compiler")
def test_the_default_backend():
    model, inputs = small("mlp", "rep")
    compiled = torch.compile(model, fullgraph=True)
    assert_equal(step(compiled, model, inputs), step(model, model, inputs))


@every_method
def test_switching_adapters_is_seen(method):
    model, inputs = small("mlp", method)
    model.add_adapter("other", options_for("mlp", method, tensor_rank=2))
    model.set_adapter("other")
    trained(model, seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("other", "default"):
        model.set_adapter(name)
        assert_near(name, logits(compiled, inputs), logits(model, inputs))
    with model.disable_adapter():
        assert_near("base", logits(compiled, inputs), logits(model.get_base_model(), inputs))


def test_merging_is_seen():
    model, inputs = small("mlp", "rep")
    expected = logits(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (model.merge_adapter, model.unmerge_adapter):
        assert_near("before", logits(compiled, inputs), expected)
        change()
        assert_near("after", logits(compiled, inputs), expected)
