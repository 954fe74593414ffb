import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """The same numbers for a test alone as for all of them."""
    torch.manual_seed(0)
