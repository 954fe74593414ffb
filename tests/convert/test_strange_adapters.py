"""Adapters of strangers and broken ones, of any method, at every command that reads one."""

import pytest
import torch
from draws import seed_torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification
from tuners.families import build, logits
from tuners.wrapped import trained, wrap

from loretta import InputError
from loretta.convert.compress import compress
from loretta.convert.load import load_adapter
from loretta.convert.lora import export_lora
from loretta.convert.merged import export_merged

WEIGHTS = "adapter_model.safetensors"
BASE_WEIGHTS = [
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.base_layer.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
]


def saved_lora(folder, **options):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
    model = get_peft_model(build("llama")[0], config)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(folder, save_embedding_layers=False)
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("key", BASE_WEIGHTS)
def test_a_lora_cannot_overwrite_the_base_model(key, tmp_path):
    tensors = saved_lora(tmp_path / "lora")
    base = build("llama")[0]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    of_base = before[key.replace(".base_layer", "")]
    save_file({**tensors, f"base_model.model.{key}": of_base + 1}, tmp_path / "lora" / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="would overwrite the base model"):
        load_adapter(base, tmp_path / "lora")
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    # a tensor that changes nothing is one that PEFT saves beside an adapted lm_head
    save_file({**tensors, f"base_model.model.{key}": of_base}, tmp_path / "lora" / WEIGHTS, {"format": "pt"})
    load_adapter(base, tmp_path / "lora")


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.x.bias"])
def test_compress_carries_no_base_weights(key, tmp_path):
    tensors = saved_lora(tmp_path / "lora")
    save_file({**tensors, f"base_model.model.{key}": torch.ones(3)}, tmp_path / "lora" / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"also holds .*does not name as trained"):
        compress(tmp_path / "lora", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_what_a_lora_trains_whole_is_its_own(tmp_path):
    saved_lora(tmp_path / "lora", modules_to_save=["lm_head"], bias="all")
    load_adapter(build("llama")[0], tmp_path / "lora")
    assert compress(tmp_path / "lora", tmp_path / "out", rank=2).whole == ("lm_head",)


def test_what_peft_trains_whole_by_the_end_of_its_name_is_the_adapters_own(tmp_path):
    """For a "classifier" PEFT takes DistilBERT's pre_classifier too, and saves it with a LoRA."""

    def base(seed: int) -> DistilBertForSequenceClassification:
        seed_torch(seed)
        config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4, num_labels=3)
        return DistilBertForSequenceClassification(config).eval()

    inputs = {"input_ids": torch.arange(4, 12).reshape(2, 4)}
    base(0).save_pretrained(tmp_path / "base")
    options = LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"])
    model = trained(get_peft_model(DistilBertForSequenceClassification.from_pretrained(tmp_path / "base"), options))
    wanted = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path / "lora")
    other = base(1)
    other.distilbert.load_state_dict(base(0).distilbert.state_dict())  # another random head
    assert torch.equal(logits(load_adapter(other, tmp_path / "lora"), inputs), wanted)
    result = compress(tmp_path / "lora", tmp_path / "out", error=0.0)
    assert set(result.whole) == {"pre_classifier", "classifier"}


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_compress_carries_no_head_that_is_not_finite(bad, tmp_path):
    tensors = saved_lora(tmp_path / "lora", modules_to_save=["lm_head"])
    key = next(key for key in tensors if "lm_head" in key)
    tensors[key][-1, -1] = bad
    save_file(tensors, tmp_path / "lora" / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"NaN or infinity in '.*lm_head"):
        compress(tmp_path / "lora", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [export_lora, export_merged])
@pytest.mark.parametrize("where", ["loretta_rep_down", "lm_head", "loretta_rep_norm"])
def test_a_live_model_that_is_not_finite_is_not_exported(where, write, tmp_path):
    options = {"modules_to_save": ["lm_head"]} if where == "lm_head" else {}
    model, _ = wrap("llama", "rep", train_norms="norm" in where, **options)
    trained(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if where in name and p.requires_grad).view(-1)[0] = float("nan")
    with pytest.raises(InputError, match=rf"NaN or infinity in '.*{where}|trains .* layer norms"):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
