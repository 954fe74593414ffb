"""A model is known by its weights, however they were saved, and another one is not taken for it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from loretta.fingerprint import fingerprint, is_same


def saved(model, folder, cls, dtype, **options) -> str:
    # PreTrainedModel writes safetensors alone
    getattr(transformers, cls).from_pretrained(model, dtype=dtype).save_pretrained(folder, **options)
    return str(folder)


@pytest.mark.parametrize(
    ("cls", "dtype", "options"),
    [
        ("AutoModelForCausalLM", torch.float32, {"max_shard_size": "20KB"}),
        ("AutoModelForCausalLM", torch.bfloat16, {}),
        ("AutoModelForCausalLM", torch.float16, {"max_shard_size": "20KB"}),
        ("AutoModel", torch.float32, {}),  # without the names' "model." and without the head
        ("AutoModelForSequenceClassification", torch.float16, {}),  # with a random head
    ],
)
def test_weights_that_were_saved_otherwise_are_the_same(llama, tmp_path, cls, dtype, options):
    other = saved(llama, tmp_path / "other", cls, dtype, **options)
    assert len(list(Path(other).glob("*.safetensors"))) == 1 or options
    before, now = fingerprint(llama), fingerprint(other)
    assert is_same(before, now)
    assert is_same(now, before)


def test_weights_are_the_same_in_the_older_format_and_in_the_cache_of_the_hub(llama, tmp_path, monkeypatch):
    older = tmp_path / "older"
    older.mkdir()
    torch.save(load_file(f"{llama}/model.safetensors"), older / "pytorch_model.bin")
    assert fingerprint(str(older)) == fingerprint(llama)
    cached = tmp_path / "hub" / "models--me--llama"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(llama)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fingerprint("me/llama") == fingerprint(llama)
    assert fingerprint("me/other") is None


@pytest.mark.parametrize(
    "changed",
    ["embed_tokens.weight", "layers.1.mlp.down_proj.weight", "layers.0.input_layernorm.weight", "model.norm.weight"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tensor_with_other_numbers_is_another_model(llama, tmp_path, changed, dtype):
    """By a fiftieth of a number: a step of a training, and more than it is rounded by."""
    folder = Path(saved(llama, tmp_path / "other", "AutoModelForCausalLM", dtype))
    before = fingerprint(llama)
    assert is_same(before, fingerprint(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith(changed)]
    tensors[name] *= 1.02
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    now = fingerprint(str(folder))
    assert not is_same(before, now)
    assert not is_same(now, before)


def test_a_folder_without_weights_or_with_damaged_ones_says_nothing(llama, tmp_path):
    assert fingerprint(str(tmp_path)) is None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "gone"}}))
    assert fingerprint(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(Path(llama, "model.safetensors").read_bytes()[:-1])
    assert fingerprint(str(tmp_path)) is None
