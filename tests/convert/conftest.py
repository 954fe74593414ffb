"""Adapters that several tests of conversion begin with."""

from pathlib import Path

import pytest
from convert.lora_models import lora, saved_base
from peft import (
    PeftModel,
)
from torch import Tensor


@pytest.fixture
def decoder(tmp_path) -> tuple[Path, PeftModel, dict[str, Tensor]]:
    """The folder of a trained LoRA on a tiny decoder in base/, the model that it was saved from, and inputs."""
    model, inputs = saved_base(tmp_path / "base", "llama", "CAUSAL_LM")
    given = lora(model, "CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    given.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", given, inputs
