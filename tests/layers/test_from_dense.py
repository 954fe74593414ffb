"""TTLinear in the place of a dense layer: its truncated TT-SVD, or a change that starts as exactly zero."""

import copy

import pytest
import torch
from layers.filled import dense_layer, filled_layer
from tolerances import assert_near
from torch import nn
from tt.trains import SHAPES, every_dtype, every_shape, oracle, randn

from loretta import tt
from loretta.layers.trains import TTLinear
from loretta.tt import plan_shape


@pytest.mark.parametrize("bias", [False, True])
@every_dtype
@every_shape
def test_from_dense_is_the_truncated_tt_svd(shape, dtype, bias):
    dense = dense_layer(shape, seed=0, dtype=dtype, bias=bias)
    layer = TTLinear.from_dense(dense, shape)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert [tuple(core.shape) for core in layer.cores] == shape.cores
    cores = tt.tt_svd(dense.weight.detach().double().T, shape)
    for core, exact in zip(layer.cores, tt.pad_ranks(tt.balance(cores), shape.ranks), strict=True):
        assert torch.equal(core, exact.to(dtype))  # rounded once
    weight_IO = oracle(cores, shape)
    assert_near("weight", layer.to_dense().weight, weight_IO.T, terms=oracle([core.abs() for core in cores], shape))
    x_BI = randn(4, shape.in_features, seed=0, dtype=dtype)
    added = dense.bias.double() if bias else torch.zeros(())
    terms = x_BI.double().abs() @ weight_IO.abs() + added.abs()
    assert_near("y", layer(x_BI), x_BI.double() @ weight_IO + added, terms=terms)
    assert layer.start is None
    assert all(parameter.requires_grad for parameter in layer.parameters())


@every_shape
def test_from_dense_is_exact_at_full_rank_and_balanced(shape):
    dense, full = dense_layer(shape, seed=0), plan_shape(shape.in_features, shape.out_features, rank=300)
    layer = TTLinear.from_dense(dense, full)
    assert_near("weight", layer.to_dense().weight, dense.weight)
    assert torch.equal(layer.bias, dense.bias)
    for core in layer.cores:
        assert_near("norm", core.norm(), layer.cores[0].norm())


def test_from_dense_leaves_the_dense_layer_alone():
    shape = SHAPES["aligned"]
    dense = dense_layer(shape, seed=0)
    layer, before = TTLinear.from_dense(dense, shape), copy.deepcopy(dense.state_dict())
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_from_dense_stays_on_the_meta_device():
    shape = SHAPES["aligned"]
    layer = TTLinear.from_dense(nn.Linear(24, 10, device="meta"), shape, as_change=True)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert [tuple(core.shape) for core in layer.start] == shape.cores


@pytest.mark.parametrize("autocast", [False, True])
@every_dtype
@every_shape
def test_a_change_starts_as_exactly_zero(shape, dtype, autocast):
    dense = dense_layer(shape, seed=0, dtype=dtype)
    layer = TTLinear.from_dense(dense, shape, as_change=True)
    assert any(core.any() for core in layer.cores)
    x_BI = randn(5, shape.in_features, seed=0, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        change_BO = layer(x_BI)
    assert change_BO.count_nonzero() == 0  # bit for bit; -0.0 adds nothing either
    assert layer.to_dense().weight.count_nonzero() == 0
    merged = layer.to_dense(pretrained=dense)
    assert torch.equal(merged.weight, dense.weight)
    assert torch.equal(merged.bias, dense.bias)


def test_a_change_trains_its_cores_and_not_its_start():
    shape = SHAPES["aligned"]
    layer = TTLinear.from_dense(dense_layer(shape, seed=0), shape, as_change=True)
    assert {name for name, _ in layer.named_buffers()} == {"start.values"}
    assert not any(name.startswith("start") for name, _ in layer.named_parameters())
    layer(randn(3, 24, seed=0)).sum().backward()
    assert all(grad.any() for grad in tt.split_cores(layer.cores.values.grad, shape))
    assert layer.start.values.grad is None
    with torch.no_grad():
        for core in layer.cores:
            core.add_(1.0)
    assert not any(torch.equal(core, start) for core, start in zip(layer.cores, layer.start, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@every_shape
def test_a_merged_change_is_the_base_plus_the_change(shape, bias):
    dense = dense_layer(shape, seed=0, bias=bias)
    layer = filled_layer(shape, seed=2, bias=bias, as_change=True)
    merged, x_BI = layer.to_dense(pretrained=dense), randn(4, shape.in_features, seed=1)
    change_IO = oracle(list(layer.cores), shape) - oracle(list(layer.start), shape)
    assert_near("weight", merged.weight, dense.weight + change_IO.T)
    assert_near("y", merged(x_BI), dense(x_BI) + layer(x_BI))
    assert (merged.bias is None) != bias


def test_a_change_without_bias_keeps_the_bias_of_the_base():
    shape = SHAPES["aligned"]
    dense, layer = dense_layer(shape, seed=0), filled_layer(shape, seed=2, bias=False, as_change=True)
    assert torch.equal(layer.to_dense(pretrained=dense).bias, dense.bias)


def test_a_change_with_bias_merges_into_a_base_without():
    shape = SHAPES["aligned"]
    dense, layer = dense_layer(shape, seed=0, bias=False), filled_layer(shape, seed=2, as_change=True)
    assert torch.equal(layer.to_dense(pretrained=dense).bias, layer.bias)


def test_from_dense_of_an_integer_weight_is_not_silently_zero():
    shape = plan_shape(12, 20, rank=12, modes=(4, 3, 5, 4))
    dense = nn.Linear(12, 20)
    dense.weight = nn.Parameter((100 * randn(20, 12, seed=0)).to(torch.int8), requires_grad=False)
    try:
        layer = TTLinear.from_dense(dense, shape)
    except (TypeError, ValueError):
        return  # refused
    assert_near("weight", layer.to_dense().weight, dense.weight)
