"""Writes to cores that torch does not count, and errors in the middle: the next call computes with what is there now.

The oracle reads the cores when it is asked and multiplies dense matrices in float64.
"""

import copy
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tt.trains import oracle, randn
from tuners.families import build, randomise
from tuners.wrapped import config_for, every_method, shared_by_hand, trained, wrap

import loretta
from loretta import InputError, get_peft_model
from loretta.layers.shared import take_apart
from loretta.tuners import contraction, joint
from loretta.tuners.layer import LorettaLayer
from loretta.tuners.shared import SharedLinear

SCALE = 1.5


class Two(nn.Module):
    """Two linear layers of one size, so that their trains are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def adapted(method: str, **options) -> nn.Module:
    scale = {"scaling": SCALE} if method == "adp" else {"lora_alpha": SCALE * 3}
    model = get_peft_model(Two(), config_for(method, target_modules=["one", "two"], **scale, **options))
    return trained(model).double().eval()


def layers_of(model: nn.Module) -> list[LorettaLayer]:
    return [module for module in model.modules() if isinstance(module, LorettaLayer)]


def cores_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(".values") and p.requires_grad]


def by_hand(layer: LorettaLayer, x: Tensor, adapter: str = "default") -> Tensor:
    """One layer with the dense matrices that its cores spell now."""
    method, y = ("rep" if hasattr(layer, "loretta_rep_down") else "adp"), layer.get_base_layer()(x)
    if isinstance(layer, SharedLinear):
        left, inner, right = shared_by_hand(layer, adapter)
        return y + SCALE * (x @ left @ inner @ right)
    trains = [getattr(layer, f"loretta_{method}_{part}")[adapter] for part in ("down", "up")]
    down, up = (oracle(list(cores), cores.shape) for cores in trains)
    if method == "rep":
        return y + SCALE * (x @ down @ up)
    biases = layer.loretta_adp_bias[adapter]
    return y + SCALE * (torch.relu(y @ down + biases["down"]) @ up + biases["up"])


def expected(model: nn.Module, x: Tensor) -> Tensor:
    one, two = layers_of(model)
    return by_hand(two, torch.tanh(by_hand(one, x)))


X = randn(3, 12, seed=5)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def assert_fresh(model: nn.Module) -> None:
    """The model computes what its cores say now, in every mode, and so do its gradients."""
    assert_near("without gradients", answer(model), expected(model, X))
    with torch.inference_mode():
        assert_near("in inference mode", model(X), expected(model, X))
    got, ref = model(X), expected(model, X)
    assert_near("with gradients", got, ref)
    weights, cores = randn(*ref.shape, seed=7), dict(enumerate(cores_of(model)))
    grads = [torch.autograd.grad((out * weights).sum(), list(cores.values())) for out in (got, ref)]
    assert_gradients_near(*(dict(zip(cores, each, strict=True)) for each in grads))


def fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(cores_of(model), lr=0.1, fused=True)
    model(X).square().sum().backward()
    answer(model)  # between backward and step
    optimizer.step()


def add_to_data(model: nn.Module) -> None:
    for values in cores_of(model):
        values.data.add_(randn(*values.shape, seed=9), alpha=0.1)


def copy_average(model: nn.Module) -> None:  # as the moving averages of diffusers and others do
    for values in cores_of(model):
        values.data.copy_(0.9 * values.data)


def set_vector_twice(model: nn.Module) -> None:
    vector = parameters_to_vector(cores_of(model)).detach().clone()
    vector_to_parameters(vector, cores_of(model))  # from here on the cores are views of it
    answer(model)
    vector.mul_(2)
    vector_to_parameters(vector, cores_of(model))


def write_in_another_process(model: nn.Module) -> None:
    model.share_memory()
    views = [values.detach().numpy() for values in cores_of(model)]
    answer(model)
    with warnings.catch_warnings(action="ignore"):  # of threads, which the child does not use
        child = os.fork()
    if child == 0:
        for view in views:
            view *= 2
        os._exit(0)
    os.waitpid(child, 0)


def replace_a_train(model: nn.Module) -> None:
    layer = layers_of(model)[0]
    part = next(getattr(layer, name) for name in layer.adapter_layer_names)
    other = type(part["default"])(part["default"].shape, dtype=torch.float64)
    randomise(other.parameters(), seed=8)
    part["default"] = other


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "a fused step": fused_step,
    "data": add_to_data,
    "a moving average": copy_average,
    "a vector, twice": set_vector_twice,
    "another train": replace_a_train,
    "another process": write_in_another_process,
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@every_method
@every_write
def test_a_write_that_is_not_counted(method, write):
    if write is write_in_another_process and not hasattr(os, "fork"):
        pytest.skip("no processes that share memory by fork here")
    model = adapted(method)
    before = answer(model)
    write(model)
    assert not torch.allclose(answer(model), before)
    assert_fresh(model)


@every_method
def test_every_perturbation_is_seen(method):
    """MeZO: the loss with the cores shifted one way and the other, by writes to their data."""
    model, seen = adapted(method), []
    for number in range(6):
        shifts = [randn(*values.shape, seed=number) for values in cores_of(model)]
        for factor in (0.1, -0.2):
            for values, shift in zip(cores_of(model), shifts, strict=True):
                values.data.add_(shift, alpha=factor)
            seen.append(answer(model))
            assert_near("the shifted answer", seen[-1], expected(model, X))
    assert not any(torch.equal(seen[k], seen[k + 1]) for k in range(len(seen) - 1))


# Errors in the middle


class Broken(BaseException):
    """As KeyboardInterrupt, which the hooks of torch do not see, but no reason for pytest to stop."""


def before_every_train(patch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Have something done before the joint contraction comes to a train; a shared one counts for its two sides."""

    def then(function: Callable) -> Callable:
        def call(*args):
            do()
            return function(*args)

        return call

    patch.setattr(joint, "halves", then(joint.halves))
    patch.setattr("loretta.tuners.shared.layer.take_apart", then(then(take_apart)))


@contextmanager
def broken(monkeypatch, error: type[BaseException], at: int):
    """In it the joint contraction fails at its ``at``-th train."""
    count = iter(range(1, 10**6))

    def fail() -> None:
        if next(count) == at:
            raise error("on purpose")

    with monkeypatch.context() as patch:
        before_every_train(patch, fail)
        yield


every_error = pytest.mark.parametrize("error", [Broken, torch.OutOfMemoryError])


@every_method
@every_error
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("serves", [True, False])
def test_an_error_in_the_contraction(method, error, at, grad, serves, monkeypatch):
    model = adapted(method)
    answer(model)
    add_to_data(model)
    with loretta.serving(model) if serves else nullcontext():
        with broken(monkeypatch, error, at), torch.set_grad_enabled(grad), pytest.raises(error):
            model(X)
        assert_fresh(model)
    assert_fresh(model)


@every_method
@every_error
@pytest.mark.parametrize("grad", [True, False])
def test_an_error_in_the_model(method, error, grad):
    model, fails = adapted(method), [True]
    one, two = layers_of(model)

    def fail(*_) -> None:
        if fails[0]:
            raise error("on purpose")

    two.register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grad), pytest.raises(error):
        model(X)
    add_to_data(model)
    fails[0] = False
    for layer in (one, two):  # on their own: not in the call that has failed
        with torch.set_grad_enabled(grad):
            assert_near("a layer", layer(X), by_hand(layer, X))
    assert_fresh(model)


def test_an_error_before_the_call_begins():
    """A call within a call, which another hook stops before ours has seen it, ends no call but its own."""
    model, depth = adapted("rep"), [0]
    base, (one, two) = model.get_base_model(), layers_of(model)
    counted = []

    def stop(*_) -> None:
        if depth[0]:
            raise ValueError("on purpose")

    base.register_forward_pre_hook(stop, prepend=True)

    def call_again(*_) -> None:
        depth[0] += 1
        with pytest.raises(ValueError, match="on purpose"):
            base(X)
        depth[0] -= 1
        counted.append(contraction.find_factors(two, "default", 0))

    one.register_forward_hook(call_again)
    assert_near("the outer call", answer(model), expected(model, X))
    assert counted[0] is not None
    assert contraction.find_factors(two, "default", 0) is None


# Recordings


@every_method
def test_an_exported_program_holds_the_cores(method):
    model = adapted(method)
    answer(model)
    exported = torch.export.export(model, (X,), strict=False).module()
    values = {key: 0.5 * value if key.endswith(".values") else value for key, value in exported.state_dict().items()}
    assert sum(key.endswith(".values") for key in values) == len(cores_of(model))
    exported.load_state_dict(values)
    for p in cores_of(model):
        p.data.mul_(0.5)
    assert_near("the exported program", exported(X), expected(model, X))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # that sizes are fixed from here on
@every_method
@pytest.mark.parametrize("serves", [True, False])
def test_a_traced_module_holds_the_cores(method, serves):
    model = adapted(method)
    answer(model)
    with loretta.serving(model) if serves else nullcontext():
        answer(model)
        traced = torch.jit.trace(model, (X,), check_trace=False)
    add_to_data(model)
    assert_near("the trace", traced(X), expected(model, X))


# Serving

CHANGED = r"adapter 'default' was changed inside loretta.serving"

COUNTED: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda model: [p.mul_(2) for p in cores_of(model)],
    "load_state_dict": lambda model: model.load_state_dict(
        {name: 2 * value if name.endswith(".values") else value for name, value in model.state_dict().items()}
    ),
    "load_state_dict, assigned": lambda model: model.load_state_dict(
        {name: 2 * value if name.endswith(".values") else value for name, value in model.state_dict().items()},
        assign=True,
    ),
    "another scale": lambda model: [layer.scaling.update(default=9.0) for layer in layers_of(model)],
    "another tensor": lambda model: [setattr(p, "data", 2 * p.data) for p in cores_of(model)],
}


def count_contractions(monkeypatch) -> list[None]:
    calls: list[None] = []

    before_every_train(monkeypatch, lambda: calls.append(None))
    return calls


@every_method
def test_serving_contracts_once(method, monkeypatch):
    model = adapted(method)
    calls = count_contractions(monkeypatch)
    with loretta.serving(model):
        for _ in range(3):
            assert_near("answer", answer(model), expected(model, X))
            with torch.inference_mode():
                assert_near("answer", model(X), expected(model, X))
        assert len(calls) == 2  # down and up of a group of equal trains
        assert_fresh(model)
        assert len(calls) == 4  # a call with gradients has a contraction of its own
    answer(model)
    assert len(calls) == 6


@every_method
def test_each_precision_is_served_with_factors_of_its_own(method):
    model = adapted(method).float()
    x, plain = X.float(), []
    with loretta.serving(model), torch.no_grad():
        for _ in range(2):
            plain.append(model(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert_near("in bfloat16", model(x), plain[0].bfloat16())
    assert torch.equal(*plain)


@every_method
@pytest.mark.parametrize("write", COUNTED.values(), ids=COUNTED)
def test_a_write_while_serving_is_refused_at_the_next_call(method, write):
    model = adapted(method)
    before = [values.detach().clone() for values in cores_of(model)]
    with loretta.serving(model):
        answer(model)
        with torch.no_grad():
            write(model)
        with pytest.raises(InputError, match=CHANGED):
            answer(model)
        for layer in layers_of(model):
            layer.scaling["default"] = SCALE
        if write is not COUNTED["another scale"]:  # which is back where it was
            with pytest.raises(InputError, match=CHANGED):
                answer(model)
        for value, values in zip(before, cores_of(model), strict=True):
            values.data.copy_(value)
    assert_fresh(model)


@every_method
@pytest.mark.parametrize("write", [add_to_data, copy_average, write_in_another_process])
def test_a_write_that_is_not_counted_is_told_when_serving_ends(method, write):
    if write is write_in_another_process and not hasattr(os, "fork"):
        pytest.skip("no processes that share memory by fork here")
    model = adapted(method).share_memory()
    block = loretta.serving(model)
    block.__enter__()
    answer(model)
    write(model)
    with pytest.raises(InputError, match=CHANGED):
        block.__exit__(None, None, None)
    assert_fresh(model)


def test_an_error_while_serving_is_the_one_that_is_raised():
    model = adapted("rep")

    def run() -> None:
        with loretta.serving(model):
            answer(model)
            add_to_data(model)
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        run()
    assert_fresh(model)


def test_cores_that_are_not_finite_are_not_taken_for_a_write():
    model = adapted("rep")
    cores_of(model)[0].data[0] = float("nan")
    with loretta.serving(model):
        answer(model)


@every_method
def test_adapters_are_switched_and_added_while_serving(method, monkeypatch):
    model = adapted(method)
    scale = {"scaling": SCALE} if method == "adp" else {"lora_alpha": SCALE * 3}
    before = answer(model)
    with loretta.serving(model):
        answer(model)
        model.add_adapter("other", config_for(method, target_modules=["one", "two"], **scale))
        model.double()
        randomise([p for name, p in model.named_parameters() if ".other." in name], seed=8)
        calls = count_contractions(monkeypatch)
        for _ in range(3):
            model.set_adapter("other")
            one, two = layers_of(model)
            assert_near("other", answer(model), by_hand(two, torch.tanh(by_hand(one, X, "other")), "other"))
            model.set_adapter("default")
            assert_near("default", answer(model), before)
        with model.disable_adapter():
            answer(model)
        assert len(calls) == 2  # the other, once


def test_serving_within_serving():
    model = adapted("rep")
    with loretta.serving(model):
        first = answer(model)
        with loretta.serving(model):
            assert torch.equal(answer(model), first)
        assert torch.equal(answer(model), first)
    add_to_data(model)
    assert_fresh(model)


def test_a_copy_of_a_model_that_serves_is_free():
    model = adapted("rep")
    with loretta.serving(model):
        before = answer(model)
        copied = copy.deepcopy(model)
        add_to_data(copied)
        assert_fresh(copied)
        assert torch.equal(answer(model), before)


def test_serving_needs_an_adapter():
    with pytest.raises(InputError, match="this Two has no LoRETTA adapter"), loretta.serving(Two()):
        pass


# One generation is one call

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}


@every_method
@pytest.mark.parametrize("way", ["peft", "native"])
def test_generations_see_what_was_written_between_them(method, way, monkeypatch):
    if way == "peft":
        model, inputs = wrap("llama", method)
    else:
        model, inputs = build("llama")
        model.add_adapter(config_for(method, target_modules=["q_proj", "down_proj"]))
    randomise([p for name, p in model.named_parameters() if "loretta_" in name], seed=3, scale=0.5)
    model.double().eval()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    calls, seen = count_contractions(monkeypatch), []
    for factor in (1.0, 3.0, 0.2):
        for values in cores_of(model):
            values.data.mul_(factor)
        calls.clear()
        seen.append(model.generate(**inputs, **OPTIONS))
        kinds = {(p.down, p.up) for layer in layers_of(model) for p in layer.placements.values()}
        assert len(calls) == 2 * len(kinds)
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"]
        for _ in range(OPTIONS["max_new_tokens"]):  # by hand, each call on the whole text
            with torch.no_grad():
                token = model(input_ids=ids, attention_mask=mask).logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        assert torch.equal(seen[-1], ids)
    assert not all(torch.equal(seen[0], other) for other in seen[1:])


def test_generate_keeps_its_name_and_signature():
    import inspect

    model, _ = build("llama")
    plain = inspect.signature(model.generate), model.generate.__name__, model.generate.__doc__
    peft_model = get_peft_model(model, config_for("rep"))
    assert (inspect.signature(model.generate), model.generate.__name__, model.generate.__doc__) == plain
    peft_model.unload()
    assert "generate" not in vars(model)
