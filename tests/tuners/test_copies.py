"""Copies of whole modules by themselves: what computes, what trains and what is saved, for each policy."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from draws import seed_torch, seeded
from tolerances import assert_as_near, assert_near
from torch import nn
from tuners.wrapped import replica_of

from loretta import tt
from loretta.tuners.copies import AdapterCopy, ChangedLinear, CopyPolicy, rename_copy

IN, HIDDEN, LABELS = 12, 8, 3


class Head(nn.Module):
    """As RoBERTa's: a hidden layer, then the final one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(IN, HIDDEN, dtype=dtype), nn.Linear(HIDDEN, LABELS, dtype=dtype)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x)))


def head(dtype: torch.dtype = torch.float32) -> Head:
    seed_torch(0)
    return Head(dtype)


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, IN, generator=seeded(1)).to(dtype)


POLICIES = {
    "whole": CopyPolicy(),
    "frozen": CopyPolicy(frozen=True),
    "stand-in": CopyPolicy(tensorized=("dense",), rank=2),
    "stand-in, final frozen": CopyPolicy(tensorized=("dense",), rank=2, frozen=True),
    "change": CopyPolicy(tensorized=("dense",), as_change=True, rank=2),
    "change, base saved": CopyPolicy(tensorized=("dense",), as_change=True, saves_base=True, rank=2),
}
# names in the copy that train
TRAINED = {
    "whole": {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"},
    "frozen": set(),
    "stand-in": {"dense.cores.values", "dense.bias", "out_proj.weight", "out_proj.bias"},
    "stand-in, final frozen": {"dense.cores.values", "dense.bias"},
    "change": {"dense.cores.values", "dense.bias", "out_proj.weight", "out_proj.bias"},
    "change, base saved": {"dense.cores.values", "dense.bias", "out_proj.weight", "out_proj.bias"},
}


def wrapper(policy: CopyPolicy, dtype: torch.dtype = torch.float32) -> AdapterCopy:
    made = AdapterCopy(head(dtype), "a", policy)
    made.set_adapter("a")
    return made


def shaken(wrapped: AdapterCopy, name: str = "a") -> AdapterCopy:
    """Everything of a copy that trains, as if it had been trained."""
    draw = seeded(2)
    with torch.no_grad():
        for parameter in wrapped.modules_to_save[name].parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=draw).to(parameter)
    return wrapped


@pytest.mark.parametrize("kind", ["whole", "frozen", "change", "change, base saved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_a_copy_computes_what_the_module_does_to_the_last_bit(kind, dtype):
    assert torch.equal(wrapper(POLICIES[kind], dtype)(rows(dtype)), head(dtype)(rows(dtype)))


def test_a_stand_in_computes_with_the_nearest_train():
    wrapped, reference = wrapper(POLICIES["stand-in"]), head().double()
    weight = reference.dense.weight.detach().T
    shape = tt.plan_shape(IN, HIDDEN, rank=2)
    near = tt.matrix_naive(tt.tt_svd(weight, shape), shape)
    assert (near - weight).norm() > 0.1 * weight.norm(), "the train must lose something, or the test says nothing"
    with torch.no_grad():
        reference.dense.weight.copy_(near.T)
    assert_near("output", wrapped(rows()), reference(rows().double()))


@pytest.mark.parametrize("kind", POLICIES)
def test_what_trains_stays_what_trains_whatever_peft_calls(kind):
    wrapped = wrapper(POLICIES[kind])
    calls = [
        lambda: None,
        lambda: wrapped.update("a"),
        lambda: wrapped.enable_adapters(True),
        lambda: wrapped.set_requires_grad("a"),
        lambda: wrapped.set_adapter(["a"]),
    ]
    for call in calls:
        call()
        trained = {name for name, p in wrapped.modules_to_save["a"].named_parameters() if p.requires_grad}
        assert trained == TRAINED[kind]
        assert not any(p.requires_grad for p in wrapped.original_module.parameters())
    assert wrapped.is_frozen("a") is (not TRAINED[kind])


@pytest.mark.parametrize("kind", POLICIES)
def test_training_leaves_the_base_module_alone(kind):
    wrapped, before = shaken(wrapper(POLICIES[kind])), head()
    assert torch.equal(wrapped.original_module(rows()), before(rows()))
    assert torch.equal(wrapped(rows()), before(rows())) is (kind == "frozen")


@pytest.mark.parametrize("kind", POLICIES)
def test_the_file_holds_the_base_layer_only_where_it_may_be_nowhere_else(kind):
    wrapped = wrapper(POLICIES[kind])
    saved = wrapped.adapter_state_dict("a", wrapped.state_dict())
    assert ("dense.base_weight" in saved) is (kind == "change, base saved")
    assert TRAINED[kind] | {"out_proj.weight", "out_proj.bias"} <= saved.keys()
    assert wrapped.adapter_state_dict_load_map("a").keys() == saved.keys()


@pytest.mark.parametrize("kind", ["stand-in", "change"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_copy_is_dense_and_computes_the_same(kind, dtype):
    wrapped = shaken(wrapper(POLICIES[kind], dtype))
    got = copy.deepcopy(wrapped)(rows(dtype))
    merged = wrapped.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    assert type(merged.get_submodule("dense")) is nn.Linear
    assert {p.dtype for p in merged.parameters()} == {dtype}
    alone, exact = merged(rows(dtype)), merged.double()(rows(dtype).double())
    assert_as_near("output", got, exact, beside=(alone, exact))


def test_unloading_gives_the_module_itself_back():
    module = head()
    wrapped = AdapterCopy(module, "a", POLICIES["change"])
    assert wrapped.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None) is module


def test_rows_of_a_mixed_batch_are_those_of_each_adapter_alone():
    wrapped = wrapper(POLICIES["change"])
    wrapped.policies["b"] = POLICIES["stand-in"]
    wrapped.update("b")
    shaken(wrapped)
    names = ["b", "a", "__base__", "a", "b"]
    alone = {name: wrapped.modules_to_save[name] for name in ("a", "b")} | {"__base__": wrapped.original_module}
    got = wrapped(rows(), adapter_names=names)
    expected = [copy.deepcopy(alone[name]).double()(rows().double())[row] for row, name in enumerate(names)]
    assert_near("rows", got, torch.stack(expected))


def test_two_heads_have_no_sum_and_one_takes_the_place_of_the_other():
    wrapped = wrapper(POLICIES["change"])
    wrapped.update("b")
    with pytest.raises(ValueError, match="only one of the heads of a, b can be active"):
        wrapped.set_adapter(["a", "b"])
    wrapped.set_adapter(["b", "has no copy here"])
    assert wrapped.active_adapters == ["b"]
    assert not any(p.requires_grad for p in wrapped.modules_to_save["a"].parameters())
    wrapped.delete_adapter("b", ["a"])
    assert (wrapped.active_adapters, [*wrapped.modules_to_save]) == (["a"], ["a"])
    assert {n for n, p in wrapped.modules_to_save["a"].named_parameters() if p.requires_grad} == TRAINED["change"]


def test_a_merged_adapter_computes_until_it_is_undone():
    wrapped = shaken(wrapper(POLICIES["change"]))
    wrapped.update("b")
    wrapped.set_adapter("b")
    of_a, of_b = (wrapped.modules_to_save[name](rows()) for name in ("a", "b"))
    wrapped.follow_merge(["a"])
    assert torch.equal(wrapped(rows()), of_a)
    wrapped.follow_merge([])
    assert torch.equal(wrapped(rows()), of_b)
    assert wrapped.active_adapters == ["b"]


def test_a_renamed_copy_is_the_same_copy():
    wrapped = shaken(wrapper(POLICIES["stand-in, final frozen"]))
    before = wrapped(rows())
    rename_copy(wrapped, "a", "new")
    assert (wrapped.active_adapters, [*wrapped.modules_to_save], [*wrapped.policies]) == (["new"], ["new"], ["new"])
    assert torch.equal(wrapped(rows()), before)
    wrapped.update("new")
    trained = {n for n, p in wrapped.modules_to_save["new"].named_parameters() if p.requires_grad}
    assert trained == TRAINED["stand-in, final frozen"]


def test_the_cores_of_a_change_are_in_float32_beside_half_precision():
    dense = head(torch.bfloat16).dense
    changed = ChangedLinear.from_dense(dense, tt.plan_shape(IN, HIDDEN, rank=2))
    assert (changed.cores.values.dtype, changed.base_weight.dtype) == (torch.float32, torch.bfloat16)
    assert changed.base_weight.data_ptr() != dense.weight.data_ptr()


@pytest.mark.parametrize("kind", POLICIES)
def test_a_copy_in_float32_computes_with_what_its_numbers_round_to(kind):
    """Also as a replica of DataParallel, in a mixed batch, offloaded by accelerate, and in several threads at once."""
    wrapped = shaken(wrapper(POLICIES[kind], torch.bfloat16))
    own = wrapped.modules_to_save["a"]
    x = rows(torch.bfloat16)
    plain = copy.deepcopy(own)  # in float32, but what is dense in the dtype of the base
    for name, value in plain.named_parameters():
        if not name.startswith("dense.") or not POLICIES[kind].tensorized:
            value.data = value.data.to(torch.bfloat16)
    expected = plain(x)
    assert torch.equal(wrapped(x), expected)
    assert torch.equal(wrapped(x, adapter_names=["a"] * len(x)), expected)
    assert torch.equal(replica_of(wrapped)(x), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(wrapped, [x] * 40))
    assert torch.equal(cpu_offload(wrapped, execution_device=torch.device("cpu"))(x), expected)
