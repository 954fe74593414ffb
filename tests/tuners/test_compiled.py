"""torch.compile takes an adapted model as one graph, and computes what the model computes without it."""

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
import torch
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint
from tuners.contracted import apart
from tuners.families import logits, loss_of
from tuners.matrix import base_of, options_for, wrapped
from tuners.wrapped import Two, config_for, every_method, one_method, trainable, trained

from loretta import PeftModel, get_peft_model, hotswap_adapter, serving
from loretta.layers import fused, stacks
from loretta.tuners import calls
from loretta.tuners.layer import LorettaLayer

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
# Dynamo meets each family; AOTAutograd sees of it nothing but the graph, so two families are enough there.
CASES = [
    ("gpt2", "rep", "eager"),
    ("llama", "rep", "aot_eager"),
    ("bert", "adp", "aot_eager"),
    ("t5", "adp", "eager"),
    ("modernbert", "adp", "eager"),
    ("deberta-v2", "rep", "eager"),
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


@pytest.mark.sampled("backend", "method")
@pytest.mark.parametrize(("family", "method", "backend"), CASES)
def test_one_graph_with_equal_gradients(family, method, backend):
    model, inputs = small(family, method)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_equal(step(compiled, model, inputs), step(model, model, inputs))


def calls_of_bottleneck(monkeypatch) -> list:
    """Each train as one matrix, as on a GPU, where a graph holds the ReLU and the bias in functions of ours."""
    monkeypatch.setattr(fused, "one_matrix_pays", lambda *_: True)
    found: list = []
    apply = stacks._Bottleneck.apply
    monkeypatch.setattr(stacks._Bottleneck, "apply", lambda *args: found.append(args) or apply(*args))
    return found


def test_each_train_as_one_matrix_without_biases(monkeypatch):
    calls_of_it = calls_of_bottleneck(monkeypatch)
    model, inputs = small("mlp", "adp", train_bias=False)
    got = step(torch.compile(model, fullgraph=True, backend="aot_eager"), model, inputs)
    assert calls_of_it
    assert_equal(got, step(model, model, inputs))


@pytest.mark.sampled(apart=True)
@pytest.mark.parametrize(("method", "as_one"), [("rep", False), ("adp", False), ("adp", True)])
def test_the_backward_pass_is_handed_stacks_and_no_views_of_them(method, as_one, monkeypatch):
    """What is handed on costs the CPU of a step, each tensor the same."""
    calls_of_it = calls_of_bottleneck(monkeypatch)
    monkeypatch.setattr(fused, "one_matrix_pays", lambda *_: as_one)
    model, inputs = small("mlp", method)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append(graph)
        return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

    partition = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    got = step(torch.compile(model, fullgraph=True, backend=backend), model, inputs)
    assert bool(calls_of_it) == as_one
    assert_equal(got, step(model, model, inputs))

    def is_part(node: torch.fx.Node) -> bool:
        aten = torch.ops.aten
        view = node.target in (aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default)
        return node.target is aten.as_strided.default or (view and is_part(node.args[0]))

    forward, backward = graphs
    (handed,) = (node.args[0] for node in forward.graph.nodes if node.op == "output")
    assert any(map(is_part, backward.graph.nodes))
    assert not any(is_part(node) for node in handed if isinstance(node, torch.fx.Node))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # inductor's own imports
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++ on a CPU, and there is no compiler")
def test_the_default_backend():
    model, inputs = small("mlp", "rep")
    # in this process: those that inductor would start import torch; and without a try of what the CPU says that it has
    options = {"compile_threads": 1, "cpp.vec_isa_ok": True}
    compiled = torch.compile(model, fullgraph=True, options=options)
    assert_equal(step(compiled, model, inputs), step(model, model, inputs))


def test_merging_is_seen():
    model, inputs = small("mlp", "rep")
    expected = logits(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (model.merge_adapter, model.unmerge_adapter):
        assert_near("before", logits(compiled, inputs), expected)
        change()
        assert_near("after", logits(compiled, inputs), expected)


class Counted:
    """A model compiled by a backend that counts what it compiles, and the runs of that."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs, self.runs = 0, 0
        torch.compiler.reset()
        self.model = torch.compile(model, backend=self.compile)

    def compile(self, graph: torch.fx.GraphModule, _) -> Callable:
        self.graphs += 1
        self.inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run

    def __call__(self, *args, **kwargs):
        """The result, of compiled code in one piece."""
        before = self.runs
        result = self.model(*args, **kwargs)
        assert self.runs == before + 1, f"it ran {self.runs - before} compiled graphs"
        return result


def two_adapters(method: str) -> tuple[PeftModel, dict[str, Tensor]]:
    model, inputs = small("mlp", method)
    model.add_adapter("other", options_for("mlp", method))
    model.set_adapter("other")
    trained(model, seed=2).set_adapter("default")
    return model, inputs


every_mode = pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
one_mode = lambda test: pytest.mark.sampled("method", "trains")(every_method(every_mode(test)))  # noqa: E731


def assert_same(compiled: Counted, model: PeftModel, inputs: dict[str, Tensor], *, trains: bool) -> Tensor:
    """The compiled model gives what the model gives, and does so compiled. Returns the loss, or the logits."""
    if trains:
        got = step(compiled, model, inputs)
        assert_equal(got, step(model, model, inputs))
        return got[0]
    answer = logits(compiled, inputs)
    assert_near("logits", answer, logits(model, inputs))
    return answer


@one_mode
def test_switching_compiles_once_for_each_adapter(method, trains):
    model, inputs = two_adapters(method)
    compiled = Counted(model)
    for turn in range(5):  # the third would compile again where nothing is kept
        model.set_adapter(["default", "other"][turn % 2])
        assert_same(compiled, model, inputs, trains=trains)
    assert compiled.graphs == 2


@one_mode
def test_two_active_adapters_have_each_their_own_scale(method, trains):
    """Their trains are equal, and are contracted as one group."""
    model, inputs = two_adapters(method)
    for layer in (module for module in model.modules() if isinstance(module, LorettaLayer)):
        layer.scaling["other"] *= 3
    model.base_model.set_adapter(["default", "other"])
    compiled = Counted(model)
    assert_same(compiled, model, inputs, trains=trains)
    assert compiled.graphs == 1


@one_method
def test_disabling_compiles_once_more(method):
    model, inputs = small("mlp", method)
    compiled, base = Counted(model), base_of("mlp")[0]
    for _ in range(3):
        with model.disable_adapter():
            assert_near("base", logits(compiled, inputs), logits(base, inputs))
        assert_near("adapted", logits(compiled, inputs), logits(model, inputs))
    assert compiled.graphs == 2


@one_mode
def test_other_models_and_other_threads_compile_nothing(method, trains):
    model, inputs = small("mlp", method)
    compiled = Counted(model)
    for _ in range(2):
        assert_same(compiled, model, inputs, trains=trains)
        small("mlp", method)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(assert_same, compiled, model, inputs, trains=trains).result()
    assert compiled.graphs == 1


@one_mode
def test_another_scale_compiles_nothing(method, trains, tmp_path):
    option = "lora_alpha" if method != "adp" else "scaling"
    for scale in (2, 4, 8):
        small("mlp", method, **{option: scale})[0].save_pretrained(tmp_path / str(scale))
    model, inputs = small("mlp", method, init_weights="denoised" if trains else "zero")
    compiled, seen = Counted(model), []
    for scale in (2, 4, 8):
        if trains:
            for module in model.modules():
                if isinstance(module, LorettaLayer):
                    module.scaling["default"] = float(scale)
        else:
            hotswap_adapter(model, tmp_path / str(scale))
        seen.append(assert_same(compiled, model, inputs, trains=trains))
    layers = [module for module in model.modules() if isinstance(module, LorettaLayer)]
    layers[-1].scaling["default"] = 3.0  # of one layer alone
    seen.append(assert_same(compiled, model, inputs, trains=trains))
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))
    assert compiled.graphs == 1
    if method != "adp" or not trains:  # beside a start that is subtracted a bias gets the scale on its own
        # the scales of equal layers are one input
        sizes = {(layer.in_features, layer.out_features) for layer in layers}
        assert len([name for name in compiled.inputs if "scal" in name]) <= len(sizes) < len(layers)


@one_method
def test_what_is_compiled_while_serving_holds_the_contraction(method):
    model, inputs = small("mlp", method)
    compiled = Counted(model)
    with serving(model):
        logits(model, inputs)
        assert_near("while serving", logits(compiled, inputs), logits(model, inputs))
    for values in (p for name, p in trainable(model).items() if name.endswith(".values")):
        values.data.mul_(2)
    assert_near("afterwards", logits(compiled, inputs), logits(model, inputs))
    assert compiled.graphs == 1


# A graph that begins behind another asks its input for a gradient.
warned_of_by_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")


class Breaking(nn.Module):
    """Two layers, and between them something that no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        torch._dynamo.graph_break()
        return self.two(y)


@warned_of_by_dynamo
@one_method
def test_a_graph_that_breaks_leaves_nothing_for_other_threads(method):
    options = {"target_modules": ["one", "two"], "tensor_rank": 2}
    model, x = trained(get_peft_model(Breaking(), config_for(method, **options))), torch.ones(3, 12)
    seen: list[int] = []
    look = torch.compiler.disable(lambda *_: seen.append(len(calls._traced)))
    model.get_base_model().two.register_forward_pre_hook(look)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        got, expected = compiled(x), model(x)
        assert_near("output", got, expected)
        each = [torch.autograd.grad(out.square().sum(), list(trainable(model).values())) for out in (got, expected)]
        assert_gradients_near(*(dict(zip(trainable(model), grads, strict=True)) for grads in each))
        for values in trainable(model).values():
            values.data.mul_(0.9)
    assert not any(seen)


@warned_of_by_dynamo
@one_method
def test_the_first_call_may_be_that_of_compiled_blocks(method):
    model, inputs = wrapped("llama", method, base={"use_cache": False}, train_norms=False)
    model.enable_input_require_grads()
    eager = copy.deepcopy(trained(model))
    expected = step(eager, eager, inputs)
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager", fullgraph=True)
    assert_equal(step(model, model, inputs), expected)


@warned_of_by_dynamo
@one_method
def test_compiled_blocks_share_their_graphs(method):
    """As regional compilation has it: a block contracts its own trains, and its graph serves the others too.

    Of a shared train each block takes another core, so it has a graph of its own.
    """
    model, inputs = wrapped("llama", method, base={"num_hidden_layers": 3, "use_cache": False}, train_norms=False)
    model.enable_input_require_grads()  # else the first block's input wants no gradient, and its graph is another
    expected = step(trained(model), model, inputs)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        assert_equal(step(model, model, inputs), expected)
    assert stats["unique_graphs"] == before + (3 if method == "shared" else 1)


class Checkpointed(Two):
    """Each of its layers is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(checkpoint(self.one, x, use_reentrant=False))
        return checkpoint(self.two, once, use_reentrant=False)


def test_a_shared_train_within_checkpoints():
    """torch compiles no checkpoints that share an operation with several outputs, as ``unbind``."""
    model = trained(get_peft_model(Checkpointed(), config_for("shared", target_modules=["one", "two"])))
    x = torch.randn(3, 12)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        with apart(model):  # as behind a break in the graph, which transformers' own checkpoints make
            run(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert_gradients_near(gradients[1], gradients[0])
