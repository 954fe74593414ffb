"""The paper's table: every published count, planned on the meta device and again after injection."""

import pytest

from loretta import get_peft_model
from loretta.plan import PRESETS, count_baseline, find_config, find_preset, meta_model, plan_model, read_plan

# (preset, count): written down a second time on purpose, from the paper's arithmetic, not from the presets' file
PUBLISHED = {
    "deberta-adp": 99_034, "deberta-rep": 54_068, "roberta-adp": 99_034, "roberta-rep": 67_928,
    "roberta-rep-head": 69_466, "llama2-7b-adp": 876_800, "llama2-7b-rep": 507_904, "llama2-13b-adp": 1_676_160,
    "llama2-13b-rep": 769_280, "llama2-70b-adp": 4_728_832, "llama2-70b-rep": 1_987_072,
    "deberta-adp-r2": 67_762, "deberta-adp-r5": 99_034, "deberta-adp-r10": 206_194, "deberta-adp-r20": 626_914,
    "deberta-rep-r2": 42_056, "deberta-rep-r5": 54_068, "deberta-rep-r10": 94_568, "deberta-rep-r20": 252_368,
    "deberta-adp-shape5": 99_034, "deberta-adp-shape3": 106_714, "deberta-adp-shape7": 97_114,
    "deberta-adp-tt-nonorm": 60_634, "deberta-adp-tt-norm": 99_034, "deberta-adp-dense-nonorm": 649_538,
    "deberta-adp-dense-norm": 687_938, "deberta-adp-nohead-nonorm": 57_408, "deberta-adp-nohead-norm": 95_808,
    "deberta-rep-tt-norm": 54_068, "deberta-rep-tt-nonorm": 15_668, "deberta-rep-dense-norm": 644_510,
    "deberta-rep-dense-nonorm": 606_110, "deberta-rep-nohead-norm": 52_380, "deberta-rep-nohead-nonorm": 13_980,
    "deberta-ft": 139_193_858, "llama2-7b-lora": 4_194_304, "llama2-13b-lora": 6_553_600,
    "llama2-70b-lora": 16_384_000, "llama2-7b-adapters": 50_331_648, "llama2-13b-adapters": 79_057_920,
    "llama2-70b-adapters": 252_977_152, "llama2-7b-prefix": 1_310_720, "llama2-7b-ia3": 614_400,
    "llama2-13b-ia3": 962_560, "llama2-70b-ia3": 2_457_600,
}  # fmt: skip


def test_every_preset_is_held():
    assert {f"paper/{name}" for name in PUBLISHED} == PRESETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_count(name):
    preset = find_preset(f"paper/{name}")
    assert preset.count == PUBLISHED[name]
    model = meta_model(find_config(preset.model), preset.task_type)
    if preset.method not in ("rep", "adp"):
        assert count_baseline(model, preset) == PUBLISHED[name]
        return
    plan = plan_model(model, preset.config())
    assert plan.trainable == PUBLISHED[name]
    wrapped = get_peft_model(model, preset.config())
    assert wrapped.get_nb_trainable_parameters()[0] == PUBLISHED[name]
    assert read_plan(wrapped).trainable == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama2-7b-adp", (211_200, 399_360, 266_240, 0)),
        ("deberta-adp", (37_440, 19_968, 38_400, 3_226)),
        ("deberta-rep", (13_980, 0, 38_400, 1_688)),
        ("llama2-70b-adp", (1_428_480, 1_981_440, 1_318_912, 0)),
    ],
)
def test_the_parts_of_a_count(name, parts):
    preset = find_preset(f"paper/{name}")
    plan = plan_model(meta_model(find_config(preset.model), preset.task_type), preset.config())
    assert (plan.cores, plan.biases, plan.copies.norms, plan.copies.head) == parts


def test_a_preset_carries_the_protocol():
    assert find_preset("paper/deberta-adp").protocol["warmup_steps"] == 500
    assert find_preset("paper/llama2-7b-adp").protocol["train_examples"] == 1000
