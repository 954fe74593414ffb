"""Merging below the layers of PEFT's methods: to what was computed, or not at all."""

import pytest
import torch
from draws import seed_torch
from peft import LoraConfig, PeftConfig
from peft import get_peft_model as peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tolerances import assert_near
from tuners.families import build, logits
from tuners.wrapped import Two, config_for, trained

from loretta import InputError, get_peft_model
from loretta.tuners.adapted import AdaptedModule, chain

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of several methods on one model
SIZES = {
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 4}, "DELORA": {"r": 4}, "FOURIERFT": {"n_frequency": 9},
    "IA3": {"feedforward_modules": []}, "MISS": {"r": 4}, "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 4}, "VBLORA": {"vector_length": 4}, "WAVEFT": {"n_frequency": 9},
}  # fmt: skip
# what PEFT does not merge, or not alone, or puts on no single linear layer with others on it
LEFT_OUT = {
    "ADALORA", "ADAPTION_PROMPT", "FROD", "LILY", "LN_TUNING", "OSF", "POLY", "PSOFT", "PVERA", "RANDLORA", "SHADOW",
    "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "VERA",
}  # fmt: skip
READ_THE_WEIGHT = {"DORA", "GLORA", "HIRA", "HRA", "PEANUT"}


def other_methods() -> dict[str, PeftConfig]:
    """PEFT's methods, on the layer ``one``."""
    found: dict[str, PeftConfig] = {"DORA": LoraConfig(target_modules=["one"], use_dora=True)}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(getattr(kind, "value", kind))
        if "target_modules" in config.__dataclass_fields__ and not name.startswith("LORETTA") and name not in LEFT_OUT:
            found[name] = config(target_modules=["one"], **SIZES.get(name, {}))
    return found


OTHERS = other_methods()


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_within_another_methods_layer_merges_to_what_it_computed_or_is_refused(name):
    """Below a DoRA the merged layer was off by a third: its magnitudes are by the norm of the weight."""
    seed_torch(0)
    base, x = Two().double(), torch.randn(5, 12, dtype=torch.float64)
    ours = get_peft_model(base, config_for("rep", target_modules=["one"], train_norms=False), "ours")
    other = peft_model(base, OTHERS[name], "other")
    trained(base).double().eval()
    ours.base_model.set_adapter("ours")
    assert [isinstance(layer, AdaptedModule) for layer in chain(base.one)] == [False, True]
    expected = base.one(x)
    for model in (ours, other):
        if name in READ_THE_WEIGHT:
            with pytest.raises(InputError, match="within the adapter 'other', which acts and computes with the base's"):
                model.merge_adapter()
            assert not any(layer.merged for layer in chain(base.one))
        else:
            model.merge_adapter()
            assert all(layer.merged for layer in chain(base.one))
        assert_near("outputs", base.one(x).float(), expected.float())  # some compute in float32
        if base.one.merged:
            model.unmerge_adapter()


def test_scales_within_a_dora_are_not_merged_either():
    base, inputs = build("llama", dtype=torch.float64)
    scaled = config_for("rep", target_modules=["v_proj"], train_norms=False, train_scales=["keys"])
    ours = get_peft_model(base, scaled, "ours")
    dora = peft_model(base, LoraConfig(target_modules=["k_proj"], use_dora=True), "dora")
    ours.base_model.set_adapter("ours")
    trained(base).double().eval()
    expected = logits(base, inputs)
    for merge in (ours.merge_adapter, ours.merge_and_unload, dora.merge_adapter):
        with pytest.raises(InputError, match="within the adapter 'dora'"):
            merge()
        assert_near("logits", logits(base, inputs), expected)
    dora.base_model.set_adapter([])
    alone = logits(base, inputs)
    ours.merge_adapter()
    assert_near("without the dora", logits(base, inputs), alone)
