"""The learning rate at which a run starts where none is given."""

import pytest
from tuners.families import build

from loretta.training.methods import find_method, starting_rate
from loretta.training.model import wrap


@pytest.mark.parametrize("form", ["rep", "adp", "shared"])
def test_a_budget_starts_at_the_rate_of_the_form_that_it_chose(form):
    wrapped = wrap(build("bert")[0], form, "classification", {"train_norms": False})
    assert starting_rate("auto", wrapped) == find_method(form).learning_rate
    assert starting_rate("lora", wrapped) == find_method("lora").learning_rate


def test_a_shared_train_of_rank_1_starts_at_a_rate_of_its_own():
    wrapped = wrap(build("bert")[0], "shared", "classification", {"train_norms": False, "tensor_rank": 1})
    assert starting_rate("auto", wrapped) == starting_rate("shared", wrapped) == 1.5e-3


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("shared", {"train_norms": False, "tensor_rank": 1}, 3e-3), ("shared", {}, 1.5e-3), ("lora", {}, 1.5e-3),
        ("compact", {}, 1.5e-3), ("ia3", {}, 1e-2), ("norms", {}, 1.5e-3),
    ],
)  # fmt: skip
def test_shared_and_lora_start_at_twice_the_rate_on_a_model_that_writes(name, options, rate):
    assert starting_rate(name, wrap(build("llama")[0], name, "language_modeling", options)) == rate


@pytest.mark.parametrize(
    ("name", "options", "times"),
    [
        ("adp", {"tensor_rank": 5}, 1),
        ("adp", {"tensor_rank": 1}, 1),
        ("adp", {"tensor_rank": 20}, 0.5),
        ("rep", {"tensor_rank": 5, "rank_pattern": {"q_proj": 45}}, 1 / 3),
        ("rep", {"tensor_rank": 20, "even_rates": True}, 1),
        ("adp", {"tensor_rank": 20, "even_rates": True}, 1),
        ("compact", {"tensor_rank": 20}, 1),
        ("adapters", {"tensor_rank": 20}, 1),
    ],
)
def test_the_rate_of_the_papers_forms_falls_as_the_root_of_a_rank_above_the_papers(name, options, times):
    wrapped = wrap(build("llama")[0], name, "language_modeling", options)
    assert starting_rate(name, wrapped) == pytest.approx(find_method(name).learning_rate * times)
