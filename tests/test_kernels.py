"""The fused steps against their plain twins: values and gradients, in the layers and alone."""

import pytest
import torch
from tolerances import assert_near
from torch import Tensor
from torch.nn.functional import linear
from tuners.families import loss_of
from tuners.wrapped import every_method, trainable, trained, wrap

from loretta import kernels
from loretta.layers import add_update

SIZES = [(1, 1, 1, 1), (5, 7, 3, 2), (16, 24, 40, 5), (33, 48, 32, 8)]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


def randn(*size: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=dtype).to(device).requires_grad_()


def update_operands(rows: int, n_in: int, n_out: int, rank: int, **options) -> list[Tensor]:
    x, a, b = (
        randn(rows, n_in, seed=1, **options),
        randn(n_in, rank, seed=2, **options),
        randn(rank, n_out, seed=3, **options),
    )
    return [x, randn(n_out, n_in, seed=4, **options).detach(), randn(n_out, seed=5, **options).detach(), a, b]


def compare(got: Tensor, ref: Tensor, operands: list[Tensor]) -> None:
    assert_near("value", got, ref)
    weights = torch.linspace(-1, 2, ref.numel(), dtype=ref.dtype, device=ref.device).view_as(ref)
    got_grads = torch.autograd.grad((got * weights).sum(), operands, retain_graph=True)
    ref_grads = torch.autograd.grad((ref * weights).sum(), operands)
    for k, (got_grad, ref_grad) in enumerate(zip(got_grads, ref_grads, strict=True)):
        assert_near(f"gradient {k}", got_grad, ref_grad)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_linear_layer_with_its_update(size, has_bias):
    x, weight, bias, a, b = update_operands(*size)
    bias = bias if has_bias else None
    got = kernels.LinearWithUpdate.apply(x, weight, bias, a, b)
    compare(got, add_update(linear(x, weight, bias), x, a, b), [x, a, b])


def test_an_input_without_gradient():
    x, weight, bias, a, b = update_operands(5, 7, 3, 2)
    kernels.LinearWithUpdate.apply(x.detach(), weight, bias, a, b).sum().backward()
    assert x.grad is None
    assert a.grad.any()
    assert b.grad.any()


def test_gradients_that_are_not_contiguous():
    x, weight, bias, a, b = update_operands(16, 24, 40, 5)
    got = kernels.LinearWithUpdate.apply(x, weight, bias, a, b).T @ torch.ones(16, 3, dtype=x.dtype)
    ref = (linear(x, weight, bias) + x @ a @ b).T @ torch.ones(16, 3, dtype=x.dtype)
    compare(got, ref, [x, a, b])


@pytest.mark.parametrize("has_one", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_bottleneck_added_to_its_input(size, has_one):
    rows, width, bottleneck, rank = size
    y, left, up = randn(rows, width, seed=1), randn(width, rank, seed=2), randn(rank, width, seed=3)
    mid_in, mid_out = randn(rank, bottleneck, seed=4), randn(bottleneck, rank, seed=5)
    one = randn(rank, seed=6).detach() if has_one else None

    def inner(h: Tensor, mid_in: Tensor, mid_out: Tensor) -> Tensor:
        return torch.nn.functional.gelu(h @ mid_in) @ mid_out

    got = kernels.AddBottleneck.apply(inner, y, one, left, up, mid_in, mid_out)
    ref = y + inner(y @ left + (one if has_one else 0), mid_in, mid_out) @ up
    compare(got, ref, [y, left, up, mid_in, mid_out])


@every_method
@pytest.mark.parametrize("options", [{}, {"init_weights": "denoised"}, {"bias": "all"}])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_layers_compute_the_same_with_them(family, method, options, monkeypatch):
    if options.get("bias") == "all" and method == "adp":
        options = {"train_bias": False}
    model, inputs = wrap(family, method, **options)
    trained(model).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    called = []
    for kernel in (kernels.LinearWithUpdate, kernels.AddBottleneck):
        apply = kernel.apply
        monkeypatch.setattr(kernel, "apply", lambda *args, apply=apply: called.append(1) or apply(*args))
    gradients = []
    for wanted in (False, True):
        monkeypatch.setattr(kernels, "pays", lambda x, wanted=wanted: wanted)
        model.zero_grad()
        loss_of(model, inputs).backward()
        gradients.append({name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None})
    # not for Conv1D, whose output is a view, nor beside base biases that train or a start that is subtracted
    refused = method == "rep" and (family == "gpt2" or (family == "bert" and "bias" in options))
    assert bool(called) == (not refused and "init_weights" not in options)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_near(name, gradients[1][name], gradient)


@on_gpu
@every_method
def test_a_captured_step_computes_the_same(method):
    model, inputs = wrap("llama", method, train_norms=False)
    trained(model).cuda()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    loss_of(model, inputs).backward()
    wanted = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad(set_to_none=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_of(model, inputs).backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_of(model, inputs).backward()
    for _ in range(2):
        for p in trainable(model).values():
            p.grad.fill_(float("nan"))
        graph.replay()
    for name, gradient in wanted.items():
        assert_near(name, trainable(model)[name].grad, gradient)
