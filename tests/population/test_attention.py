"""Attention among few tokens as a kernel against torch's in float64. Without a GPU Triton interprets it."""

import math

import pytest
import torch
from draws import seeded
from tolerances import assert_near
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from loretta.population.attention import ShortRows
from loretta.population.attention_kernels import ShortAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rows, heads, tokens, width: several rows in a block, and a rest; one row; a block that is not full
SIZES = [(7, 2, 6, 8), (3, 1, 40, 16), (2, 2, 70, 24)]


def drawn(sizes, dtype):
    """Queries, keys, values and a gradient whose tokens come before heads in memory, and which tokens are padding."""
    draw = seeded(sum(sizes))
    n_rows, n_heads, n_tokens, width = sizes
    made = [
        torch.randn(n_rows, n_tokens, n_heads, width, generator=draw).to(DEVICE, dtype).transpose(1, 2)
        for _ in range(4)
    ]
    lengths = torch.randint(1, n_tokens + 1, (n_rows,), generator=draw)
    mask = (torch.arange(n_tokens) < lengths[:, None])[:, None, None].to(DEVICE)
    return made, mask.expand(n_rows, 1, n_tokens, n_tokens)


def plain(q, k, v, mask, scale, factors):
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) * factors) @ v


@pytest.fixture
def empty_is_nan(monkeypatch):
    """New memory is full of NaN, which spoils what is not written."""
    new_empty = Tensor.new_empty

    def full_of_nan(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", full_of_nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_and_its_gradients(sizes, dtype, empty_is_nan):
    (*inputs, gradient), mask = drawn(sizes, dtype)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    got = ShortAttention.apply(*inputs, mask, 0.3, 0.0, seed, 0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, mask, scale=0.3)
    found = [got, *torch.autograd.grad(got, inputs, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for name, one, other in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        assert_near(name, one, other)


@pytest.mark.parametrize("sizes", SIZES)
def test_dropout_is_the_same_in_both_passes(sizes, empty_is_nan):
    """Values that are a unit matrix show which shares are kept; with these factors the gradients are torch's."""
    n_rows, n_heads, n_tokens, _ = sizes
    (q, k, *_), mask = drawn((*sizes[:3], triton_width(n_tokens)), torch.float32)
    width, draw = q.shape[-1], seeded(1)
    v = torch.eye(n_tokens, width, device=DEVICE).expand(n_rows, n_heads, -1, -1).clone()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    seed = torch.full((1,), 5, dtype=torch.int64, device=DEVICE)
    got = ShortAttention.apply(*inputs, mask, 0.3, 0.25, seed, 2, 1)
    shares = (exact[0] @ exact[1].transpose(-1, -2) * 0.3).masked_fill(~mask, -math.inf).softmax(-1).detach()
    factors = torch.where(mask, got[..., :n_tokens].detach().double() / shares, 0)
    kept = factors > 0.5
    assert torch.allclose(factors[kept], torch.tensor(4 / 3, dtype=torch.float64), rtol=1e-4)
    assert factors[~kept].abs().max() == 0
    seen = mask.expand(-1, n_heads, -1, -1)
    assert kept[seen].double().mean().item() == pytest.approx(0.75, abs=4 * math.sqrt(0.19 / int(seen.sum())))
    gradient = torch.randn(got.shape, generator=draw).to(DEVICE)
    expected = plain(*exact, mask, 0.3, torch.where(kept, 4 / 3, 0.0))
    found = [got, *torch.autograd.grad(got, inputs, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for name, one, other in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        assert_near(name, one, other)
    again, other_seed, other_call = (
        ShortAttention.apply(*inputs, mask, 0.3, 0.25, seed + more, 2 + call, 1)
        for more, call in ((0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(got, again)
    assert not torch.equal(got, other_seed)
    assert not torch.equal(got, other_call)


def test_a_member_that_is_not_finite_disturbs_no_other(empty_is_nan):
    """Seven rows of 6 tokens each: of ten rows that fit into a block none are of two members."""
    (*inputs, gradient), mask = drawn((21, 2, 6, 8), torch.float32)
    for x in (*inputs, gradient):
        x[7:14] = math.nan
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    got = ShortAttention.apply(*inputs, mask, 0.3, 0.0, seed, 0, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, mask, scale=0.3)
    found = [got, *torch.autograd.grad(got, inputs, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for name, one, other in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        for rows in (slice(0, 7), slice(14, 21)):
            assert_near(name, one[rows], other[rows])


def triton_width(n_tokens):
    return max(16, 1 << (n_tokens - 1).bit_length())


def test_short_rows_take_the_kernel(monkeypatch):
    """Each layer draws other numbers; what does not fit is torch's."""
    calls = []
    ordinary = ShortAttention.apply
    monkeypatch.setattr(ShortAttention, "apply", lambda *args: (calls.append(args[-2]), ordinary(*args))[1])
    attend = torch.nn.functional.scaled_dot_product_attention
    (q, k, v, _), mask = drawn((3, 2, 6, 8), torch.float16)
    long = [x.repeat(1, 1, 30, 1) for x in (q, k, v)]
    more = [x.double() for x in (q, k, v)]
    added = torch.where(mask, 0.0, -1e4).half()
    with ShortRows(1):
        found = [attend(q, k, v, mask), attend(q, k, v, attn_mask=mask[:, :, :1], scale=0.1)]
        dropped = [attend(q, k, v, mask, 0.5) for _ in range(2)]
        assert calls == [1, 2, 3, 4]
        others = [attend(*long), attend(*more, mask), attend(q, k, v, added), attend(q, k, v, is_causal=True)]
    assert calls == [1, 2, 3, 4]
    assert not torch.equal(*dropped)
    expected = [attend(*more, mask), attend(*more, mask[:, :, :1], scale=0.1)]
    for got, wanted in zip(found, expected, strict=True):
        assert_near("attention", got, wanted)
    for got, wanted in zip(
        others,
        [attend(*long), attend(*more, mask), attend(q, k, v, added), attend(q, k, v, is_causal=True)],
        strict=True,
    ):
        assert torch.equal(got, wanted)
