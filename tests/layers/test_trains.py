"""Axes: B batch, I input features, O output features, b bottleneck, C inner size at a boundary."""

import copy

import pytest
import torch
from draws import examples
from hypothesis import given
from hypothesis import strategies as st
from layers.filled import filled_cores, filled_layer
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tt.trains import SHAPES, every_dtype, every_shape, oracle, randn, seeds, shapes

from loretta import tt
from loretta.layers.trains import Cores, update_factors
from loretta.tt import plan_shape


@every_shape
def test_cores_begin_as_zeros_of_the_planned_shapes(shape):
    cores = Cores(shape)
    assert {name: tuple(value.shape) for name, value in cores.named_parameters()} == {"values": (shape.n_params,)}
    assert [tuple(core.shape) for core in cores] == shape.cores
    assert all(core.requires_grad and core.dtype == torch.float32 and not core.any() for core in cores)
    assert len(cores) == len(shape.cores)
    assert str(shape) in repr(cores)


def test_assign_overwrites_in_place():
    shape = SHAPES["aligned"]
    cores, values = Cores(shape), tt.gaussian(shape, std=1.0)
    parameter, addresses = cores.values, [core.data_ptr() for core in cores]
    cores.assign(values)
    assert cores.values is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert [core.data_ptr() for core in cores] == addresses
    assert all(torch.equal(core, value) for core, value in zip(cores, values, strict=True))
    assert all(torch.equal(cores[k], value) for k, value in enumerate(values))
    with pytest.raises(ValueError):
        cores.assign(values[:-1])


def test_assign_does_nothing_on_the_meta_device():
    shape = SHAPES["aligned"]
    cores = Cores(shape, device="meta")
    cores.assign(tt.gaussian(shape, std=1.0))
    assert all(core.is_meta for core in cores)


@every_shape
def test_cores_halve_to_their_matrix(shape):
    cores = filled_cores(shape, seed=0)
    left_IC, right_CO = cores()
    assert_near("matrix", left_IC @ right_CO, oracle(list(cores), shape))


@every_shape
def test_autocast_leaves_the_halves_in_the_dtype_of_the_cores(shape):
    cores = filled_cores(shape, seed=0, dtype=torch.float32)
    expected = cores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is at work
        got = cores()
    for got_half, expected_half in zip(got, expected, strict=True):
        assert got_half.dtype == torch.float32
        assert torch.equal(got_half, expected_half)


@pytest.mark.parametrize("as_change", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@examples
@given(shapes(), seeds)
def test_forward_is_the_dense_layer(bias, as_change, shape, seed):
    layer = filled_layer(shape, seed=seed, bias=bias, as_change=as_change)
    x_BI = randn(2, 3, shape.in_features, seed=seed).requires_grad_()
    weight_IO = oracle(list(layer.cores), shape)
    if as_change:
        weight_IO = weight_IO - oracle(list(layer.start), shape)
    ref = x_BI @ weight_IO + (layer.bias if bias else 0.0)
    got = layer(x_BI)
    assert_near("y", got, ref)
    assert_near("dense", layer.to_dense()(x_BI), ref)
    trained = [x_BI, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    assert len(trained) == 2 + bias
    weights = randn(*ref.shape, seed=7)
    got_grads = torch.autograd.grad((got * weights).sum(), trained)
    ref_grads = torch.autograd.grad((ref * weights).sum(), trained)
    assert_gradients_near(dict(enumerate(got_grads)), dict(enumerate(ref_grads)))


@every_dtype
@every_shape
def test_forward_in_every_dtype(shape, dtype):
    layer = filled_layer(shape, seed=1, dtype=dtype, bias=False)
    x_BI = randn(4, shape.in_features, seed=0, dtype=dtype)
    y_BO = layer(x_BI)
    assert y_BO.dtype == dtype
    weight_IO = oracle(list(layer.cores), shape)
    assert_near("y", y_BO, x_BI.double() @ weight_IO, terms=x_BI.double().abs() @ weight_IO.abs())


def test_the_input_decides_the_dtype_of_the_output():
    shape = SHAPES["straddling, folded right"]
    layer = filled_layer(shape, seed=0, dtype=torch.float32)
    x_BI = randn(4, shape.in_features, seed=0, dtype=torch.bfloat16)
    assert layer(x_BI).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BO = layer(x_BI.float())
    assert y_BO.dtype == torch.bfloat16
    weight_IO = oracle(list(layer.cores), shape)
    assert_near("y", y_BO, x_BI.double() @ weight_IO + 1, terms=x_BI.double().abs() @ weight_IO.abs() + 1)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"as_change": True}])
def test_state_dict_round_trip(options):
    shape = SHAPES["padded and straddling"]
    layer, other = filled_layer(shape, seed=0, **options), filled_layer(shape, seed=5, **options)
    state = layer.state_dict()
    names = {"cores.values"} | ({"start.values"} if options.get("as_change") else set())
    names |= {"bias"} if options.get("bias", True) else set()
    assert state.keys() == names
    assert other.load_state_dict(state).missing_keys == []
    x_BI = randn(4, shape.in_features, seed=0)
    assert torch.equal(other(x_BI), layer(x_BI))
    assert torch.equal(copy.deepcopy(layer)(x_BI), layer(x_BI))


class OutputSizes(TorchDispatchMode):
    """The numbers of entries of every tensor that any operator returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


@pytest.mark.parametrize("as_change", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        plan_shape(512, 768, rank=4),
        plan_shape(512, 768, rank=4, modes=(8, 8, 16, 8, 6, 8)),  # the boundary cuts 16 into 8 and 2
        plan_shape(512, 768, rank=4, modes=(4, 8, 32, 8, 48)),  # the boundary cuts 32 into 16 and 2
    ],
    ids=str,
)
def test_applying_a_layer_never_stores_a_matrix_of_its_size(shape, as_change):
    layer = filled_layer(shape, seed=0, dtype=torch.float32, as_change=as_change)
    x_BI = torch.ones(5, 512, requires_grad=True)
    with OutputSizes() as forward:
        y_BO = layer(x_BI)
    with OutputSizes() as backward:
        y_BO.sum().backward()
    assert len(backward.sizes) > len(shape.modes)
    assert max(forward.sizes + backward.sizes) <= 768 * max(5, shape.cut_rank) < 512 * 768 / 8


def test_a_stored_matrix_would_be_seen():
    layer = filled_layer(plan_shape(512, 768, rank=4), seed=0, dtype=torch.float32)
    with OutputSizes() as forward:
        weight_IO = tt.matrix(list(layer.cores), layer.cores.shape)
    assert max(forward.sizes) == 512 * 768
    with OutputSizes() as backward:
        weight_IO.square().sum().backward()
    assert max(backward.sizes) == 512 * 768


@examples
@given(
    st.sampled_from([(4, 6), (2, 12), (24,), (7, 3)]),
    st.sampled_from([(5, 2), (10,), (3, 3, 2)]),
    st.integers(1, 12),
    st.integers(1, 7),
    st.integers(1, 7),
    seeds,
)
def test_an_update_is_a_product_of_the_smallest_inner_size(in_modes, out_modes, bottleneck, rank_down, rank_up, seed):
    in_features, out_features = torch.Size(in_modes).numel(), torch.Size(out_modes).numel()
    down_shape = plan_shape(in_features, bottleneck, rank=rank_down, modes=(*in_modes, bottleneck))
    up_shape = plan_shape(bottleneck, out_features, rank=rank_up, modes=(bottleneck, *out_modes))
    down, up = filled_cores(down_shape, seed=seed), filled_cores(up_shape, seed=seed + 1)
    a_IR, b_RO = update_factors(down(), up())
    inner = min(bottleneck, down_shape.cut_rank, up_shape.cut_rank)
    assert (a_IR.shape, b_RO.shape) == ((in_features, inner), (inner, out_features))
    ref = oracle(list(down), down_shape) @ oracle(list(up), up_shape)
    got = a_IR @ b_RO
    assert_near("update", got, ref)
    weights = randn(*ref.shape, seed=7)
    got_grads = torch.autograd.grad((got * weights).sum(), [down.values, up.values])
    ref_grads = torch.autograd.grad((ref * weights).sum(), [down.values, up.values])
    assert_gradients_near(dict(enumerate(got_grads)), dict(enumerate(ref_grads)))


@pytest.mark.parametrize(
    ("down", "up", "inner"),
    [
        (plan_shape(64, 8, rank=5), plan_shape(8, 48, rank=3), 3),
        (plan_shape(64, 8, rank=3), plan_shape(8, 48, rank=5), 3),
        (plan_shape(64, 2, rank=5), plan_shape(2, 48, rank=3), 2),
        (plan_shape(768, 8, rank=5), plan_shape(8, 768, rank=5), 5),
        (
            plan_shape(32, 16, rank=2, modes=(8, 8, 8)),
            plan_shape(16, 24, rank=3, modes=(8, 8, 6)),
            4,
        ),  # boundaries inside cores
        (plan_shape(32, 3, rank=2, modes=(8, 12)), plan_shape(3, 24, rank=3, modes=(6, 12)), 3),
    ],
    ids=str,
)
def test_an_update_of_planned_shapes(down, up, inner):
    down_cores, up_cores = filled_cores(down, seed=0), filled_cores(up, seed=1)
    a_IR, b_RO = update_factors(down_cores(), up_cores())
    assert a_IR.shape[1] == b_RO.shape[0] == inner
    assert_near("update", a_IR @ b_RO, oracle(list(down_cores), down) @ oracle(list(up_cores), up))


@every_dtype
def test_an_update_keeps_the_dtype_of_the_cores_under_autocast(dtype):
    down, up = plan_shape(64, 8, rank=5), plan_shape(8, 48, rank=3)
    down_cores, up_cores = filled_cores(down, seed=0, dtype=dtype), filled_cores(up, seed=1, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a_IR, b_RO = update_factors(down_cores(), up_cores())
    assert a_IR.dtype == b_RO.dtype == dtype
    assert_near("update", a_IR @ b_RO, oracle(list(down_cores), down) @ oracle(list(up_cores), up))


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values

    def right_inverse(self, values: Tensor) -> Tensor:
        return values / 2


def test_cores_can_be_parametrized_by_torch():
    shape = tt.plan_shape(12, 8, rank=3)
    cores, plain = Cores(shape, dtype=torch.float64), Cores(shape, dtype=torch.float64)
    for each in (cores, plain):
        with torch.no_grad():
            each.values.copy_(torch.linspace(-1, 1, shape.n_params, dtype=torch.float64))
    parametrize.register_parametrization(cores, "values", Doubled())
    assert_near("values", cores.values, plain.values)
    for got, ref in zip(cores(), plain(), strict=True):
        assert_near("half", got, ref)
    for each in (cores, plain):
        (each()[0].square().sum() + each()[1].square().sum()).backward()
    assert_near("gradient", cores.parametrizations["values"].original.grad, 2 * plain.values.grad)
    again = copy.deepcopy(cores)
    assert_near("copied", again.values, plain.values)
    parametrize.remove_parametrizations(again, "values")
    assert_near("removed", again.values, plain.values)
    assert set(again.state_dict()) == {"values"}
