"""One model in several threads: every call computes what it computes alone, and none leaves anything behind."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from tuners.families import logits
from tuners.wrapped import every_method, trainable, trained, wrap

import loretta
from loretta.tuners.layer import LorettaLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
PATIENCE_S = 300  # after which a barrier gives up, and the test fails


class Meeting:
    """A barrier in the middle of a model: in the first pass of each call all threads are there at once."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.barrier = threading.Barrier(threads, timeout=PATIENCE_S)
        self.left = threading.local()
        layers = [module for module in model.modules() if isinstance(module, LorettaLayer)]
        self.handle = layers[len(layers) // 2].register_forward_pre_hook(self.meet)

    def meet(self, *_) -> None:
        if getattr(self.left, "calls", 0):  # not in a recomputation
            self.left.calls -= 1
            self.barrier.wait()

    def around(self, work: Callable[[], object]) -> Callable[[], object]:
        """``work``, whose first call of the model meets the others."""

        def meeting() -> object:
            self.left.calls = 1
            return work()

        return meeting


def run_together(model: nn.Module, *works: Callable[[], object]) -> list:
    """The results of works that all call ``model``, each in a thread of its own, all in the middle at once."""
    meeting = Meeting(model, len(works))
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            futures = [pool.submit(meeting.around(work)) for work in works]
            return [future.result(PATIENCE_S) for future in futures]
    finally:
        meeting.handle.remove()


def adapted(method: str, checkpoint: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = wrap("llama", method, train_norms=False)
    trained(model).double()
    if checkpoint != "none":
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpoint == "reentrant"})
        model.enable_input_require_grads()
    return model, inputs


every_checkpoint = pytest.mark.parametrize("checkpoint", ["none", "not reentrant", "reentrant"])


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one loss, not added to any other thread's."""
    named = trainable(model)
    pending = model(**inputs).logits.square().sum()
    model_grads: dict[str, Tensor] = {}

    def add(gradient: Tensor, name: str) -> None:
        model_grads[name] = model_grads[name] + gradient if name in model_grads else gradient.clone()

    # reentrant checkpoints know only backward(), which adds to the parameters: to a shared train in every block
    handles = [p.register_hook(partial(add, name=name)) for name, p in named.items()]
    try:
        pending.backward()
    finally:
        for handle in handles:
            handle.remove()
    return model_grads


@every_method
@every_checkpoint
def test_an_evaluating_thread_beside_a_training_one(method, checkpoint):
    model, inputs = adapted(method, checkpoint)
    other = {name: value[:2] for name, value in inputs.items()}
    ref, ref_logits = gradients(model, inputs), logits(model, other)
    for _ in range(3):
        got, got_logits, also = run_together(
            model,
            lambda: gradients(model, inputs),
            lambda: logits(model, other),
            lambda: logits(model, other),
        )
        assert_gradients_near(got, ref)
        assert_near("logits", got_logits, ref_logits)
        assert_near("logits", also, ref_logits)


@every_method
@every_checkpoint
def test_two_training_threads(method, checkpoint):
    model, inputs = adapted(method, checkpoint)
    other = {name: value.flip(0)[:2] for name, value in inputs.items()}
    together: dict[str, Tensor] = {}
    for batch in (inputs, other):
        for name, grad in gradients(model, batch).items():
            together[name] = together.get(name, 0) + grad
    for _ in range(3):
        model.zero_grad()
        run_together(
            model,
            lambda: model(**inputs).logits.square().sum().backward(),
            lambda: model(**other).logits.square().sum().backward(),
        )
        assert_gradients_near({name: p.grad for name, p in trainable(model).items()}, together)


@every_method
def test_steps_beside_a_server(method):
    """Each round a step is taken in one thread, after which the other's answer is that of the new values."""
    model, inputs = adapted(method, "none")
    alone, _ = adapted(method, "none")
    alone.load_state_dict(model.state_dict())
    named, named_alone = trainable(model), trainable(alone)
    optimizers = [torch.optim.AdamW(list(each.values()), lr=1e-2, fused=True) for each in (named, named_alone)]
    for _ in range(3):
        model.zero_grad()
        alone.zero_grad()
        _, before = run_together(
            model, lambda: model(**inputs).logits.square().sum().backward(), lambda: logits(model, inputs)
        )
        alone(**inputs).logits.square().sum().backward()
        assert_near("before the step", before, logits(alone, inputs))
        for optimizer in optimizers:
            optimizer.step()
        got, also = run_together(model, lambda: logits(model, inputs), lambda: logits(model, inputs))
        ref = logits(alone, inputs)
        assert_near("after the step", got, ref)
        assert_near("after the step", also, ref)
    # and nothing is left of the threads
    assert_near("after all", logits(model, inputs), logits(alone, inputs))


@every_method
def test_a_generation_beside_a_training(method):
    model, inputs = adapted(method, "none")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}
    ref, ref_text = gradients(model, inputs), model.generate(**prompt, **options)
    got, text = run_together(model, lambda: gradients(model, inputs), lambda: model.generate(**prompt, **options))
    assert_gradients_near(got, ref)
    assert torch.equal(text, ref_text)


@every_method
def test_serving_in_many_threads(method):
    model, inputs = adapted(method, "none")
    ref = logits(model, inputs)

    def in_inference_mode() -> Tensor:
        with torch.inference_mode():
            return model(**inputs).logits

    with loretta.serving(model):
        for _ in range(2):
            works = [in_inference_mode, *[lambda: logits(model, inputs)] * 3]
            for got in run_together(model, *works):
                assert_near("logits", got, ref)
        got, training = run_together(model, in_inference_mode, lambda: gradients(model, inputs))
    assert_near("logits", got, ref)
    assert_gradients_near(training, gradients(model, inputs))


@every_method
@every_checkpoint
def test_the_backward_pass_on_another_thread(method, checkpoint):
    """As that of a GPU: what was computed in the first pass is found from the pass, not from the thread."""
    model, inputs = adapted(method, checkpoint)
    ref = gradients(model, inputs)
    for _ in range(2):
        model.zero_grad()
        pending = model(**inputs).logits.square().sum()
        logits(model, {name: value[:2] for name, value in inputs.items()})
        with ThreadPoolExecutor(1) as pool:
            pool.submit(pending.backward).result(PATIENCE_S)
        assert_gradients_near({name: p.grad for name, p in trainable(model).items()}, ref)


@every_method
@every_checkpoint
def test_one_pass_waits_while_others_come_and_go(method, checkpoint):
    model, inputs = adapted(method, checkpoint)
    ref = gradients(model, inputs)
    model.zero_grad()
    pending = model(**inputs).logits.square().sum()
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(logits, model, inputs), pool.submit(lambda: model(**inputs).logits.sum())]
        for other in others:
            other.result(PATIENCE_S)
    pending.backward()
    assert_gradients_near({name: p.grad for name, p in trainable(model).items()}, ref)


@every_method
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_mixed_batches_beside_each_other_and_beside_a_plain_call(family, method):
    """Norms and a head too: the names that one call gives to its rows are no other call's."""
    model, inputs = wrap(family, method)
    trained(model).add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    trained(model, seed=2).double().eval()
    first, second = ["default", "other", "__base__", "other"], ["other", "default", "default", "__base__"]

    def answer(names: list[str] | None) -> Tensor:
        return logits(model, inputs, **({} if names is None else {"adapter_names": names}))

    expected = [answer(names) for names in (first, second, None)]
    assert not torch.allclose(expected[0], expected[1])
    for _ in range(3):
        for got, ref in zip(
            run_together(model, *(partial(answer, names) for names in (first, second, None))), expected, strict=True
        ):
            assert_near("logits", got, ref)
    assert_near("after all", answer(None), expected[2])
