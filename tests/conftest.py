import os

# before torch: many tiny matrices are slower on several threads than on one
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nothing here may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"

import socket

import pytest
import torch
from draws import seed_torch

# the kernels then run on the CPU; Triton asks once, when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_connect = socket.socket.connect


def _connect_here(self: socket.socket, address: object) -> None:
    """Connections within this machine alone, as between the processes of a distributed test."""
    host = address[0] if isinstance(address, tuple) else "localhost"
    if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
        raise AssertionError(f"a test reaches for {host!r}: tests run without a network")
    _connect(self, address)


socket.socket.connect = _connect_here  # type: ignore[method-assign]

pytest_plugins = ["tiny_models", "study_data"]


@pytest.fixture(autouse=True)
def seed():
    """The same numbers for a test alone as for all of them."""
    seed_torch(0)


# those that differ in what a method makes of them: norms of relative positions, GQA, encoder and decoder, Conv1D
FAMILIES = {"bert", "deberta-v2", "llama", "t5", "gpt2"}
# what these test is the families: their heads, names and targets
OF_FAMILIES = {
    "test_heads.py",
    "test_default_targets.py",
    "test_placement.py",
    "test_strangers.py",
    "test_task_types.py",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other families to the cells of ``make test-matrix``, which set LORETTA_TEST_WIDE."""
    if os.environ.get("LORETTA_TEST_WIDE"):
        return

    def is_wide(item: pytest.Item) -> bool:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        family, method = given.get("family"), given.get("method")
        if not isinstance(family, str) or family in FAMILIES:
            return False
        return method == "shared" or (method in ("rep", "adp") and item.path.name not in OF_FAMILIES)

    wide = [item for item in items if is_wide(item)]
    config.hook.pytest_deselected(items=wide)
    items[:] = [item for item in items if item not in wide]
