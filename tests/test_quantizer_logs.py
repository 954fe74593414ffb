"""What a user sees on stderr of the packages that PEFT imports for quantised layers alone."""

import importlib.util
import re
import subprocess
import sys

import pytest

PROGRAM = """
import sys
print("imported", file=sys.stderr)
import loretta
import logging
import torch
from torch import nn
print("wrapped", file=sys.stderr)
config = loretta.LorettaRepConfig(tensor_rank=2, target_modules=["0"])
loretta.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config)(torch.ones(2, 64))
print("said elsewhere", file=sys.stderr)
logging.getLogger("torchao").warning("This weight is slow")
logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass", logging.Handler)
print("quantised", file=sys.stderr)
import bitsandbytes
model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), bitsandbytes.nn.Linear4bit(64, 64)).to("cpu")
loretta.get_peft_model(model, loretta.LorettaRepConfig(tensor_rank=2, target_modules=["0", "1"]))
"""


def printed_by(program: str) -> list[str]:
    """The lines on stderr, without the time and process that torch's loggers begin them with."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [re.sub(r"^[A-Z]\d{4} [\d:.]+ \d+ ", "", line) for line in done.stderr.splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_lines_of_quantisers_wait_for_a_quantised_layer():
    """Nothing is printed at import and around a plain model, other lines at once, and these once, when they matter."""
    lines = printed_by(PROGRAM)
    parts, part = {}, None
    for line in lines:
        if line in ("imported", "wrapped", "said elsewhere", "quantised"):
            part = parts.setdefault(line, [])
        else:
            part.append(line)
    assert parts["imported"] == []
    assert parts["wrapped"] == []
    slow, enum = parts["said elsewhere"]
    assert slow == "This weight is slow"
    assert "Handler" in enum
    assert parts["quantised"] == printed_by("import peft")
