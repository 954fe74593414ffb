"""The joint contraction under what calls its layers: any inputs, transforms, hooks, replicas, offloading, compilers."""

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.func import functional_call
from tuners.contracted import adapted, adapted_rows, apart, assert_trained_near, gradients, loss, values_of, weighted
from tuners.families import build, logits
from tuners.wrapped import config_for, every_method, layers_of, trainable, trained

from loretta import get_peft_model
from loretta.tuners.contraction import Contraction
from loretta.tuners.layer import is_bare_linear


@every_method
def test_a_replica_contracts_for_itself(method, contractions):
    model, inputs = adapted("llama", method)
    replica = model.get_base_model()._replicate_for_data_parallel()  # as DataParallel makes it, on another device
    got = weighted(replica(**inputs).logits)
    assert contractions["alone"]
    assert not contractions["together"]
    assert_near("loss", got, loss(model, inputs))


@every_method
@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)], ids=str)
def test_inputs_of_any_number_of_dimensions(method, shape):
    model = adapted_rows(method)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        out = model(x)
        return out, torch.autograd.grad(weighted(out), x)[0]

    got, got_grad = run()
    with apart(model):
        ref, ref_grad = run()
    assert_near("output", got, ref)
    assert_near("gradient", got_grad, ref_grad)


@every_method
def test_functional_transforms_pass_through(method):
    model = adapted_rows(method)
    x = torch.randn(3, 12, dtype=torch.float64)
    stacked = {name: torch.stack([p.detach(), 1.5 * p.detach()]) for name, p in trainable(model).items()}

    def run(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,))

    with torch.no_grad():
        got = torch.func.vmap(run)(stacked)
        for row in range(2):
            assert_near(f"row {row}", got[row], run({name: values[row] for name, values in stacked.items()}))
    grads = torch.func.grad(lambda values: weighted(run(values)))(dict(trainable(model)))
    assert_trained_near(grads, gradients(model, lambda: weighted(model(x)).backward()))


@every_method
@pytest.mark.parametrize("options", [{"init_weights": "denoised"}, {"train_head": "frozen"}], ids=str)
def test_the_first_training_call_may_be_one_of_a_transform(method, options):
    """What is frozen is looked at in that call, and torch.func lets nobody freeze."""
    if "init_weights" in options and method != "rep":
        options = {}
    model, inputs = adapted("bert", method, task="SEQ_CLS", **options)
    values = {name: value.detach() for name, value in trainable(model).items()}
    got = torch.func.grad(lambda values: weighted(functional_call(model.train(), values, (), inputs).logits))(values)
    assert_trained_near(got, gradients(model, lambda: loss(model, inputs).backward()))


@every_method
def test_transposed_inputs(method):
    model = adapted_rows(method)
    x = torch.randn(12, 2, 3, dtype=torch.float64)
    assert_near("output", model(x.permute(1, 2, 0)), model(x.permute(1, 2, 0).contiguous()))


@every_method
def test_what_a_hook_on_the_base_layer_sees_stays_as_it_is(method):
    model = adapted_rows(method)
    x, seen = torch.randn(3, 12, dtype=torch.float64), []
    base = layers_of(model)[0].get_base_layer()
    base.register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(x)
    assert_near("output of the base", seen[0], x @ base.weight.T + base.bias)
    base._forward_hooks.clear()
    assert_near("output", out, model(x))


WATCHED: dict[str, Callable[[nn.Linear], object]] = {
    "input": lambda linear: linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "output": lambda linear: linear.register_forward_hook(lambda module, args, out: out + 1),
    "gradient": lambda linear: linear.register_full_backward_hook(lambda module, grads, _: grads),
    "gradient of the output": lambda linear: linear.register_full_backward_pre_hook(lambda module, grads: grads),
    "a forward of its own": lambda linear: add_hook_to_module(linear, ModelHook()),  # accelerate, for offloading
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_a_linear_layer_with_hooks_is_called_and_not_replaced_by_a_kernel(watch):
    linear = nn.Linear(12, 8)
    assert is_bare_linear(linear)
    watch(linear)
    assert not is_bare_linear(linear)


@every_method
def test_weights_that_are_plain_tensors_give_the_same_to_the_last_bit(method):
    model = adapted_rows(method)  # as FSDP 1 puts them in place of the parameters
    plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(functional_call(model, plain, (x,)), model(x))


class Elsewhere(nn.Parameter):
    """Stands for a parameter that is sharded, and gathered by whoever uses it."""


@every_method
@pytest.mark.parametrize("called_before", [True, False])
def test_parameters_of_another_kind_are_left_to_their_layer(method, called_before, contractions):
    model, inputs = adapted("llama", method)
    with apart(model):
        ref = logits(model, inputs)
    if called_before:
        logits(model, inputs)
    part = "train" if method == "shared" else "down"
    cores = getattr(layers_of(model)[0], f"loretta_{method}_{part}")["default"]
    cores.values = Elsewhere(cores.values.detach().clone())
    contractions.clear()
    assert_near("logits", logits(model, inputs), ref)
    assert contractions["alone"] == 2 * (len(layers_of(model)) if method == "shared" else 1)
    assert bool(contractions["together"]) is (method != "shared")


def test_offloaded_parameters_are_left_to_their_layer():
    from accelerate import cpu_offload

    model, inputs = adapted("llama", "rep")
    ref = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(values.is_meta for values in values_of(model))
    for _ in range(2):
        assert_near("logits", logits(model, inputs), ref)
    with model.disable_adapter():
        assert_near("base", logits(model, inputs), base)


@pytest.mark.sampled("method", "init_weights")
@every_method
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
def test_compiled_it_is_the_same_and_stays_compiled(method, init_weights):
    options = {"init_weights": init_weights, "rank_pattern": {} if method == "shared" else {"one": 2}}
    model = adapted_rows(method, **options)
    twin = copy.deepcopy(model)
    Contraction.detach(twin.get_base_model())
    x = torch.randn(3, 12, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    stats = torch._dynamo.utils.counters["stats"]

    def results(module: nn.Module, owner: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
        owner.train()
        grads, outs = gradients(owner, lambda: weighted(module(x)).backward()), []
        owner.eval()
        with torch.no_grad():
            for _ in range(2):
                outs.append(module(x))
                for values in values_of(owner):
                    values.mul_(0.9)
        return grads, outs

    for number in range(3):
        graphs = stats["unique_graphs"]
        (got, got_outs), (ref, ref_outs) = results(compiled, model), results(twin, twin)
        assert number < 2 or stats["unique_graphs"] == graphs
        assert_trained_near(got, ref)
        for got_out, ref_out in zip(got_outs, ref_outs, strict=True):
            assert_near("output", got_out, ref_out)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@every_method
def test_a_whole_step_of_a_model_wrapped_on_the_gpu_can_be_recorded(method):
    """No scale may lie on the CPU: a recording takes no copy from there."""
    base, inputs = build("llama", "CAUSAL_LM")
    model = get_peft_model(base.cuda(), config_for(method, task_type="CAUSAL_LM"))
    trained(model)
    x = inputs["input_ids"].cuda()

    def gradients() -> dict[str, Tensor]:
        model(input_ids=x, labels=x).loss.backward()
        return {name: parameter.grad for name, parameter in trainable(model).items()}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gradients()
    graph.replay()
    found = {name: gradient.clone() for name, gradient in recorded.items()}
    model.zero_grad()
    assert_gradients_near(found, gradients())
