"""What cannot be compressed is refused with a reason, before anything is written."""

import json
import shutil

import pytest
import torch
from convert.lora_models import add_tokenizer, change_config, lora, saved_base
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tuners.wrapped import trained, wrap

from loretta import InputError, LorettaRepConfig
from loretta.convert.compress import compress


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"rank": 2, "error": 0.1},
        {"rank": 0},
        {"rank": -1},
        {"error": -0.1},
        {"error": 1.0},
        {"error": float("nan")},
    ],
    ids=str,
)
def test_budgets_that_are_none_are_refused(decoder, tmp_path, budget):
    with pytest.raises(InputError, match=r"--rank|--error"):
        compress(decoder[0], tmp_path / "out", **budget)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"peft_type": "LORETTA_ADP"}, "is a LoRETTA adapter already"),
        ({"base_model_name_or_path": None}, "give --model"),
    ],
)
def test_adapters_that_are_no_plain_lora(decoder, tmp_path, changes, message):
    change_config(decoder[0], **changes)
    with pytest.raises(InputError, match=message):
        compress(decoder[0], tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_dora_is_refused(tmp_path):
    model, _ = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    lora(model, "CAUSAL_LM", target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(InputError, match="is a DoRA"):
        compress(tmp_path / "dora", tmp_path / "out", rank=2)


def test_a_loretta_adapter_is_refused(tmp_path):
    wrap("llama", "rep")[0].save_pretrained(tmp_path / "rep")
    change_config(tmp_path / "rep", base_model_name_or_path="base")
    with pytest.raises(InputError, match="is a LoRETTA adapter already"):
        compress(tmp_path / "rep", tmp_path / "out", rank=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "does not add a matrix"),
        (LoHaConfig(r=8, target_modules=["q_proj"]), "rank 32 of 32"),
    ],
    ids=["IA3", "LoHa"],
)
def test_other_methods_without_low_rank_updates(tmp_path, config, message):
    model, _ = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    config.task_type = "CAUSAL_LM"
    trained(get_peft_model(model, config)).save_pretrained(tmp_path / "given")
    with pytest.raises(InputError, match=message):
        compress(tmp_path / "given", tmp_path / "out", rank=2)


def test_a_lora_with_an_embedding_is_refused(tmp_path):
    model, _ = saved_base(tmp_path / "base", "gpt2", "CAUSAL_LM")
    given = lora(model, "CAUSAL_LM", target_modules=["wpe", "c_attn"])
    given.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(InputError, match="lora_embedding_A': only a LoRA of linear layers"):
        compress(tmp_path / "lora", tmp_path / "out", rank=2)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no adapter"):
        compress(tmp_path, tmp_path / "out", rank=2)


def test_a_damaged_or_not_finite_file(decoder, tmp_path):
    weights = decoder[0] / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: torch.full_like(tensor, torch.inf) for key, tensor in tensors.items()}, weights)
    with pytest.raises(InputError, match="not finite"):
        compress(decoder[0], tmp_path / "out", rank=2)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match="damaged"):
        compress(decoder[0], tmp_path / "out", rank=2)


def test_another_base_model_is_noticed_with_text(decoder, tmp_path):
    saved_base(tmp_path / "other", "llama", "CAUSAL_LM", hidden_size=16)
    add_tokenizer(tmp_path / "other")
    with pytest.raises(InputError, match="does not fit the base model"):
        compress(decoder[0], tmp_path / "out", rank=2, model=str(tmp_path / "other"), text="a film")
    assert not (tmp_path / "out").exists()


def test_a_head_of_a_base_model_that_is_gone(tmp_path):
    model, _ = saved_base(tmp_path / "base", "bert", "SEQ_CLS")
    lora(model, "SEQ_CLS", target_modules=["query"]).save_pretrained(tmp_path / "lora")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"brings a head.*--model"):
        compress(tmp_path / "lora", tmp_path / "out", rank=2)


def test_an_adapter_that_is_a_prompt(tmp_path):
    model, _ = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, prompt).save_pretrained(tmp_path / "given")
    with pytest.raises(InputError, match="changes no linear layer"):
        compress(tmp_path / "given", tmp_path / "out", rank=2)


def test_an_alpha_that_is_left_to_its_default(decoder, tmp_path):
    folder, _, _ = decoder
    change_config(folder, lora_alpha=LoraConfig().lora_alpha)
    compress(folder, tmp_path / "named", rank=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    compress(folder, tmp_path / "left out", rank=2)
    named, left_out = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("named", "left out"))
    assert all(torch.equal(tensor, left_out[key]) for key, tensor in named.items())


def test_a_file_of_something_else_than_text(decoder, tmp_path):
    with pytest.raises(InputError, match="no text file in UTF-8"):
        compress(decoder[0], tmp_path / "out", rank=2, text=str(decoder[0] / "adapter_model.safetensors"))


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_text_without_words_is_refused(decoder, tmp_path, text):
    with pytest.raises(InputError, match="holds no text"):
        compress(decoder[0], tmp_path / "out", rank=2, text=text)


def test_text_without_a_tokenizer_is_refused(decoder, tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        compress(decoder[0], tmp_path / "out", rank=2, text="a film")


def test_a_token_without_an_embedding_is_refused(decoder, tmp_path):
    folder, given, _ = decoder
    room = given.get_input_embeddings().num_embeddings
    add_tokenizer(tmp_path / "base", last=room - 1, beyond=room)
    compress(folder, tmp_path / "fits", rank=2, text="a good last")
    with pytest.raises(InputError, match=f"embeddings for {room} tokens, and its tokenizer gives token {room}"):
        compress(folder, tmp_path / "out", rank=2, text="a film beyond")
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_gone_is_no_name_for_an_adapter(decoder, tmp_path):
    with pytest.raises(InputError, match=r"--model: there is no folder '.*bse' \(did you mean 'base'\?\)"):
        compress(decoder[0], tmp_path / "out", rank=2, model=str(tmp_path / "bse"))


def test_what_lies_in_the_folder_is_kept(decoder, tmp_path):
    folder, _, _ = decoder
    with pytest.raises(InputError, match="what is to be compressed"):
        compress(folder, folder, rank=2)
    with pytest.raises(InputError, match=r"is or holds '.*base', and is not replaced"):
        compress(folder, tmp_path / "base", rank=2, overwrite=True)
    compress(folder, tmp_path / "out", rank=2)
    with pytest.raises(InputError, match="is not empty"):
        compress(folder, tmp_path / "out", rank=3)
    compress(folder, tmp_path / "out", rank=3, overwrite=True)
    assert LorettaRepConfig.from_pretrained(tmp_path / "out").tensor_rank == 3
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"have changed since \(adapter_config.json\)"):
        compress(folder, tmp_path / "out", rank=2, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        compress(folder, tmp_path / "file", rank=2)
