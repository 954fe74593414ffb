"""Serving and generating: one contraction for many calls, and no write that goes unseen."""

import copy
import os
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_near
from torch import nn
from tuners.by_hand import (
    SCALE,
    X,
    adapted,
    add_to_data,
    answer,
    assert_fresh,
    before_every_train,
    by_hand,
    copy_average,
    cores_of,
    expected,
    write_in_another_process,
)
from tuners.families import build, randomise
from tuners.wrapped import Two, config_for, every_method, layers_of, wrap

import loretta
from loretta import InputError, get_peft_model

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
