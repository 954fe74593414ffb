"""A recorded contraction gives what an eager one gives, values and gradients, whatever happens between its calls.

On a GPU the recordings are CUDA graphs; without one a stand-in computes again into the same tensors, as a graph does.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from tolerances import assert_gradients_near, assert_near
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tuners.wrapped import config_for, every_method, trainable, trained, wrap

from loretta.tuners import joint, recorded
from loretta.tuners.contraction import Contraction
from loretta.tuners.recorded import PATIENCE, Recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def as_a_graph(work: recorded.Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Tensors that hold nothing until they are filled, each time at the same place."""
    with torch.enable_grad():
        result = tuple(torch.full_like(tensor, float("nan")) for tensor in work())

    def replay() -> None:
        with torch.enable_grad():
            found = [tensor.detach() for tensor in work()]
        with torch.no_grad():
            for old, new in zip(result, found, strict=True):
                old.copy_(new)

    return result, replay


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(recorded, "record", as_a_graph)
        monkeypatch.setattr(joint, "serves", lambda tensor: True)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Runs what it gets without recordings."""

    def run(work: Callable[[], Tensor]) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(joint, "serves", lambda tensor: False)
            return work()

    return run


def adapted(method: str, family: str = "llama", **options) -> tuple[PeftModel, dict[str, Tensor]]:
    model, inputs = wrap(family, method, **options)
    model = trained(model.double()).to(DEVICE)
    return model, {name: value.to(DEVICE) for name, value in inputs.items()}


def logits(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def made(model: PeftModel) -> list[Recording]:
    known = Contraction.of(model.get_base_model()).recordings.known
    return [each for each in known.values() if isinstance(each, Recording)]


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def losses_and_gradients(model: PeftModel, inputs: dict[str, Tensor], steps: int) -> list[tuple[Tensor, dict]]:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05)
    found = []
    for _ in range(steps):
        loss = logits(model, inputs).square().mean()
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        optimizer.step()
        optimizer.zero_grad()
    return found


CASES = [
    ("rep", "llama", {}),
    ("rep", "llama", {"init_weights": "denoised"}),
    ("rep", "gpt2", {"alpha_pattern": {"h.0.attn.c_attn": 5}}),
    ("adp", "llama", {}),
    ("adp", "bert", {"train_bias": False}),
    ("adp", "llama", {"init_weights": "denoised"}),
    ("shared", "llama", {}),
    ("shared", "bert", {"init_weights": "denoised"}),
]


@pytest.mark.parametrize(("method", "family", "options"), CASES)
def test_steps_are_those_of_an_eager_contraction(method, family, options, never):
    model, inputs = adapted(method, family, **options)
    twin = copy.deepcopy(model)
    steps = PATIENCE + 3
    found = losses_and_gradients(model, inputs, steps)
    expected = never(lambda: losses_and_gradients(twin, inputs, steps))
    assert made(model)
    assert not made(twin)
    for (loss, grads), (ref_loss, ref_grads) in zip(found, expected, strict=True):
        assert_near("loss", loss, ref_loss)
        assert_gradients_near(grads, ref_grads)


@pytest.fixture(params=["rep", "adp", "shared"])
def recorded_model(request: pytest.FixtureRequest) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model whose contraction is recorded, without gradients."""
    model, inputs = adapted(request.param)
    losses_and_gradients(model, inputs, PATIENCE + 1)
    assert made(model)
    return model, inputs


def test_a_call_in_between_with_other_cores_changes_nothing(recorded_model, never):
    model, inputs = recorded_model
    before = copy.deepcopy(model)
    loss = logits(model, inputs).square().mean()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.data.mul_(3)  # a write that torch does not count
    other = logits(model, inputs).square().mean()
    loss.backward()
    found = gradients(model)
    never(lambda: logits(before, inputs).square().mean().backward())
    assert_gradients_near(found, gradients(before))
    model.zero_grad()
    other.backward()
    after = copy.deepcopy(model)
    after.zero_grad()
    never(lambda: logits(after, inputs).square().mean().backward())
    assert_gradients_near(gradients(model), gradients(after))


def test_gradients_add_up_and_a_graph_goes_back_twice(recorded_model, never):
    model, inputs = recorded_model
    twin = copy.deepcopy(model)

    def three(model: PeftModel) -> None:
        loss = logits(model, inputs).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        logits(model, inputs).mean().backward()

    three(model)
    never(lambda: three(twin))
    assert_gradients_near(gradients(model), gradients(twin))


def test_a_gradient_of_the_gradient_is_right(recorded_model, never):
    model, inputs = recorded_model
    twin = copy.deepcopy(model)

    def second(model: PeftModel) -> None:
        parameters = list(trainable(model).values())
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            first = torch.autograd.grad(logits(model, inputs).square().mean(), parameters, create_graph=True)
            torch.stack([grad.square().sum() for grad in first]).sum().backward()

    second(model)
    never(lambda: second(twin))
    assert_gradients_near(gradients(model), gradients(twin))


def test_calls_without_gradients_are_recorded_too(recorded_model, never):
    model, inputs = recorded_model
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = [logits(model, inputs) for _ in range(PATIENCE + 2)]
            reference = never(lambda: logits(model, inputs))
        for each in found:
            assert_near("logits", each, reference)
    assert len(made(model)) > 1
    losses_and_gradients(model, inputs, 1)  # nothing of inference mode is left behind


def test_another_scale_and_another_adapter_have_recordings_of_their_own(recorded_model, never):
    model, inputs = recorded_model
    method = model.peft_config["default"].peft_type.lower().removeprefix("loretta_")
    model.add_adapter("second", config_for(method))
    trained(model, seed=5)
    for change in (
        lambda: model.set_adapter("second"),
        lambda: _scale(model, 3.0),
        lambda: model.set_adapter("default"),
    ):
        change()
        twin = copy.deepcopy(model)
        reference = never(lambda twin=twin: logits(twin, inputs))
        for _ in range(PATIENCE + 2):
            assert_near("logits", logits(model, inputs), reference)
        assert len(made(model)) == 1  # those of other adapters are gone


def _scale(model: PeftModel, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


def test_threads_do_not_meet_in_a_recording(recorded_model, never):
    model, inputs = recorded_model
    batches = [{**inputs, "input_ids": inputs["input_ids"].roll(k, 1)} for k in range(4)]

    def work(batch: dict[str, Tensor]) -> list[Tensor]:
        parameters = list(trainable(model).values())
        return [*torch.autograd.grad(logits(model, batch).square().mean(), parameters)]

    expected = [never(lambda batch=batch: work(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, batches))
    for grads, reference in zip(found, expected, strict=True):
        assert_gradients_near(dict(enumerate(grads)), dict(enumerate(reference)))


def test_frozen_parameters_get_no_gradient(recorded_model, never):
    model, inputs = recorded_model
    names = list(trainable(model))
    model.requires_grad_(False)
    dict(model.named_parameters())[names[-1]].requires_grad_(True)
    twin = copy.deepcopy(model)
    found = losses_and_gradients(model, inputs, PATIENCE + 2)
    expected = never(lambda: losses_and_gradients(twin, inputs, PATIENCE + 2))
    for (_, grads), (_, reference) in zip(found, expected, strict=True):
        assert list(grads) == [names[-1]]
        assert_gradients_near(grads, reference)


@every_method
def test_what_cannot_be_recorded_or_is_large_stays_eager(method, monkeypatch):
    def refuse(work: recorded.Work) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, inputs = adapted(method)
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "MOST_BYTES", 0)
        losses_and_gradients(model, inputs, PATIENCE + 2)
        assert not made(model)
    other, _ = adapted(method)
    monkeypatch.setattr(recorded, "record", refuse)
    losses_and_gradients(other, inputs, PATIENCE + 2)
    assert not made(other)


def test_a_copy_has_no_recordings(recorded_model, never):
    model, inputs = recorded_model
    twin = copy.deepcopy(model)
    assert not made(twin)
    assert_near("logits", logits(twin, inputs), never(lambda: logits(model, inputs)))
