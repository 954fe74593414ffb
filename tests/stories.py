"""A small LLaMA with trained weights (stories260K), where the machine that runs the tests has one."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

FOLDER = os.environ.get("LORETTA_STORIES", str(Path(__file__).parents[2] / "shared" / "models" / "stories260K"))
INPUTS = {"input_ids": torch.tensor([[1, 403, 407, 261, 378, 20, 33, 50]])}


def load() -> PreTrainedModel:
    if not Path(FOLDER).is_dir():
        pytest.skip(f"no model at LORETTA_STORIES={FOLDER}")
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
