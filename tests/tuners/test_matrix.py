"""Both methods on every kind of model: checkpoints, copies, merging again and again, generation."""

import copy
import pickle

import pytest
import torch
from draws import seed_torch
from tolerances import assert_gradients_near, assert_near
from transformers import (
    PreTrainedModel,
)
from tuners.families import logits
from tuners.matrix import (
    GENERATIVE,
    base_of,
    cast,
    every_family,
    gradients,
    options_for,
    wrapped,
)
from tuners.wrapped import every_method, snapshot, trainable, trained

from loretta import PeftModel

quiet_checkpointing = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


DROPOUT = {"rep": {"lora_dropout": 0.2}, "adp": {"adapter_dropout": 0.2}, "shared": {"lora_dropout": 0.2}}


def checkpoint(model: PeftModel, *, use_reentrant: bool) -> None:
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if isinstance(base, PreTrainedModel):
        model.enable_input_require_grads()


@quiet_checkpointing
@pytest.mark.parametrize("init_weights", ["zero", "denoised"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["opt", "deberta-v2", "mlp"])
@every_method
def test_checkpointed_blocks_draw_the_same_dropout(family, use_reentrant, init_weights, method):
    train_norms = (family, use_reentrant) != ("deberta-v2", True)
    results = []
    for checkpointing in (False, True):
        model, inputs = wrapped(family, method, init_weights=init_weights, train_norms=train_norms, **DROPOUT[method])
        trained(model.double()).train()
        if checkpointing:
            checkpoint(model, use_reentrant=use_reentrant)
        seed_torch(3)
        results.append(gradients(model, cast(inputs, torch.float64)))
    plain, checkpointed = results
    assert all(grad is not None and grad.any() for grad in plain.values())
    assert_gradients_near(checkpointed, plain)


@quiet_checkpointing
@every_method
def test_reentrant_checkpoints_of_deberta_refuse_the_trained_norm_of_distances(method):
    # transformers passes the normed embeddings of the distances around the checkpoint, whatever trains the norm
    model, inputs = wrapped("deberta-v2", method)
    checkpoint(trained(model).train(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(model, inputs)


@every_method
@every_family
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_equal_and_independent(family, way, method):
    model, inputs = wrapped(family, method)
    trained(model)
    model(**inputs)  # a graph is pending, which no copy can take along
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    expected = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    gradients(twin, inputs)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained(twin, seed=9)
    changed = logits(twin, inputs)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model, inputs), expected)
    with torch.no_grad():
        for mine, its in zip(trainable(model).values(), trainable(twin).values(), strict=True):
            mine.copy_(its)
    assert torch.equal(logits(model, inputs), changed)


@every_family
def test_merging_and_unmerging_again_and_again(family):
    model, inputs = wrapped(family, "rep")
    inputs = cast(inputs, torch.float64)
    expected, values = logits(trained(model).double(), inputs), snapshot(model)
    for _ in range(8):
        model.merge_adapter()
        assert_near("merged", logits(model, inputs), expected)
        model.unmerge_adapter()
    assert_near("unmerged", logits(model, inputs), expected)
    for name, value in model.state_dict().items():
        assert_near(name, value, values[name])


@every_family
def test_an_adapter_added_to_a_merged_model(family):
    model, inputs = wrapped(family, "rep")
    inputs = cast(inputs, torch.float64)
    expected = logits(trained(model).double(), inputs)
    plain = logits(base_of(family, dtype=torch.float64)[0], inputs)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", options_for(family, "rep", tensor_rank=2))
    model.double()
    assert_near("default", logits(model, inputs), expected)
    model.set_adapter("other")
    trained(model, seed=5)
    other = logits(model, inputs)
    model.set_adapter("default")
    assert_near("default", logits(model, inputs), expected)
    with model.disable_adapter():
        assert_near("base", logits(model, inputs), plain)
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), other)


@every_method
@pytest.mark.parametrize("family", GENERATIVE)
def test_the_cache_changes_nothing_of_what_is_generated(family, method):
    model, inputs = wrapped(family, method)
    trained(model.double())  # so that rounding decides between no two tokens
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = (model.generate(**inputs, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert_near("logits", torch.stack(cached.logits), torch.stack(plain.logits))
