"""Adapters whose file is not what their config says."""

import json

import pytest
from peft import PeftModel
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
