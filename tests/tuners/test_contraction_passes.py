"""The joint contraction in passes that overlap: checkpoints, evaluations between, a layer on its own, errors."""

import pytest
import torch
from peft import PeftModel
from tolerances import assert_gradients_near
from torch import Tensor, nn
from tuners.contracted import (
    adapted,
    adapted_rows,
    apart,
    assert_fresh,
    assert_trained_near,
    gradients,
    loss,
    step,
    values_of,
    weighted,
    write_in_place,
)
from tuners.families import logits
from tuners.wrapped import config_for, every_method, layers_of, trainable, trained

from loretta import get_peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning"),
    # of a checkpoint in an evaluation
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


every_checkpoint = pytest.mark.parametrize(
    "use_reentrant", [None, False, True], ids=["no checkpoint", "not reentrant", "reentrant"]
)


def checkpointed(model: PeftModel, use_reentrant: bool | None) -> PeftModel:
    if use_reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    return model


def two_forwards(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    shorter = {name: value[:2] for name, value in inputs.items()}
    (loss(model, inputs) + loss(model, shorter)).backward()


def evaluate_between(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    pending = loss(model, inputs)
    logits(model, inputs)
    pending.backward()


def switch_between(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    pending, mode = loss(model, inputs), model.training
    model.eval()
    logits(model, inputs)
    model.train(mode)
    pending.backward()


def part_between(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    pending, layer = loss(model, inputs), layers_of(model)[-1]
    x = torch.ones(2, layer.in_features, dtype=torch.float64)
    (pending + weighted(layer(x))).backward()


def unfrozen_pass_within(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    """As reentrant checkpointing does, but for good: one call of a block without gradients, in a call with them."""
    layer = layers_of(model)[0]
    x = torch.ones(2, layer.in_features, dtype=torch.float64)

    def call(module: nn.Module, args) -> None:
        with torch.no_grad():
            layer(x)

    with_call = model.get_base_model().register_forward_pre_hook(call)
    loss(model, inputs).backward()
    with_call.remove()


def without_checkpointing_between(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    pending, mode = loss(model, inputs), model.training
    with model.disable_adapter():
        logits(model, inputs)
    model.eval()
    pending = pending + loss(model, inputs)
    model.train(mode)
    pending.backward()


PASSES = {
    "one": lambda model, inputs: loss(model, inputs).backward(),
    "two": two_forwards,
    "evaluation between": evaluate_between,
    "eval and train between": switch_between,
    "a part between": part_between,
    "a part without gradients": unfrozen_pass_within,
    "another without checkpointing": without_checkpointing_between,
}


@every_method
@every_checkpoint
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_gradients_of_overlapping_passes(method, use_reentrant, passes):
    model, inputs = adapted("gpt2", method)
    with apart(model):
        ref = gradients(model, lambda: passes(model, inputs))
    checkpointed(model, use_reentrant)
    for _ in range(2):
        assert_trained_near(gradients(model, lambda: passes(model, inputs)), ref)


@every_method
@every_checkpoint
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_checkpointing_changes_no_gradient(family, method, use_reentrant, contractions):
    init = {"init_weights": "denoised"} if family == "llama" else {}
    model, inputs = adapted(family, method, **init)
    with apart(model):
        ref = gradients(model, lambda: loss(model, inputs).backward())
    checkpointed(model, use_reentrant)
    contractions.clear()
    assert_trained_near(gradients(model, lambda: loss(model, inputs).backward()), ref)
    # only reentrant checkpoints walk through a graph of their own
    assert (contractions["alone"] > 0) is (use_reentrant is True)


@every_method
@every_checkpoint
def test_an_encoder_on_its_own_after_a_step_of_the_model(method, use_reentrant):
    model, inputs = adapted("t5", method)
    checkpointed(model, use_reentrant)
    encoder = model.get_base_model().get_encoder()
    step(model, inputs)
    embeddings = encoder.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def run() -> None:
        weighted(encoder(inputs_embeds=embeddings).last_hidden_state).backward()

    got = gradients(model, run)
    model.gradient_checkpointing_disable()
    with apart(model):
        assert_trained_near(got, gradients(model, run))


@every_method
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model(method, use_reentrant):
    model, inputs = adapted("gpt2", method)
    embeddings = model.get_base_model().get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def out(x: Tensor) -> Tensor:
        return model(inputs_embeds=x).logits

    def run() -> None:
        weighted(torch.utils.checkpoint.checkpoint(out, embeddings, use_reentrant=use_reentrant)).backward()

    with apart(model):
        ref = gradients(model, lambda: weighted(out(embeddings)).backward())
    for _ in range(2):
        assert_trained_near(gradients(model, run), ref)


class Indexed(nn.Module):
    """As sparse attention: the first layer of a checkpointed block computes without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, use_reentrant: bool | None = None) -> Tensor:
        if use_reentrant is None:
            return self.block(x)
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=use_reentrant)

    def block(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            order = self.first(x).argsort(-1)
        return torch.tanh(self.second(x.gather(-1, order)))


@every_method
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_first_layer_of_a_checkpoint_may_have_no_gradient(use_reentrant, method):
    model = trained(get_peft_model(Indexed().double(), config_for(method, target_modules=["first", "second"])).eval())
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    found = []
    for each in (None, use_reentrant):
        model.zero_grad()
        model(x, use_reentrant=each).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None and p.grad.any()})
    assert_gradients_near(*found)


@every_method
def test_a_layer_on_its_own(method):
    model, inputs = adapted("llama", method)
    layer = layers_of(model)[0]
    x = torch.ones(2, layer.in_features, dtype=torch.float64)
    first = layer(x)
    step(model, inputs)
    with apart(model):
        ref = layer(x)
    got = layer(x)
    assert torch.equal(got, ref)
    assert not torch.equal(got, first)
    logits(model, inputs)
    write_in_place(model, inputs)
    with torch.no_grad():
        got = layer(x)
        with apart(model):
            assert torch.equal(got, layer(x))


@every_method
def test_gradients_asked_for_within_a_call_without(method):
    model, inputs = adapted("llama", method)
    step(model, inputs)
    layer, grads = layers_of(model)[0], []
    x = torch.ones(2, layer.in_features, dtype=torch.float64)

    def guide(*_) -> None:
        with torch.enable_grad():
            grads.append(torch.autograd.grad(weighted(layer(x)), values_of(layer)))

    handle = layers_of(model)[1].register_forward_hook(guide)
    logits(model, inputs)
    handle.remove()
    ref = torch.autograd.grad(weighted(layer(x)), values_of(layer))
    assert_gradients_near(dict(enumerate(grads[0])), dict(enumerate(ref)))


@every_method
@pytest.mark.parametrize("grad", [True, False])
def test_an_error_leaves_nothing_switched_on(method, grad):
    model, inputs = adapted("llama", method)
    layer = layers_of(model)[0]

    def fail(*_) -> None:
        raise RuntimeError("on purpose")

    handle = layers_of(model)[-1].register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="on purpose"):
        model(**inputs)
    handle.remove()
    write_in_place(model, inputs)
    x = torch.ones(2, layer.in_features, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        got = layer(x)
        with apart(model):
            assert torch.equal(got, layer(x))
    assert_fresh(model, inputs)


def test_writing_to_cores_between_the_passes_of_a_layer_is_refused():
    model = adapted_rows("rep")
    layer = layers_of(model)[0]
    out = layer(torch.ones(2, layer.in_features, dtype=torch.float64))
    with torch.no_grad():
        for values in values_of(layer):
            values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
