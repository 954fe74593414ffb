"""Which call's factors a layer finds: of the innermost running one, of its thread, and of none that has ended."""

import threading

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from loretta.tuners import calls


class Layer(nn.Module):
    depth = 0


def begin(layer, value, has_graph=True):
    """As a pre-forward hook: the frame of its caller is the call's."""
    calls.enter({(layer, "a", 0): (torch.tensor(float(value)),)}, has_graph=has_graph)


def end():
    calls.leave()


def found(layer):
    factors = calls.factors_in_call(layer, "a", 0)
    return None if factors is None else factors[0].item()


def call(layer, value, inside, *, has_graph=True):
    """A model's call: what ``inside`` returns, from some frames above."""
    begin(layer, value, has_graph)
    result = (lambda: inside())()
    end()
    return result


def test_a_layer_finds_the_factors_of_the_running_call_alone():
    layer = Layer()
    assert found(layer) is None
    assert call(layer, 1, lambda: (found(layer), found(layer))) == (1, 1)
    assert found(layer) is None
    assert call(layer, 2, lambda: calls.factors_in_call(layer, "b", 0)) is None
    assert call(layer, 2, lambda: found(Layer())) is None


def test_the_depth_that_a_layer_remembers_is_only_a_guess():
    layer = Layer()
    assert call(layer, 1, lambda: found(layer)) == 1
    assert layer.depth > 0
    deeper = lambda: (lambda: (lambda: found(layer))())()  # noqa: E731
    assert call(layer, 2, deeper) == 2
    layer.depth = 10_000
    assert call(layer, 3, lambda: found(layer)) == 3


def test_calls_nest():
    layer = Layer()

    def inside():
        before = found(layer)
        return before, call(layer, 2, lambda: found(layer)), found(layer)

    assert call(layer, 1, inside) == (1, 2, 1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_never_ends_leaves_nothing_behind(error):
    layer = Layer()

    def fail():
        raise error

    with pytest.raises(error):
        call(layer, 1, fail)
    assert found(layer) is None
    assert call(layer, 2, lambda: found(layer)) == 2
    assert found(layer) is None


def test_another_thread_finds_nothing_of_this_one():
    layer, seen = Layer(), []

    def inside():
        thread = threading.Thread(target=lambda: seen.append(found(layer)))
        thread.start()
        thread.join()
        return found(layer)

    assert (call(layer, 1, inside), seen) == (1, [None])


def test_factors_without_a_graph_serve_only_where_no_gradient_is_asked_for():
    layer = Layer()

    def inside():
        with torch.no_grad():
            return found(layer)

    assert call(layer, 1, lambda: found(layer), has_graph=False) is None
    assert call(layer, 1, inside, has_graph=False) == 1
    assert call(layer, 1, inside) == 1


def test_a_backward_pass_within_a_call_finds_nothing():
    """What it computes again is a checkpoint's second pass, whose gradients must not go into the first one's graph."""
    layer, seen = Layer(), []

    def inside():
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(lambda _: seen.append((found(layer), calls.current_backward() != calls.NO_BACKWARD)))
        y.sum().backward()
        return found(layer)

    assert (call(layer, 1, inside), seen) == (1, [(None, True)])


def test_a_checkpoint_is_recomputed_once():
    seen = []

    def block(x):
        seen.append(calls.is_recomputed())
        return x.tanh()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_a_trace_is_a_recording_and_a_plain_call_is_none():
    seen = []

    def function(x):
        seen.append(calls.is_recorded())
        return x + 1

    function(torch.ones(1))
    make_fx(function)(torch.ones(1))
    torch.func.vmap(function)(torch.ones(2, 1))
    assert seen == [False, True, True]
