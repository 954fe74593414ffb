import os

# before torch: many tiny matrices are slower on several threads than on one
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nothing here may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"
# torch collects garbage after each compilation: 2 of the 70 seconds of tests/tuners/test_compiled.py
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import functools
import gc
import importlib
import itertools
import socket
import sys

import jinja2
import pytest
import untouched
from run_matrix import NUMERIC, TESTS
from sampling import sampled

gc.set_threshold(50_000, 10, 20)  # a tenth of the time went into collections, of models that reference themselves


def interpret_kernels() -> None:
    """Have Triton's kernels run on the CPU where there is no GPU. Triton asks once, when it is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


hands_out = " -n " in (given := " ".join(sys.argv)) and " -n 0" not in given  # tests to other processes
if not hands_out or "PYTEST_XDIST_WORKER" in os.environ:  # the conftest.py of a folder may import Triton
    interpret_kernels()
    untouched.prepare()

_connect = socket.socket.connect


def _connect_here(self: socket.socket, address: object) -> None:
    """Connections within this machine alone, as between the processes of a distributed test."""
    host = address[0] if isinstance(address, tuple) else "localhost"
    if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
        raise AssertionError(f"a test reaches for {host!r}: tests run without a network")
    _connect(self, address)


socket.socket.connect = _connect_here  # type: ignore[method-assign]

# what a killed process has written stays; only for the end of a whole machine does a program wait for the disk
os.fsync = os.fstat  # type: ignore[assignment]

# PEFT compiles the template of the model card anew at each save, which takes longer than the save
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]

pytest_plugins = ["pytester"]


numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # this process hands out tests and runs none: torch and transformers would take it eight seconds
    interpret_kernels()
    nn = importlib.import_module("torch.nn")
    nn.Module.named_modules = importlib.import_module("module_walk").named_modules
    # datasets hashes each new table, for a cache of what is made of it
    importlib.import_module("datasets.arrow_dataset").generate_fingerprint = lambda dataset: f"{next(numbers):016x}"
    # Accelerate looks for this package twice a step
    optimizer = importlib.import_module("accelerate.optimizer")
    optimizer.is_lomo_available = functools.cache(optimizer.is_lomo_available)
    for plugin in ("tiny_models", "study_data"):  # which the conftest.py of a folder may have imported before
        config.pluginmanager.register(importlib.import_module(plugin), plugin)


@pytest.fixture(autouse=True)
def seed():
    """The same numbers for a test alone as for all of them."""
    from draws import seed_torch

    seed_torch(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave most cases of the numeric tests to the cells of ``make test-matrix``, which set LORETTA_TEST_WIDE."""
    if os.environ.get("LORETTA_TEST_WIDE") or any("[" in argument for argument in config.args):
        return
    numeric = [item for item in items if item.path.relative_to(TESTS).parts[0] in NUMERIC]
    left_out = set(numeric) - set(sampled(numeric))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Spare garbage collections the modules and tests: each run asks for two collections."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def imported_later():
    """Spare them what tests before have imported, too: the first runs import and keep 40,000 objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
