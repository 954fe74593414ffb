"""Tiny models on disk with trained LoRAs, to be compressed."""

import json
from pathlib import Path

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from tuners.families import build
from tuners.wrapped import trained


def saved_base(folder: Path, family: str, task: str | None, **changes) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model that finds its own way back from the name that an adapter remembers."""
    model, inputs = build(family, task, **changes)
    model.save_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)
    return model, inputs


def lora(model: PreTrainedModel, task: str | None, **options) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "fan_in_fan_out": is_gpt2(model), **options}
    return trained(get_peft_model(model, LoraConfig(task_type=task, **options)).eval())


def is_gpt2(model: PreTrainedModel) -> bool:
    return model.config.model_type == "gpt2"


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """By module, what the adapter adds to its weight."""
    modules = model.get_base_model().named_modules()
    return {name: m.get_delta_weight("default").double() for name, m in modules if hasattr(m, "get_delta_weight")}


def reloaded(base: Path, family: str, task: str | None, folder: Path) -> PeftModel:
    model, _ = build(family, task)
    model.load_state_dict(type(model).from_pretrained(base).state_dict())
    return PeftModel.from_pretrained(model, str(folder)).eval()


def add_tokenizer(folder: Path, **more: int) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 4, "good": 5, "film": 6, **more}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
