"""Whether two runs are the same up to rounding: records and adapters."""

import pytest
import torch
from safetensors.torch import load_file

from loretta.training.config import RunConfig

NOISE = 2e-4  # float32 sums in another order, after some steps of Adam


def assert_same_run(together, alone, *, signs=True):
    """Two records and the adapters in their folders; without ``signs`` trains may differ in those of their cores.

    A singular vector has no sign of its own, so rounding may turn a column of one core and a row of the next.
    """
    assert [(p.split, p.step, p.epoch) for p in together.history] == [(p.split, p.step, p.epoch) for p in alone.history]
    for got, expected in zip(together.history, alone.history, strict=True):
        assert got.values == pytest.approx(expected.values, abs=NOISE, rel=NOISE)
    same = {"model", "task", "method", "seed", "sizes", "metric", "parameters", "trains", "adapter_bytes", "best_step"}
    assert together.model_dump(include=same) == alone.model_dump(include=same)
    folders = [RunConfig(**record.config).folder for record in (together, alone)]
    values = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert values[0].keys() == values[1].keys()
    for name in values[0]:
        if not name.endswith("key.bias"):  # whose gradient is rounding alone
            got, expected = (each[name] if signs or "loretta_" not in name else each[name].abs() for each in values)
            assert torch.allclose(got, expected, atol=1e-3), name
    assert {path.name for path in folders[0].iterdir()} <= {path.name for path in folders[1].iterdir()}
