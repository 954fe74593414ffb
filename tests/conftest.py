import os

# before torch: many tiny matrices are slower on several threads than on one
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nothing here may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from draws import seed_torch

# the kernels then run on the CPU; Triton asks once, when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["tiny_models", "study_data"]


@pytest.fixture(autouse=True)
def seed():
    """The same numbers for a test alone as for all of them."""
    seed_torch(0)
