"""The fused kernels against their plain twins in float64. Without a GPU they run in Triton's interpreter."""

import math
from collections.abc import Callable

import pytest
import torch
from draws import seeded
from tolerances import RTOL, assert_near
from torch import Tensor

from loretta.layers import fused

pytest.importorskip("triton", reason="Triton is not installed")
from interpreted import patch_once

patch_once()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter knows no bfloat16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# the interpreter takes one program after the other: there a few of them fill the machine, and each has several tiles
FEW = {"MANY": 16, "MOST_PARTS": 4} if DEVICE == "cpu" else {}
WIDE, LONG = (300, 150) if FEW else (2200, 700)
# rows, width in, width out, rank: below one block, beyond one, over several chunks of rows and parts of columns
SIZES = [
    (1, 16, 16, 1),
    (1, 2200, 70, 5),
    (17, 70, 37, 5),
    (33, 129, 300, 8),
    (130, WIDE, 130, 16),
    (LONG, 40, 90, 24),
    (2100, 24, 40, 8),
]
BOTTLENECKS = [
    (1, 16, 1, 16),
    (1, 2200, 5, 20),
    (17, 70, 5, 20),
    (130, WIDE, 8, 64),
    (LONG, 90, 24, 64),
    (2100, 40, 7, 33),
]


def cases(sizes: list[tuple[int, ...]]) -> Callable:
    """Every size in float32, and every other one in the other dtypes: the interpreter is slow on large ones."""
    pairs = [
        (size, dtype) for dtype in DTYPES for size in sizes[:: 1 if dtype == torch.float32 or DEVICE == "cuda" else 2]
    ]
    every = pytest.mark.parametrize(("size", "dtype"), pairs, ids=str)
    return lambda test: pytest.mark.sampled(apart=True)(every(test))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New memory is full of NaN: what a kernel reads without having written it spoils the result."""
    triton_kernels = fused._triton()
    for name, value in FEW.items():
        monkeypatch.setattr(triton_kernels, name, value)
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(math.nan))
    return triton_kernels


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A vector or a matrix of random numbers that lies within a larger one of NaN."""
    whole = torch.full([size + 5 for size in shape], math.nan)
    inside = tuple(slice(2, size + 2) for size in shape)
    whole[inside] = scale * torch.randn(*shape, generator=seeded(sum(shape)))
    return whole.to(DEVICE, dtype)[inside]


def results(function, arguments: list[Tensor | None], wanted: list[int], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients asked for, computed in a dtype."""
    cast = [None if a is None else (a if a.dtype == dtype else a.to(dtype)).detach() for a in arguments]
    inputs = [cast[k].requires_grad_() for k in wanted]
    out = function(*cast)
    return [out, *torch.autograd.grad(out, inputs, random(*out.shape, dtype=arguments[0].dtype).to(dtype))]


def assert_equal(fused, plain, arguments: list[Tensor | None], wanted: list[int]) -> None:
    """Beside the rounding of its dtype the kernel may err twice as far as its twin, whose ReLU flips where it does."""
    dtype = arguments[0].dtype
    exact, *gradients = results(plain, arguments, wanted, torch.float64)
    # a ReLU that is shut leaves a gradient of zero: each is measured by all of them
    sizes = [exact.norm(), *[torch.stack([gradient.norm() for gradient in gradients]).norm()] * len(gradients)]
    errors = [
        [
            ((got.double() - want).norm() / size).item()
            for got, want, size in zip(found, [exact, *gradients], sizes, strict=True)
        ]
        for found in (results(fused, arguments, wanted, dtype), results(plain, arguments, wanted, dtype))
    ]
    for mine, twins in zip(*errors, strict=True):
        assert mine <= RTOL[dtype] + 2 * twins, f"relative errors {errors}"


def update(
    rows: int, n_in: int, n_out: int, rank: int, dtype: torch.dtype, *, bias: bool = True
) -> list[Tensor | None]:
    return [
        random(rows, n_in, dtype=dtype),
        random(n_out, n_in, dtype=dtype, scale=n_in**-0.5),
        random(n_out, dtype=dtype) if bias else None,
        random(n_in, rank, dtype=dtype, scale=n_in**-0.5),
        random(rank, n_out, dtype=dtype),
    ]


def bottleneck(rows: int, width: int, inner: int, middle: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        random(rows, width, dtype=dtype),
        random(inner, dtype=dtype),
        random(width, inner, dtype=dtype, scale=width**-0.5),
        random(inner, middle, dtype=dtype),
        random(inner + 1, dtype=dtype),
        random(middle, inner + 1, dtype=dtype, scale=middle**-0.5),
        random(inner + 1, width, dtype=dtype),
    ]


@cases(SIZES)
def test_a_linear_layer_with_an_update(size, dtype):
    arguments = update(*size, dtype, bias=size[0] != 17)
    assert_equal(fused.LinearWithUpdate.apply, fused.linear_with_update, arguments, [0, 3, 4])


@every_dtype
def test_an_input_without_gradient(dtype):
    arguments = update(40, 70, 37, 5, dtype)
    assert_equal(fused.LinearWithUpdate.apply, fused.linear_with_update, arguments, [3, 4])


@cases(BOTTLENECKS)
def test_an_adapter(size, dtype):
    arguments = bottleneck(*size, dtype)
    assert_equal(fused.AddBottleneck.apply, fused.add_bottleneck, arguments, [0, 2, 3, 5, 6])


@every_dtype
@pytest.mark.parametrize("width", [70, 2200])  # of few and of many columns
def test_no_rows(width, dtype):
    for function, arguments, wanted in (
        (fused.LinearWithUpdate.apply, update(0, width, width, 5, dtype), [0, 3, 4]),
        (fused.AddBottleneck.apply, bottleneck(0, width, 5, 20, dtype), [0, 2, 3, 5, 6]),
    ):
        out, *grads = results(function, arguments, wanted, dtype)
        assert out.shape == (0, width)
        assert [grad.shape for grad in grads] == [arguments[k].shape for k in wanted]
        assert all(bool((grad == 0).all()) for grad in grads)


def test_the_input_of_an_adapter_is_left_alone():
    arguments = bottleneck(40, 70, 5, 20, torch.float32)
    before = arguments[0].clone()
    arguments[0].requires_grad_()
    out = fused.AddBottleneck.apply(*arguments)
    grad = random(*out.shape, dtype=torch.float32)
    kept = grad.clone()
    out.backward(grad)
    assert torch.equal(arguments[0], before)
    assert torch.equal(grad, kept)


def test_results_repeat_to_the_last_bit():
    # on a GPU over many blocks, whose order may change; the interpreter takes one block after the other
    arguments = update(*((700, 200, 90, 8) if DEVICE == "cuda" else (130, 70, 37, 5)), torch.float32)
    for k in (0, 3, 4):
        arguments[k].requires_grad_()
    runs = []
    for _ in range(2):
        out = fused.LinearWithUpdate.apply(*arguments)
        runs.append([out, *torch.autograd.grad(out, [arguments[k] for k in (0, 3, 4)], torch.ones_like(out))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_a_nan_in_the_input_reaches_the_output():
    arguments = bottleneck(20, 70, 5, 20, torch.float32)
    arguments[0][3, 4] = math.nan
    out = fused.AddBottleneck.apply(*arguments)
    assert out[3].isnan().all()
    assert_near("other rows", out[4:], fused.add_bottleneck(*arguments)[4:])
