"""The joint contraction of a model against its layers contracting one by one: values, gradients, and how often."""

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from draws import seeded
from peft import PeftModel, inject_adapter_in_model
from tolerances import assert_gradients_near, assert_near
from torch import Tensor, nn
from torch.func import functional_call
from tuners.families import build, logits, randomise
from tuners.wrapped import config_for, every_method, trainable, trained, wrap

import loretta
from loretta import get_peft_model
from loretta.layers.shared import take_apart
from loretta.tuners import joint
from loretta.tuners.contraction import Contraction
from loretta.tuners.layer import LorettaLayer, is_bare_linear

FAMILIES = ["bert", "gpt2", "llama", "t5"]
# the first block unlike the others; T5 counts the parts of a block too
FIRST = r"0\..*"


def adapted(family: str, method: str, **options) -> tuple[PeftModel, dict[str, Tensor]]:
    """A trained adapter on a tiny model in float64 without dropout, in eval mode."""
    base = {"dropout_rate": 0.0} if family == "t5" else {}
    model, inputs = wrap(family, method, base=base, **{"train_head": "dense", **options})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return trained(model).double(), inputs


def layers_of(model: nn.Module) -> list[LorettaLayer]:
    return [module for module in model.modules() if isinstance(module, LorettaLayer)]


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Every layer of ``model`` contracts its own trains within."""
    Contraction.detach(base_of(model))
    try:
        yield
    finally:
        Contraction.attach(base_of(model))


def weighted(out: Tensor, seed: int = 7) -> Tensor:
    """A loss that every number of the output enters with a weight of its own."""
    generator = seeded(seed)
    return (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return weighted(model(**inputs).logits)


def gradients(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """What ``run`` leaves as the gradients of everything that trains."""
    model.zero_grad()
    run()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def assert_trained_near(got: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    assert any(".values" in name for name in ref)
    assert_gradients_near(got, ref)


def assert_fresh(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The model computes without gradients what its parameters say now."""
    got = logits(model, inputs)
    with apart(model):
        assert_near("logits", got, logits(model, inputs))


@pytest.fixture
def contractions(monkeypatch) -> Counter:
    """How many trains were contracted "together" (one for all that are equal) and "alone"."""
    count: Counter = Counter()

    def counted(kind: str, halves: Callable) -> Callable:
        def call(values: Tensor, shape):
            count[kind] += 1
            return halves(values, shape)

        return call

    def counted_twice(kind: str) -> Callable:
        return counted(kind, counted(kind, take_apart))  # a shared train has two sides, as others are two trains

    monkeypatch.setattr(joint, "halves", counted("together", joint.halves))
    monkeypatch.setattr("loretta.layers.trains.halves", counted("alone", loretta.layers.trains.halves))
    monkeypatch.setattr("loretta.tuners.shared.layer.take_apart", counted_twice("together"))
    monkeypatch.setattr("loretta.layers.shared.take_apart", counted_twice("alone"))
    return count


# Equal to each layer alone

KINDS: dict[str, dict[str, dict]] = {
    "rep": {
        "plain": {},
        "other ranks": {"rank_pattern": {FIRST: 2}},
        "other scales": {"alpha_pattern": {FIRST: 5}},
        "denoised": {"init_weights": "denoised", "alpha_pattern": {FIRST: 5}},
        "trained biases of the base": {"bias": "all"},
        "all linear": {"target_modules": "all-linear", "r": 2},
    },
    "shared": {
        "plain": {},
        "other scales": {"alpha_pattern": {FIRST: 5}},
        "denoised": {"init_weights": "denoised", "alpha_pattern": {FIRST: 5}},
        "all linear": {"target_modules": "all-linear"},
    },
    "adp": {
        "plain": {},
        "other ranks": {"rank_pattern": {FIRST: 2}, "scaling": 0.3},
        "no biases": {"train_bias": False},
        "denoised": {"init_weights": "denoised", "scaling": 0.3},
        "denoised, no biases": {"init_weights": "denoised", "train_bias": False},
        "trained biases of the base": {"bias": "all"},
        "all linear": {"target_modules": "all-linear", "insert_before": ["c_attn", "q_proj", "query", "q"]},
    },
}


@pytest.mark.parametrize(("method", "kind"), [(method, kind) for method in KINDS for kind in KINDS[method]])
@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_each_alone(family, method, kind, contractions):
    model, inputs = adapted(family, method, **KINDS[method][kind])
    embeddings = model.get_base_model().get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    inputs["inputs_embeds"] = embeddings

    def run() -> dict[str, Tensor]:
        embeddings.grad = None
        return gradients(model, lambda: loss(model, inputs).backward()) | {"input": embeddings.grad}

    with apart(model):
        ref, ref_logits = run(), logits(model, inputs)
    assert contractions["alone"]
    assert not contractions["together"]
    contractions.clear()
    got, got_logits = run(), logits(model, inputs)
    assert contractions["together"]
    assert not contractions["alone"]
    assert_near("logits", got_logits, ref_logits)
    assert_trained_near(got, ref)


@every_method
def test_a_call_contracts_each_kind_of_trains_once(method, contractions):
    model, inputs = adapted("llama", method, target_modules=["q_proj", "v_proj", "o_proj"])
    kinds = {(p.down, p.up) for layer in layers_of(model) for p in layer.placements.values()}
    assert len(kinds) == 2 < len(layers_of(model))  # v is narrower: its heads are shared
    for call in range(4):
        with torch.set_grad_enabled(call % 2 == 0):
            model(**inputs)
        assert contractions == {"together": 2 * len(kinds) * (call + 1)}


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_generation_contracts_once(family, method, contractions):
    model, inputs = adapted(family, method)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    got = model.generate(**inputs, **options)
    once = contractions["together"]
    assert once == 2 * len({(p.down, p.up) for layer in layers_of(model) for p in layer.placements.values()})
    # T5's encoder is called by itself, before the model
    in_encoder = len(layers_of(model.get_base_model().encoder)) if family == "t5" else 0
    assert contractions["alone"] == 2 * in_encoder
    assert torch.equal(model.generate(**inputs, **options), got)
    assert contractions["together"] == 2 * once
    with apart(model):
        assert torch.equal(model.generate(**inputs, **options), got)


# Never out of date

Change = Callable[[PeftModel, dict[str, Tensor]], object]


def values_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in trainable(model).items() if name.endswith(".values")]


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    loss(model, inputs).backward()
    torch.optim.SGD(values_of(model), lr=1e-3).step()


def doubled(model: nn.Module) -> dict[str, Tensor]:
    return {name: 2 * v if name.endswith(".values") else v for name, v in model.state_dict().items()}


def write_in_place(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        values_of(model)[0].mul_(2)


def write_in_inference_mode(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        values_of(model)[-1].mul_(2)


def write_biases(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    randomise([p for name, p in trainable(model).items() if "loretta_" in name and p.dim() == 1], seed=5)


def assign_data(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    for values in values_of(model):
        values.data = 2 * values.data


CHANGES: dict[str, Change] = {
    "optimizer step": step,
    "load_state_dict": lambda model, _: model.load_state_dict(doubled(model)),
    "load_state_dict, assigned": lambda model, _: model.load_state_dict(doubled(model), assign=True),
    "in place": write_in_place,
    "in place, in inference mode": write_in_inference_mode,
    "in place, all": write_biases,
    "data assigned": assign_data,
    "data written": lambda model, _: [p.data.mul_(2) for p in values_of(model)],
    "rounded and back": lambda model, _: model.bfloat16().double(),
    "disabled": lambda model, _: model.base_model.disable_adapter_layers(),
    "other scaling": lambda model, _: layers_of(model)[0].scaling.update(default=9.0),
    "other rounding": lambda model, _: model.to(torch.bfloat16),
}


@every_method
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(method, change, contractions):
    model, inputs = adapted("llama", method, train_norms=False)
    before = logits(model, inputs)
    assert torch.equal(logits(model, inputs), before)
    change(model, inputs)
    contractions.clear()
    after = logits(model, inputs)
    assert not contractions["alone"]
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert_fresh(model, inputs)


@every_method
def test_switching_on_autocast_is_seen(method, contractions):
    model, inputs = adapted("llama", method)
    model.float()
    plain = logits(model, inputs)
    contractions.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, inputs)
        assert contractions["together"]
        with apart(model):
            ref = logits(model, inputs)
    assert_near("logits", got, ref)
    assert torch.equal(logits(model, inputs), plain)
    assert not torch.equal(got, plain)


def test_scales_keep_the_precision_of_the_model():
    model, inputs = adapted("llama", "rep", alpha_pattern={FIRST: 5})
    model.float()
    logits(model, inputs)
    assert_fresh(model.double(), inputs)


@every_method
def test_gradients_under_autocast(method, contractions):
    model, inputs = adapted("bert", method)
    model.float()

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**inputs).logits
        weighted(out.double()).backward()

    got = gradients(model, run)
    assert not contractions["alone"]
    with apart(model):
        ref = gradients(model, run)
    # sums over the batch, rounded to bfloat16 on the way through the factors in either case
    assert_gradients_near({name: grad.bfloat16() for name, grad in got.items()}, ref)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
@every_method
def test_changes_of_what_is_active_are_seen(method, contractions):
    model, inputs = adapted("llama", method, train_norms=False)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", train_norms=False, tensor_rank=2))
    model.double().set_adapter("other")
    trained(model, seed=2)
    seen = []
    for names in ("default", "other", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        seen.append(logits(model, inputs))
        assert_fresh(model, inputs)
    assert torch.equal(seen[0], seen[3])
    assert not any(torch.equal(one, other) for one, other in pairwise(seen))
    loretta.rename_adapter(model, "default", "renamed")
    assert torch.equal(logits(model, inputs), seen[0])
    loretta.rename_adapter(model, "renamed", "default")
    assert torch.equal(logits(model, inputs), seen[0])
    contractions.clear()
    with model.disable_adapter():
        model(**inputs)
    assert not contractions
    assert torch.equal(logits(model, inputs), seen[0])
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), seen[1])
    assert contractions["together"]
    assert not contractions["alone"]


def test_merging_and_unmerging_are_seen(contractions):
    model, inputs = adapted("llama", "rep", train_norms=False)
    before = logits(model, inputs)
    model.merge_adapter()
    contractions.clear()
    assert_near("merged", logits(model, inputs), before)
    assert not contractions
    model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), before)
    assert contractions["together"]


@every_method
def test_swapping_in_an_adapter_is_seen(method, tmp_path):
    model, inputs = adapted("llama", method)
    before = logits(model, inputs)
    other, _ = wrap("llama", method, train_head="dense", **{"scaling" if method == "adp" else "lora_alpha": 2.0})
    trained(other, seed=5).save_pretrained(tmp_path)
    loretta.hotswap_adapter(model, tmp_path)
    assert not torch.equal(logits(model, inputs), before)
    assert_fresh(model, inputs)


@every_method
def test_parameters_that_others_put_in_place_are_seen(method):
    model, inputs = adapted("llama", method, train_norms=False)

    name = next(name for name in trainable(model) if name.endswith(".values"))

    @torch.no_grad()
    def scaled(factor: float) -> Tensor:
        # gone at the next call, whose tensor may get its address
        value = factor * model.get_parameter(name)
        return functional_call(model, {name: value}, args=(), kwargs=inputs).logits

    def outs() -> list[Tensor]:
        return [scaled(1 + 0.1 * k) for k in range(4)]

    got = outs()
    with apart(model):
        ref = outs()
    for k in range(4):
        assert_near(f"call {k}", got[k], ref[k])
    assert not any(torch.equal(one, other) for one, other in pairwise(got))


@every_method
def test_inference_mode(method):
    scales = {"alpha_pattern": {FIRST: 5}} if method != "adp" else {}
    model, inputs = adapted("llama", method, **scales)
    with torch.inference_mode():
        first = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, first)
    assert torch.equal(logits(model, inputs), first)
    assert gradients(model, lambda: loss(model, inputs).backward())
    with torch.inference_mode():
        copied = copy.deepcopy(model)  # its parameters are inference tensors, which count no versions
        copied(**inputs)
        for layer in layers_of(copied):
            layer.requires_grad_(False)
        for name, p in copied.named_parameters():
            if name.endswith(".values"):
                p.mul_(2)
        got = copied(**inputs).logits
        with apart(copied):
            assert_near("logits", got, copied(**inputs).logits)


# Passes that overlap

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


# Copies and other ways in


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_model_in_training_are_independent(method, copied, contractions):
    model, inputs = adapted("llama", method)
    loss(model, inputs).backward()
    logits(model, inputs)
    twin = copied(model)
    before = logits(model, inputs)
    contractions.clear()
    assert torch.equal(logits(twin, inputs), before)
    assert contractions["together"]
    assert not contractions["alone"]
    step(twin, inputs)
    assert not torch.equal(logits(twin, inputs), before)
    assert_fresh(twin, inputs)
    assert torch.equal(logits(model, inputs), before)


@every_method
def test_two_models_at_once(method):
    one, inputs = adapted("llama", method)
    other, _ = adapted("llama", method, seed=3)
    trained(other, seed=4)
    with apart(one), apart(other):
        refs = [gradients(model, lambda m=model: loss(m, inputs).backward()) for model in (one, other)]
    pending = [loss(one, inputs), loss(other, inputs)]
    logits(one, inputs)
    other.eval()
    for model, value, ref in zip((one, other), pending, refs, strict=True):
        assert_trained_near(gradients(model, value.backward), ref)


@pytest.mark.parametrize(("method", "leave"), [("rep", "unload"), ("rep", "merge_and_unload"), ("adp", "unload")])
def test_nothing_is_left_of_it(method, leave):
    model, inputs = adapted("llama", method)
    logits(model, inputs)
    base = getattr(model, leave)()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert not base._forward_hooks_always_called
    again = get_peft_model(base, config_for(method, task_type="CAUSAL_LM"))
    assert_fresh(trained(again), inputs)


def injected(method: str, config) -> nn.Module:
    return inject_adapter_in_model(config, build("llama")[0])


def native(method: str, config) -> nn.Module:
    model = build("llama")[0]
    model.add_adapter(config)
    return model


def through_base(method: str, config) -> nn.Module:
    return get_peft_model(build("llama")[0], config).get_base_model()


@every_method
@pytest.mark.parametrize("way", [injected, native, through_base])
def test_every_way_into_a_model(method, way, contractions):
    model = way(method, config_for(method, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise([p for name, p in model.named_parameters() if "loretta_" in name], seed=3)
    model.double().eval()
    inputs = build("llama")[1]
    got, got_logits = gradients(model, lambda: loss(model, inputs).backward()), logits(model, inputs)
    assert contractions["together"]
    assert not contractions["alone"]
    with apart(model):
        assert_trained_near(got, gradients(model, lambda: loss(model, inputs).backward()))
        assert_near("logits", got_logits, logits(model, inputs))


@every_method
def test_an_adapted_model_within_an_adapted_model(method):
    base, inputs = build("t5")
    inject_adapter_in_model(config_for(method, target_modules=["v"], train_norms=False), base.encoder)
    model = inject_adapter_in_model(config_for(method, target_modules=["v", "wo"], train_norms=False), base)
    assert set(layers_of(model.encoder)) < set(layers_of(model))
    randomise([p for name, p in model.named_parameters() if "loretta_" in name], seed=3)
    model.double()
    for _ in range(2):
        got, got_logits = gradients(model, lambda: loss(model, inputs).backward()), logits(model, inputs)
        assert torch.equal(logits(model, inputs), got_logits)
        # apart for good: two models to attach to
        twin = copy.deepcopy(model)
        Contraction.detach(twin)
        Contraction.detach(twin.encoder)
        assert_trained_near(got, gradients(twin, lambda twin=twin: loss(twin, inputs).backward()))
        assert_near("logits", got_logits, logits(twin, inputs))
        write_in_place(model, inputs)


@every_method
def test_a_replica_contracts_for_itself(method, contractions):
    model, inputs = adapted("llama", method)
    replica = model.get_base_model()._replicate_for_data_parallel()  # as DataParallel makes it, on another device
    got = weighted(replica(**inputs).logits)
    assert contractions["alone"]
    assert not contractions["together"]
    assert_near("loss", got, loss(model, inputs))


# What the layers may meet


class Rows(nn.Module):
    """Two linear layers on whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def adapted_rows(method: str, **options) -> nn.Module:
    model = get_peft_model(Rows(), config_for(method, target_modules=["one", "two"], **options))
    return trained(model).double()


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


@every_method
def test_adapters_of_which_some_are_frozen(method):
    model, inputs = adapted("llama", method)
    frozen = layers_of(model)[1]
    with apart(model):
        ref = gradients(model, lambda: loss(model, inputs).backward())
    loss(model, inputs).backward()
    frozen.requires_grad_(False)
    names = {f"{path}.{name}" for path, m in model.named_modules() if m is frozen for name, _ in m.named_parameters()}
    for _ in range(2):
        got = gradients(model, lambda: loss(model, inputs).backward())
        assert_trained_near(got, {name: grad for name, grad in ref.items() if name not in names})
        model.eval().set_adapter("default")  # groups anew, now with the frozen ones apart
        frozen.requires_grad_(False)


@every_method
def test_two_active_adapters(method, contractions):
    scales = {"lora_alpha": 3} if method != "adp" else {"scaling": 0.4}
    model, inputs = adapted("llama", method, train_norms=False)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", train_norms=False, **scales))
    model.base_model.set_adapter(["default", "other"])
    trained(model.double(), seed=4)
    contractions.clear()
    got, got_logits = gradients(model, lambda: loss(model, inputs).backward()), logits(model, inputs)
    assert not contractions["alone"]
    with apart(model):
        assert_trained_near(got, gradients(model, lambda: loss(model, inputs).backward()))
        assert_near("logits", got_logits, logits(model, inputs))
    assert any(".other." in name for name in got)


@every_method
def test_mixed_batches(method):
    model, inputs = adapted("llama", method)
    model.add_adapter("other", config_for(method, task_type="CAUSAL_LM", tensor_rank=2))
    model.double().set_adapter("other")
    trained(model, seed=2)
    model.eval()
    rows = ["default", "other", "__base__", "other"]
    for _ in range(2):
        got = logits(model, inputs, adapter_names=rows)
        with apart(model):
            assert_near("logits", got, logits(model, inputs, adapter_names=rows))
        write_in_place(model, inputs)


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


# Compiled


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

    for number in range(4):
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
