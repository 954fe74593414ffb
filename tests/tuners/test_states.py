"""Switching, merging, disabling, copying and serving in any order: what computes is what the last of them says."""

import copy

import pytest
import torch
from draws import seeded
from peft import LoraConfig, PeftModel
from tolerances import assert_near
from torch import Tensor
from tuners.families import build, logits
from tuners.wrapped import config_for, trained

from loretta import get_peft_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`",
    "ignore:You are trying to modify a model",
    "ignore:All adapters are already merged",
    "ignore:Already following adapters were merged",
    "ignore:Already unmerged",
    "ignore:Adapter cannot be set when the model is merged",
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
STEPS = ("switch", "merge", "merge all", "unmerge", "disable", "copy", "serve")


class Draws:
    """Choices of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = seeded(seed)

    def some(self, among, least: int, most: int) -> list:
        count = least + int(torch.randint(most - least + 1, (), generator=self.generator))
        order = torch.randperm(len(among), generator=self.generator)[:count]
        return [among[k] for k in order.tolist()]

    def one(self, among):
        return self.some(among, 1, 1)[0]


def put_on(draws: Draws, methods: dict[str, str]) -> tuple[dict[str, PeftModel], dict[str, Tensor]]:
    """One model, by the names of its adapters, each with the tuner that it belongs to, and inputs."""
    model, inputs = build("llama", dtype=torch.float64)
    models: dict[str, PeftModel] = {}
    for seed, name in enumerate(draws.some(list(methods), len(methods), len(methods))):
        targets = draws.some(LINEAR, 2, 4)
        places = draws.some(["keys", "values", "mlp"], 0, 3)
        if methods[name] == "lora":
            models[name] = get_peft_model(model, LoraConfig(target_modules=targets), name)
        else:
            config = config_for(methods[name], target_modules=targets, train_scales=places, train_norms=bool(seed % 2))
            models[name] = get_peft_model(model, config, name)
            models[name].base_model.set_adapter(name)
        trained(models[name], seed)
    return {name: each.double().eval() for name, each in models.items()}, inputs


@pytest.mark.parametrize("methods", [("rep", "adp"), ("shared", "rep"), ("adp", "shared")], ids="-".join)
@pytest.mark.parametrize("seed", range(2))
def test_any_sequence_of_steps_ends_as_its_last_ones_say(seed, methods):
    """Beside a LoRA, which acts all the time. The right values are those of adapters that were never merged."""
    draws = Draws(seed)
    models, inputs = put_on(draws, {"one": methods[0], "two": methods[1], "around": "lora"})
    ours, methods = ("one", "two"), dict(zip(("one", "two"), methods, strict=True))
    expected = {}
    for names in ((), ("one",), ("two",), ours):
        models["one"].base_model.set_adapter(list(names))
        expected[names] = logits(models["one"], inputs)
    with models["one"].disable_adapter():
        plain = logits(models["one"], inputs)
    assert len({tuple(each.flatten().tolist()) for each in (*expected.values(), plain)}) == 5
    models["one"].base_model.set_adapter("one")
    active, merged = ["one"], []
    for _ in range(12):
        step, model = draws.one(STEPS), models[draws.one(ours)]
        mergeable = [name for name in ours if methods[name] != "adp"]
        if step == "switch":
            models["around"].unmerge_adapter()  # merged alone, it would be within the factors of the next
            active, merged = draws.some(ours, 1, 2), []
            model.base_model.set_adapter(active)
        elif step == "merge":
            name = draws.one(mergeable)
            if active == [name] or name not in active:
                models[name].merge_adapter([name])
                merged = list({*merged, name})
        elif step == "merge all" and set(active) <= set(mergeable):
            models["around"].merge_adapter()  # by PEFT's own tuner
            merged = list({*merged, *active})
        elif step == "unmerge":
            model.unmerge_adapter()
            merged = []
        elif step == "disable":
            with model.disable_adapter():
                assert_near("disabled", logits(model, inputs), plain)
            merged = []
        elif step == "copy":
            memo: dict = {}
            models = {name: copy.deepcopy(each, memo) for name, each in models.items()}
        elif step == "serve" and not merged:
            rows = [draws.one(ours) for _ in plain]
            got = logits(model, inputs, adapter_names=rows)
            assert_near("rows", got, torch.stack([expected[name,][k] for k, name in enumerate(rows)]))
        now = tuple(name for name in ours if name in (merged or active))
        for name, each in models.items():
            assert_near(f"{name} after {step}", logits(each, inputs), expected[now])
