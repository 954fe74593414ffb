"""Adapters whose file is not what their config says."""

import json
import shutil

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tuners.families import build
from tuners.wrapped import every_method, trained, wrap

from loretta import InputError
from loretta.convert.load import load_adapter


@every_method
def test_a_train_without_a_place_is_refused_and_not_left_out(method, tmp_path):
    trained(wrap("bert", method)[0]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["head_origins"] == {"bert.pooler.dense": "loaded", "classifier": "unknown"}
    path.write_text(json.dumps({**config, "head_origins": {"classifier": "unknown"}}))
    for load in (load_adapter, PeftModel.from_pretrained):
        with pytest.raises(InputError, match=r"bert\.pooler\.dense\.cores\.values.*has no place"):
            load(build("bert")[0], tmp_path)


def test_weights_of_another_method_are_refused_and_not_left_out(tmp_path):
    """PEFT warns of what is missing, and computes with a LoRA that is untrained."""
    wrap("llama", "rep")[0].save_pretrained(tmp_path / "rep")
    get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    load_adapter(build("llama")[0], tmp_path / "lora")
    shutil.copy(tmp_path / "rep" / "adapter_model.safetensors", tmp_path / "lora")
    with pytest.raises(InputError, match=r"does not fit.*missing adapter keys.*lora_A"):
        load_adapter(build("llama")[0], tmp_path / "lora")
