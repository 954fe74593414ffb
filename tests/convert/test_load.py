"""Adapters that earlier code wrote: they load with the logits they had, or one sentence says why they do not."""

import json

import pytest
import torch
from peft import PeftModel
from tuners.families import build, logits
from tuners.wrapped import every_method, trained, wrap

from loretta import InputError
from loretta.convert.load import load_adapter


@pytest.fixture
def saved(method, tmp_path):
    """A trained adapter on a classifier whose pooler is loaded, its logits, and its folder."""
    model, inputs = wrap("bert", method)
    expected = logits(trained(model), inputs)
    model.save_pretrained(tmp_path)
    return model, inputs, expected, tmp_path


def set_origins(folder, origins) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["head_origins"] == {"bert.pooler.dense": "loaded", "classifier": "unknown"}
    path.write_text(json.dumps({**config, "head_origins": origins}))


@every_method
def test_an_adapter_from_before_origins_were_noted_has_its_head(saved):
    _, inputs, expected, folder = saved
    set_origins(folder, {})
    assert torch.equal(logits(load_adapter(build("bert")[0], folder), inputs), expected)


@every_method
def test_a_train_without_a_place_is_refused_and_not_left_out(saved):
    *_, folder = saved
    set_origins(folder, {"classifier": "unknown"})
    for load in (load_adapter, PeftModel.from_pretrained):
        with pytest.raises(InputError, match=r"bert\.pooler\.dense\.cores\.values.*has no place"):
            load(build("bert")[0], folder)
