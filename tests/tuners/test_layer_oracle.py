"""Both layers against plain matrix products with the dense matrices that the trains spell, values and gradients.

Axes: B batch, I input features, O output features, b bottleneck.
"""

import pytest
import torch
from draws import seed_torch
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D
from tt.trains import oracle, randn
from tuners.families import build, randomise
from tuners.wrapped import config_for, every_method, own_trains, shared_by_hand

from loretta import get_peft_model
from loretta.layers import fused
from loretta.layers.trains import Cores
from loretta.tuners.layer import LorettaLayer

SIZES = {"even": (24, 32), "odd": (15, 10), "padded primes": (67, 131), "one feature": (1, 12), "narrow": (12, 2)}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


class Single(nn.Module):
    """One linear layer in float64 under the name ``lin``."""

    def __init__(self, size: tuple[int, int], *, bias: bool = True, conv1d: bool = False) -> None:
        super().__init__()
        n_in, n_out = size
        self.lin = Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out, bias)
        self.double()
        randomise(self.parameters(), seed=3)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.lin(x, **kwargs)


def wrapped(method: str, size: tuple[int, int], *, bias: bool = True, conv1d: bool = False, **options):
    """A model of one adapted layer with random cores and biases, and the layer."""
    base = Single(size, bias=bias, conv1d=conv1d)
    model = get_peft_model(base, config_for(method, target_modules=["lin"], **options)).eval()
    layer = model.get_base_model().lin
    randomise([p for p in model.parameters() if p.requires_grad], seed=4, scale=0.7)
    return model, layer


def dense(cores: Cores) -> Tensor:
    return oracle(list(cores), cores.shape)


def trains(layer, method: str, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """The dense down (I, b) and up (b, O) of one adapter."""
    if method == "shared":
        left, inner, right = shared_by_hand(layer, adapter)
        return left @ inner, right
    return tuple(dense(getattr(layer, f"loretta_{method}_{part}")[adapter]) for part in ("down", "up"))


def dense_base(layer, x: Tensor) -> Tensor:
    base = layer.get_base_layer()
    weight = base.weight if isinstance(base, Conv1D) else base.weight.T
    return x @ weight + (0 if base.bias is None else base.bias)


def compare(got: Tensor, ref: Tensor, x: Tensor, model: nn.Module) -> None:
    """Values, and the gradients with respect to x and to everything that trains."""
    assert_near("y", got, ref)
    trained = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    assert sum(name.endswith(".values") for name in trained) == 2
    weights = randn(*ref.shape, seed=7)
    got_grads = torch.autograd.grad((got * weights).sum(), list(trained.values()))
    ref_grads = torch.autograd.grad((ref * weights).sum(), list(trained.values()))
    assert all(grad.any() for grad in ref_grads)
    assert_gradients_near(dict(zip(trained, got_grads, strict=True)), dict(zip(trained, ref_grads, strict=True)))


@every_size
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
@pytest.mark.parametrize("r", [2, 16])
def test_rep_is_the_updated_weight(size, kind, init_weights, r):
    model, layer = wrapped(
        "rep",
        size,
        bias=kind != "without bias",
        conv1d=kind == "conv1d",
        r=r,
        lora_alpha=7,
        init_weights=init_weights,
    )
    x = randn(2, 3, size[0], seed=5).requires_grad_()
    down_Ib, up_bO = trains(layer, "rep")
    change_IO = down_Ib @ up_bO
    if init_weights == "denoised":
        change_IO = change_IO - dense(layer.loretta_rep_start_down["default"]) @ dense(
            layer.loretta_rep_start_up["default"]
        )
    ref = dense_base(layer, x) + 7 / 3 * (x @ change_IO)
    compare(model(x), ref, x, model)


@every_size
@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
@pytest.mark.parametrize("kind", ["linear", "without biases", "conv1d"])
@pytest.mark.parametrize("non_linearity", ["gelu", "relu"])
def test_adp_is_a_bottleneck_with_biases(size, where, init_weights, kind, non_linearity):
    bias = kind != "without biases"
    model, layer = wrapped(
        "adp",
        size,
        bias=bias,
        conv1d=kind == "conv1d",
        train_bias=bias,
        bottleneck_size=12,
        non_linearity=non_linearity,
        scaling=0.3,
        insert_before=["lin"] if where == "before" else [],
        init_weights=init_weights,
    )
    act = ACT2FN[non_linearity]
    down_Hb, up_bH = trains(layer, "adp")
    biases = layer.loretta_adp_bias["default"] if bias else {"down": 0, "up": 0}

    def adapted(y: Tensor) -> Tensor:
        change = act(y @ down_Hb + biases["down"]) @ up_bH + biases["up"]
        if init_weights == "denoised":
            start = (dense(layer.loretta_adp_start_down["default"]), dense(layer.loretta_adp_start_up["default"]))
            change = change - act(y @ start[0]) @ start[1]
        return y + 0.3 * change

    x = randn(2, 3, size[0], seed=5).requires_grad_()
    ref = adapted(dense_base(layer, x)) if where == "after" else dense_base(layer, adapted(x))
    compare(model(x), ref, x, model)


@every_size
@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("bias", [True, False])
def test_adp_with_each_train_as_one_matrix(size, where, bias, monkeypatch):
    """As on a GPU outside of recorded graphs; see `fused.one_matrix_pays`."""
    monkeypatch.setattr(fused, "one_matrix_pays", lambda *_: True)
    options = {"insert_before": ["lin"]} if where == "before" else {}
    model, layer = wrapped("adp", size, train_bias=bias, bottleneck_size=12, scaling=0.3, **options)
    assert [len(factors) for factors in layer.contracted("default")] == [3]
    down_Hb, up_bH = trains(layer, "adp")
    biases = layer.loretta_adp_bias["default"] if bias else {"down": 0, "up": 0}

    def adapted(y: Tensor) -> Tensor:
        return y + 0.3 * (torch.relu(y @ down_Hb + biases["down"]) @ up_bH + biases["up"])

    x = randn(2, 3, size[0], seed=5).requires_grad_()
    ref = adapted(dense_base(layer, x)) if where == "after" else dense_base(layer, adapted(x))
    compare(model(x), ref, x, model)
    assert_near("the layer alone", layer(x), ref)
    with torch.no_grad():
        assert_near("without gradients", model(x), ref)


@pytest.mark.parametrize("rows", [1, 3])  # one row has kernels of its own
@pytest.mark.parametrize("method", ["rep", "adp"])
def test_the_fused_kernels_serve_without_gradients(method, rows, monkeypatch):
    """As decoding steps in a CUDA graph do; see `fused.pays`."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model, _ = wrapped(method, (67, 67))
    x = randn(rows, 67, seed=5)
    ref, model = model(x), model.float()
    monkeypatch.setattr(fused, "pays", lambda x_BI: True)
    with torch.no_grad():
        assert_near("y", model(x.float()), ref)


# Scaling


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora_alpha": 16, "tensor_rank": 5}, 3.2),
        ({"lora_alpha": 16, "tensor_rank": 8}, 2.0),
        ({"lora_alpha": 10, "tensor_rank": 4, "use_rslora": True}, 5.0),
        ({"lora_alpha": 10, "tensor_rank": 5, "alpha_pattern": {"lin": 20}}, 4.0),
        ({"lora_alpha": 12, "tensor_rank": 5, "rank_pattern": {"lin": 2}}, 6.0),
        ({"lora_alpha": 1, "rank_pattern": {"l.n": 9}, "alpha_pattern": {"li.*": 6}, "use_rslora": True}, 2.0),
    ],
)
def test_scaling_is_alpha_over_the_train_rank(options, expected):
    model, layer = wrapped("rep", (24, 32), **options)
    assert layer.scaling["default"] == pytest.approx(expected)
    x = randn(5, 24, seed=5)
    down_Ib, up_bO = trains(layer, "rep")
    assert_near("y", model(x), dense_base(layer, x) + expected * (x @ down_Ib @ up_bO))


def test_patterns_that_match_nothing_are_told_and_change_nothing():
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        _, layer = wrapped("rep", (24, 32), lora_alpha=12, rank_pattern={"other": 2}, alpha_pattern={"other": 2})
    assert layer.scaling["default"] == 4.0


def test_the_bottleneck_does_not_scale():
    small, large = (wrapped("rep", (24, 32), r=r)[1].scaling["default"] for r in (2, 16))
    assert small == large


@own_trains
def test_rank_pattern_sets_the_rank_of_single_modules(method):
    base, _ = build("llama")
    targets = ["q_proj", "v_proj", "o_proj"]
    pattern = {"1.self_attn.q_proj": 2, r".*\.0\..*\.v_proj": 4}
    model = get_peft_model(base, config_for(method, target_modules=targets, rank_pattern=pattern))
    ranks = {
        name.removeprefix("model.layers."): set(getattr(layer, f"loretta_{method}_down")["default"].shape.ranks[1:-1])
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LorettaLayer)
    }
    assert ranks == {
        "0.self_attn.q_proj": {3},
        "0.self_attn.v_proj": {4},
        "0.self_attn.o_proj": {3},
        "1.self_attn.q_proj": {2},
        "1.self_attn.v_proj": {3},
        "1.self_attn.o_proj": {3},
    }


# Dropout: where it falls


def test_dropout_of_rep_falls_on_the_input_of_the_update():
    model, layer = wrapped("rep", (24, 32), lora_dropout=0.5, lora_alpha=3)
    x = randn(50, 24, seed=5)
    model.train()
    seed_torch(0)
    got = model(x)
    seed_torch(0)
    dropped = nn.functional.dropout(x, 0.5)
    down_Ib, up_bO = trains(layer, "rep")
    assert_near("y", got, dense_base(layer, x) + dropped @ down_Ib @ up_bO)
    assert_near("in eval mode", model.eval()(x), dense_base(layer, x) + x @ down_Ib @ up_bO)


def test_dropout_of_adp_falls_on_the_activated_bottleneck():
    model, layer = wrapped("adp", (24, 32), adapter_dropout=0.5, bottleneck_size=12)
    x = randn(50, 24, seed=5)
    model.train()
    seed_torch(0)
    got = model(x)
    seed_torch(0)
    y = dense_base(layer, x)
    down_Hb, up_bH = trains(layer, "adp")
    biases = layer.loretta_adp_bias["default"]
    hidden = nn.functional.dropout(torch.relu(y @ down_Hb + biases["down"]), 0.5)
    assert_near("y", got, y + hidden @ up_bH + biases["up"])


# Precision


@every_method
def test_autocast_contracts_the_cores_in_their_own_dtype(method):
    model, layer = wrapped(method, (64, 64))
    model.float()
    x = randn(5, 64, seed=5, dtype=torch.float32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
        if method == "shared":
            halves = layer.factors("default")
        else:
            halves = getattr(layer, f"loretta_{method}_down")["default"]()
    assert {half.dtype for half in halves} == {torch.float32}
    assert got.dtype == torch.bfloat16
    assert_near("y", got, expected)


# The dense matrix is never built


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest new tensor that any operation writes; views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
@pytest.mark.parametrize(
    ("method", "matrix"),
    [("rep", 256 * 320), ("adp", 320 * 64)],
)
def test_forward_and_backward_build_no_dense_matrix(method, matrix, init_weights):
    model, layer = wrapped(method, (256, 320), tensor_rank=5, init_weights=init_weights)
    x = randn(4, 256, seed=5).requires_grad_()
    with LargestTensor() as watch:
        model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # the largest that is needed: the half train of the wider side, ranks x features
    assert 0 < watch.largest <= 2 * 5 * 320 < matrix / 4
    with LargestTensor() as watch:
        dense(getattr(layer, f"loretta_{method}_down")["default"])
        if method == "rep":
            layer.get_delta_weight("default")
    assert watch.largest >= matrix  # the watch sees a dense matrix where there is one


@pytest.mark.parametrize("conv1d", [False, True])
def test_delta_weight_has_the_layout_of_the_base_weight(conv1d):
    _, layer = wrapped("rep", (15, 10), conv1d=conv1d, lora_alpha=7)
    down_Ib, up_bO = trains(layer, "rep")
    delta_IO = 7 / 3 * down_Ib @ up_bO
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
    assert_near("delta", layer.get_delta_weight("default"), delta_IO if conv1d else delta_IO.T)


def test_the_factors_of_rep_are_an_exact_lora():
    _, layer = wrapped("rep", (24, 32), r=8, tensor_rank=3)
    a_IR, b_RO = layer.factors("default")
    down_Ib, up_bO = trains(layer, "rep")
    assert a_IR.shape == (24, 3)
    assert b_RO.shape == (3, 32)
    assert_near("A B", a_IR @ b_RO, down_Ib @ up_bO)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 3


@every_method
def test_a_gradient_reaches_every_core_through_autograds_own_check(method):
    model, _ = wrapped(method, (6, 4), **({"non_linearity": "gelu"} if method == "adp" else {}))
    x = randn(2, 6, seed=5)
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)

    def forward(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(forward, inputs, eps=1e-6, atol=1e-7)
