"""A population in float64 beside the ordinary runs of its members: torch's AdamW, one model each."""

from functools import partial
from unittest.mock import Mock

import peft
import pytest
import torch
from members import DECAYS, RATES, ROWS, SIZE, WRITES, batch, bert, gpt2, llama, losses, member, population
from packaging import version
from tolerances import assert_near
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loretta.errors import InputError
from loretta.population import attention
from loretta.population.attention import PackedAttention
from loretta.population.optimizer import MemberAdamW
from loretta.population.population import Population, Start

NEEDS_PEFT_0_21_2 = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.21.2"),
    reason="its layers hold the trained vector outside of the module, where functional_call does not reach it",
)
CASES = [
    (bert, "rep", [{"lora_alpha": alpha} for alpha in (8, 16, 4)], 12),
    (bert, "rep", [{"init_weights": "denoised", "bias": "all"}] * SIZE, 3),
    (bert, "rep", [{"init_weights": "gaussian", "train_head": "dense", "train_norms": False}] * SIZE, 3),
    (bert, "rep", [{"modules_to_save": ["word_embeddings"]} for _ in range(SIZE)], 3),
    (bert, "shared", [{"tensor_rank": 4, "lora_alpha": alpha} for alpha in (8, 16, 4)], 5),
    (bert, "shared", [{"init_weights": "denoised", "target_modules": "all-linear"}] * SIZE, 3),
    (bert, "adp", [{"scaling": scaling} for scaling in (1.0, 0.5, 2.0)], 5),
    (bert, "adp", [{"init_weights": "denoised", "scaling": scaling} for scaling in (1.0, 0.5, 2.0)], 3),
    (bert, "adp", [{"train_bias": False, "non_linearity": "gelu", "train_head": "frozen"}] * SIZE, 3),
    (bert, "adapters", [{}] * SIZE, 3),
    (bert, "lora", [{"r": 3, "lora_alpha": alpha} for alpha in (8, 16, 4)], 5),
    (bert, "norms", [{}] * SIZE, 3),
    (bert, "bitfit", [{}] * SIZE, 3),
    (bert, "ia3", [{}] * SIZE, 3),
    (bert, "head", [{}] * SIZE, 3),
    (bert, "peft:vera", [{"r": 4}] * SIZE, 3),
    (bert, "peft:fourierft", [{"n_frequency": 40, "target_modules": ["query", "value"]}] * SIZE, 3),
    (bert, "peft:waveft", [{"n_frequency": 40, "target_modules": ["query", "value"]}] * SIZE, 3),
    (bert, "peft:vblora", [{"num_vectors": 9, "vector_length": 8, "r": 2}] * SIZE, 3),
    (bert, "peft:unilora", [{"theta_d_length": 60, "r": 2, "target_modules": ["query", "dense"]}] * SIZE, 3),
    pytest.param(bert, "peft:tinylora", [{"u": 9, "r": 3, "weight_tying": 0.5}] * SIZE, 3, marks=NEEDS_PEFT_0_21_2),
    (bert, "peft:beft", [{"target_modules": ["value"]}] * SIZE, 3),
    (bert, "peft:road", [{"group_size": 4, "target_modules": ["query", "value"]}] * SIZE, 3),
    (bert, "prompt", [{"num_virtual_tokens": 3}] * SIZE, 3),
    (bert, "p-tuning", [{"num_virtual_tokens": 3, "encoder_hidden_size": 16}] * SIZE, 3),
    (bert, "prefix", [{"num_virtual_tokens": 3}] * SIZE, 3),
    (bert, "adp", [{"train_scales": ["keys", "values", "mlp"]}] * SIZE, 3),
    (llama, "rep", [{}] * SIZE, 3),
    (llama, "rep", [{"modules_to_save": ["layers.1"]}] * SIZE, 3),
    (llama, "shared", [{"target_modules": "all-linear", "train_scales": ["keys", "values", "mlp"]}] * SIZE, 3),
    (gpt2, "rep", [{"train_scales": ["keys", "values", "mlp"]}] * SIZE, 3),
    (llama, "shared", [{"target_modules": "all-linear", "init_weights": "gaussian"}] * SIZE, 3),
    (llama, "adp", [{"placement": "mlp"}] * SIZE, 3),
    (llama, "adapters", [{"init_weights": "denoised"}] * SIZE, 3),
    (llama, "lora", [{}] * SIZE, 3),
    (llama, "lora", [{"modules_to_save": ["layers.1"], "layers_to_transform": [0]}] * SIZE, 3),
    (llama, "norms", [{}] * SIZE, 3),
    (llama, "ia3", [{}] * SIZE, 3),
    (llama, "prefix", [{"num_virtual_tokens": 3}] * SIZE, 3),
]


@pytest.mark.parametrize(("make", "method", "options", "steps"), CASES)
def test_each_member_equals_its_run_alone(make, method, options, steps):
    causal = make in WRITES
    together, alone = population(make, method, options)
    rates, decays = (torch.tensor(each, dtype=torch.float64)[:, None] for each in (RATES, DECAYS))
    ours = MemberAdamW(together.values, together.gradient, rates=rates, decays=decays)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in alone]
    theirs = [
        torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        for parameters, rate, decay in zip(trained, RATES, DECAYS, strict=True)
    ]
    rows = [slice(ROWS * k, ROWS * (k + 1)) for k in range(SIZE)]
    for step in range(steps):
        ids, mask, labels = batch(step, causal)
        factor = 1 - step / steps
        got = losses(together(input_ids=ids, attention_mask=mask).logits, ids, labels, causal)
        together.backward(got)
        ours.step(torch.full((SIZE, 1), factor, dtype=torch.float64))
        for k, (model, optimizer) in enumerate(zip(alone, theirs, strict=True)):
            logits = model(input_ids=ids[rows[k]], attention_mask=mask[rows[k]]).logits
            (expected,) = losses(logits, ids[rows[k]], labels[rows[k]], causal)
            assert abs(got[k].item() - expected.item()) < 1e-9, f"member {k} at step {step}"
            expected.backward()
            norm = nn.utils.clip_grad_norm_(trained[k], 1.0)
            assert abs(ours.norms[k].item() - norm.item()) < 1e-9
            optimizer.param_groups[0]["lr"] = RATES[k] * factor
            optimizer.step()
            optimizer.zero_grad()
    for k, model in enumerate(alone):
        found = together.values_of(k)
        assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, value in found.items():
            if name.endswith("key.bias"):
                continue  # the softmax of attention takes it out: its gradient is rounding, which Adam enlarges
            assert_near(name, value, model.get_parameter(name))


class Crossings(TorchDispatchMode):
    """Notes each operation that has tensors of two devices, which no step that is recorded on a GPU may have.

    The device is torch's "meta", which has no numbers: what transformers asks of a mask, outside of recordings, is no.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        result = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 or "nonzero" in str(func):
            self.found.append(str(func))
        return result


ON_A_GPU = [("rep", {}), ("shared", {}), ("adp", {})]
ON_A_GPU += [(case[1], case[2][0]) for case in CASES if type(case) is tuple and case[1].startswith(("peft:", "p"))]


@pytest.mark.parametrize(("method", "options"), [case for case in ON_A_GPU if case[0] != "peft:waveft"])
def test_a_step_needs_nothing_of_the_cpu(method, options, monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)  # shared ones stay so
    skeleton, alone = member(bert, method, options, 0), member(bert, method, options, 1)
    start = Start.of(alone, skeleton)
    with Crossings():
        together = Population(skeleton.to("meta"), [start, start])
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    with Crossings() as crossings:
        together.train()
        logits = together(input_ids=ids, attention_mask=ids + 1).logits
        together.backward(logits.sum(1))
    assert crossings.found == []


RELEASED = {method: {} for method in ("rep", "adp", "shared", "lora", "bitfit")}
RELEASED["prompt"] = RELEASED["prefix"] = {"num_virtual_tokens": 3}
RELEASED["peft:vblora"] = {"num_vectors": 9, "vector_length": 8, "r": 2}


@pytest.mark.parametrize("method", RELEASED)
def test_a_released_member_is_the_ordinary_model(method):
    together, alone = population(bert, method, [RELEASED[method]] * SIZE)
    ids, mask, _ = batch(0, causal=False)
    together.check({"input_ids": ids, "attention_mask": mask})
    for k in (2, 0):
        with together.released(k) as model:
            assert model.state_dict().keys() == alone[k].state_dict().keys()
            assert {n for n, p in model.named_parameters() if p.requires_grad} == together.slices.keys()
            assert_near("logits", model(input_ids=ids).logits, alone[k](input_ids=ids).logits)
    again = together(input_ids=ids, attention_mask=mask).logits[:ROWS]
    assert_near("afterwards", again, alone[0](input_ids=ids[:ROWS], attention_mask=mask[:ROWS]).logits)


@pytest.mark.parametrize(("at_once", "tokens"), [(64, 28), (8, 7)])
def test_short_rows_are_laid_beside_each_other_in_attention(at_once, tokens, monkeypatch):
    """Of a member's 4 rows of 7 tokens all fit into 64 tokens, and one into 8: the same logits and gradients."""
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    together, _ = population(bert, "rep", [{}] * SIZE)
    ids, mask, labels = batch(0, causal=False)
    found, shapes = [], []
    for modes in ((), (PackedAttention,)):
        together.modes = modes
        with Operations() as seen:
            logits = together(input_ids=ids, attention_mask=mask).logits
        together.backward(losses(logits, ids, labels, False))
        found.append((logits, together.gradient.clone()))
        shapes.append({shape[-2] for name, shape in seen.results if "attention" in name and len(shape) == 4})
    assert shapes == [{7}, {tokens}]
    for name, got, expected in zip(("logits", "gradient"), found[1], found[0], strict=True):
        assert_near(name, got, expected)


@pytest.mark.parametrize(("make", "layer"), [(bert, "layer.1"), (llama, "layers.1")])
def test_a_layer_that_each_member_trains_whole_packs_no_rows(make, layer):
    together, _ = population(make, "rep", [{"modules_to_save": [layer]}] * SIZE)
    together.modes = (PackedAttention,)
    ids, mask, _ = batch(0, causal=False)
    together.check({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("modes", [(), (PackedAttention,)])
def test_a_member_that_diverges_disturbs_no_other(modes):
    together, _ = population(bert, "rep", [{}] * SIZE)
    together.modes = modes
    ours = MemberAdamW(together.values, together.gradient, rates=torch.full((SIZE, 1), 1e-2), decays=torch.zeros(3, 1))
    together.values[1] = torch.nan
    for step in range(2):
        ids, mask, labels = batch(step, causal=False)
        together.backward(losses(together(input_ids=ids, attention_mask=mask).logits, ids, labels, False))
        ours.step(torch.ones(SIZE, 1, dtype=torch.float64))
    assert together.values[[0, 2]].isfinite().all()
    assert together.values[1].isnan().all()


# LoKr reads numbers of its update in training alone
@pytest.mark.parametrize("method", ["peft:loha", "peft:lokr"])
def test_a_method_that_cannot_join_is_refused(method):
    ids, mask, _ = batch(0, causal=False)
    together, _ = population(bert, method, [{"target_modules": ["query"]}] * SIZE)
    with pytest.raises(InputError, match="cannot be trained in a population"):
        together.check({"input_ids": ids, "attention_mask": mask})


def test_what_looks_across_rows_or_reads_weights_without_a_call_is_refused():
    ids, mask, _ = batch(0, causal=False)
    for forward in (_with_centred_rows, _with_read_weights):
        together, _ = population(bert, "lora", [{}] * SIZE)
        layer = together.model.base_model.model.bert.encoder.layer[0].attention.self.query
        layer.forward = partial(forward, layer)
        with pytest.raises(InputError, match="cannot be trained in a population"):
            together.check({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_check_for_which_the_memory_is_too_small_says_nothing_of_the_method(error):
    ids, mask, _ = batch(0, causal=False)
    together, _ = population(bert, "lora", [{}] * SIZE)
    before = together.values.clone()
    together.backward = Mock(side_effect=error)
    with pytest.raises(type(error)):
        together.check({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(together.values, before)


def _with_centred_rows(layer, x):
    return type(layer).forward(layer, x - x.mean(0))


def _with_read_weights(layer, x):
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    return layer.base_layer(x) + nn.functional.linear(nn.functional.linear(x, down.weight), up.weight)


class Operations(TorchDispatchMode):
    """The names of the operations that run, and the shapes of their first results."""

    def __init__(self):
        super().__init__()
        self.names, self.results = set(), []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.names.add(str(operation))
        self.results += [
            (str(operation), tuple(leaf.shape)) for leaf in tree_leaves(result)[:1] if torch.is_tensor(leaf)
        ]
        return result


@pytest.mark.parametrize("method", ["rep", "adp", "shared"])
def test_contracting_copies_no_numbers_to_the_device_so_that_it_can_be_recorded(method):
    together, _ = population(bert, method, [{}] * SIZE)
    with Operations() as seen:
        for group in together.groups:
            group.hand_over()
    assert any("bmm" in name or "mm" in name for name in seen.names)
    # an index that is a list would be copied in every pass
    assert not {name for name in seen.names if "index" in name}
