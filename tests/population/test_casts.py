"""Products that share the cast of an activation against the same products in float64."""

import pytest
import torch
from draws import seeded
from tolerances import assert_near
from torch.utils._python_dispatch import TorchDispatchMode

from loretta.population.casts import OneCast

SIZE, ROWS, TOKENS, WIDTH, RANK = 2, 3, 4, 16, 5


class Casts(TorchDispatchMode):
    """Counts the casts of tensors that are as large as the activation."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].numel() == SIZE * ROWS * TOKENS * WIDTH
        return func(*args, **(kwargs or {}))


def layer(start, query, value, thin):
    """Two products with rows of the batch and one with rows of the members, all of one activation."""
    x = (start + 1).view(SIZE * ROWS, TOKENS, WIDTH)
    rows = x.reshape(SIZE, -1, WIDTH)
    return torch.nn.functional.linear(x, query), torch.bmm(rows, thin), torch.nn.functional.linear(x, value)


def draws():
    draw = seeded(0)
    start = torch.randn(SIZE, ROWS * TOKENS, WIDTH, generator=draw).requires_grad_()
    matrices = (torch.randn(WIDTH, WIDTH, generator=draw) for _ in range(2))
    return start, *matrices, torch.randn(SIZE, WIDTH, RANK, generator=draw)


def test_products_of_one_activation_share_its_cast():
    """Values to the last bit; gradients as near to float64 as those of separate casts."""
    inputs = draws()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, counts = [], []
    for modes in ([], [OneCast()]):
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            for mode in modes:
                mode.__enter__()
            results = layer(*inputs)
            for mode in modes:
                mode.__exit__(None, None, None)
        found.append([*results, *torch.autograd.grad([y.square().sum() for y in results], inputs[0])])
        counts.append(casts.count)
    assert counts == [3, 1]
    results = layer(*exact)
    wanted = [*results, *torch.autograd.grad([y.square().sum() for y in results], exact[0])]
    for one, other in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(one, other)
    for got, expected in zip(found[1], wanted, strict=True):
        assert_near("result", got.bfloat16(), expected)


def test_what_has_changed_or_lies_otherwise_is_cast_again():
    x, weight, *_ = draws()
    x, square = x.detach().clone(), torch.randn(WIDTH, WIDTH, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        expected = [torch.nn.functional.linear(rows, weight) for rows in (x, 2 * x, square, square.T)]
        with OneCast():
            found = [torch.nn.functional.linear(x, weight)]
            x.mul_(2)
            found += [torch.nn.functional.linear(rows, weight) for rows in (x, square, square.T)]
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_gradient_passes_where_one_is_asked_for():
    """The same numbers without a gradient come first."""
    start, weight, *_ = draws()
    x = start + 1
    with torch.autocast("cpu", torch.bfloat16), OneCast():
        without = torch.nn.functional.linear(x.detach(), weight)
        with_gradient = torch.nn.functional.linear(x, weight)
    assert not without.requires_grad
    assert with_gradient.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_autocast_leaves_alone_is_not_cast(dtype):
    x = torch.randn(3, WIDTH, dtype=dtype)
    mode = OneCast()
    with torch.autocast("cpu", torch.bfloat16):
        assert mode.cast(x) is x
    assert mode.cast(x.float()).dtype is torch.float32
