"""The random numbers of the tests. LORETTA_TEST_SEED=N gives all of them, hypothesis' examples too, another start."""

import os

import hypothesis
import torch

SHIFT = int(os.environ.get("LORETTA_TEST_SEED", "0"))
# small numbers are the seeds of tests: a shift must not give one test the numbers of another
_STRIDE = 100_003


def seed_torch(seed: int) -> None:
    """torch.manual_seed, moved."""
    if torch.cuda.is_available():
        torch.manual_seed(seed + SHIFT * _STRIDE)
    else:  # for devices that are not there torch.manual_seed formats and keeps the stack, three times a call
        torch.default_generator.manual_seed(seed + SHIFT * _STRIDE)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for one draw, moved."""
    return torch.Generator().manual_seed(seed + SHIFT * _STRIDE)


def examples(test):
    """A hundred examples of hypothesis, the same in every run with the same LORETTA_TEST_SEED."""
    settings = hypothesis.settings(derandomize=not SHIFT, database=None, deadline=None, max_examples=100)
    return settings(hypothesis.seed(SHIFT)(test) if SHIFT else test)
