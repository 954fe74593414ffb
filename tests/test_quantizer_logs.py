"""What a user sees on stderr of the packages that PEFT imports for quantised layers alone."""

import importlib.util
import re

import pytest
import untouched

PROGRAM = """
import os
import sys
import torch
torch._logging.set_logs()  # as if it were imported here, torch writes to the stderr of this process
print("PEFT alone", file=sys.stderr)
if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
else:
    import peft
    sys.exit()
print("imported", file=sys.stderr)
import loretta
import logging
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


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_lines_of_quantisers_wait_for_a_quantised_layer():
    """Nothing is printed at import and around a plain model, other lines at once, and these once, when they matter."""
    done = untouched.run(PROGRAM, imported="torch")
    assert done.returncode == 0, done.stderr
    parts, part = {}, None
    for line in done.stderr.splitlines():
        if line in ("PEFT alone", "imported", "wrapped", "said elsewhere", "quantised"):
            part = parts.setdefault(line, [])
        else:
            part.append(re.sub(r"^[A-Z]\d{4} [\d:.]+ \d+ ", "", line))  # the time and process of torch's loggers
    assert parts["imported"] == []
    assert parts["wrapped"] == []
    slow, enum = parts["said elsewhere"]
    assert slow == "This weight is slow"
    assert "Handler" in enum
    assert parts["quantised"] == parts["PEFT alone"] != []
