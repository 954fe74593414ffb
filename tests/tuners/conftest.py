"""How often the trains of a model were contracted."""

from collections import Counter
from collections.abc import Callable

import pytest
from torch import Tensor

import loretta
from loretta.layers.shared import take_apart
from loretta.tuners import joint


@pytest.fixture
def contractions(monkeypatch) -> Counter:
    """How many trains were contracted "together" (one for all that are equal) and "alone"."""
    count: Counter = Counter()

    def counted(kind: str, halves: Callable) -> Callable:
        def call(values: Tensor, shape):
            count[kind] += 1
            return halves(values, shape)

        return call

    def counted_twice(kind: str) -> Callable:
        return counted(kind, counted(kind, take_apart))  # a shared train has two sides, as others are two trains

    monkeypatch.setattr(joint, "halves", counted("together", joint.halves))
    monkeypatch.setattr("loretta.layers.trains.halves", counted("alone", loretta.layers.trains.halves))
    monkeypatch.setattr("loretta.tuners.shared.layer.take_apart", counted_twice("together"))
    monkeypatch.setattr("loretta.layers.shared.take_apart", counted_twice("alone"))
    return count
