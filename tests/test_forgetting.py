"""Table 4: three tasks in turn, and what a method's row lacks of it."""

import argparse
import pathlib
import sys
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import forgetting
from forgetting import CYCLES, ORDERS, SEQUENCE, jobs
from retention import kept, kept_of_earlier


def names(orders):
    return [">".join(order) for order in orders]


def test_three_of_the_orders_have_each_task_once_in_each_place():
    assert set(CYCLES) < set(ORDERS)
    assert all(set(of_place) == set(SEQUENCE) for of_place in zip(*CYCLES, strict=True))


@pytest.fixture
def measured(monkeypatch):
    """Measurements in which a score is that of its seed and order, and what they were asked for."""
    asked = []

    def measure(name, orders, seeds, args, split_of):
        asked.append((name, names(orders), list(seeds)))
        scores = {order: {task: [score(order, seed) for seed in seeds] for task in SEQUENCE} for order in names(orders)}
        row = {"method": name, "scores": scores, "seeds": list(seeds), "seconds": 1.0}
        return {**row, "versions": {"torch": str(len(asked))}}

    monkeypatch.setattr(forgetting, "measure", measure)
    return asked


def score(order, seed):
    return names(ORDERS).index(order) + 0.1 * seed


def options(**more):
    return argparse.Namespace(**{"methods": ["LoRA r=8"], "seeds": 2, "cycles": False, **more})


def is_whole(row):
    return all(
        of_order == {task: [score(order, seed) for seed in row["seeds"]] for task in SEQUENCE}
        for order, of_order in row["scores"].items()
    )


def test_seeds_that_a_method_lacks_join_its_row_in_the_orders_that_this_has(measured):
    wanted = options(methods=["LoRA r=8", "norms"], cycles=True)
    rows = [make() for _, make in jobs(wanted, [], None)]
    assert jobs(wanted, rows, None) == []
    (name, make), (_, of_norms), (other, whole) = jobs(
        options(methods=["LoRA r=8", "norms", "rep"], seeds=4, cycles=True), rows, None
    )
    assert (name, other) == ("LoRA-r=8-from-2", "rep")
    row = make()
    assert row["seeds"] == [0, 1, 2, 3]
    assert list(row["scores"]) == names(CYCLES)
    assert is_whole(row)
    assert of_norms()["seconds"] == 2
    assert whole()["seeds"] == [0, 1, 2, 3]


def test_orders_that_a_method_lacks_join_its_row_with_the_seeds_that_this_has(measured):
    [(_, make)] = jobs(options(seeds=3, cycles=True), [], None)
    half = make()
    [(name, make)] = jobs(options(seeds=5), [half], None)
    row = make()
    assert name == "LoRA-r=8-orders"
    lacking = [order for order in names(ORDERS) if order not in names(CYCLES)]
    assert measured[-1] == ("LoRA r=8", lacking, [0, 1, 2])
    assert row["scores"].keys() == set(names(ORDERS))
    assert row["seeds"] == [0, 1, 2]
    assert is_whole(row)
    assert (row["seconds"], row["versions"]) == (2, {"torch": "1, 2"})
    [(name, make)] = jobs(options(seeds=5), [row], None)  # the seeds come when all orders are there
    row = make()
    assert name == "LoRA-r=8-from-3"
    assert row["scores"].keys() == set(names(ORDERS))
    assert row["seeds"] == [0, 1, 2, 3, 4]
    assert is_whole(row)
    assert jobs(options(seeds=5), [row], None) == []
    assert jobs(options(seeds=5, cycles=True), [row], None) == []


@pytest.mark.parametrize("orders", [ORDERS, CYCLES, ORDERS[3:4]], ids=["six", "three", "one"])
def test_each_order_goes_on_from_the_values_of_its_own_beginning(orders, monkeypatch):
    def turn(name, task, members, args, data):
        assert members  # a population of nobody cannot be prepared
        values = [(before if len(before) else torch.tensor([seed])) * 10 for (_, seed), before in members]
        values = torch.stack(values) + 1 + SEQUENCE.index(task)
        return SimpleNamespace(population=SimpleNamespace(values=values, slices={"cores": slice(0, 1)}))

    def accuracies(loop, args):
        return [dict.fromkeys(SEQUENCE, value.item()) for value in loop.population.values]

    monkeypatch.setattr(forgetting, "turn", turn)
    monkeypatch.setattr(forgetting, "accuracies", accuracies)
    args = argparse.Namespace(model="tiny", cpu=True)
    row = forgetting.measure("LoRA r=8", orders, [4, 7], args, lambda task: None)
    digits = {order: "".join(str(1 + SEQUENCE.index(task)) for task in order) for order in orders}
    assert row["scores"] == {
        ">".join(order): {task: [int(f"{seed}{digits[order]}") for seed in (4, 7)] for task in SEQUENCE}
        for order in orders
    }


def test_methods_are_compared_in_the_orders_that_both_have():
    def row(orders, more):
        scores = {o: {task: [score(o, seed) + more for seed in (0, 1)] for task in SEQUENCE} for o in names(orders)}
        return {"seeds": [0, 1], "scores": scores}

    for one, other in ((ORDERS, CYCLES), (CYCLES, ORDERS), (CYCLES, CYCLES)):
        assert list(kept(row(one, 0.5), row(other, 0.0))) == pytest.approx([0.5, 0.5])


def test_what_is_kept_of_earlier_tasks_leaves_out_the_last_of_each_order():
    def row(orders, last):
        places = {o: o.split(">") for o in names(orders)}
        scores = {o: {t: [last if t == of[-1] else 0.5] * 2 for t in of} for o, of in places.items()}
        return {"seeds": [0, 1], "scores": scores}

    one, other = row(ORDERS, 0.9), row(ORDERS, 0.1)
    other["scores"][names(ORDERS)[0]] = {task: [0.2, 0.2] for task in SEQUENCE}
    assert list(kept_of_earlier(one, other)) == pytest.approx([0.3 / len(ORDERS)] * 2)
    first = {**one, "scores": {names(ORDERS)[0]: one["scores"][names(ORDERS)[0]]}}
    assert list(kept_of_earlier(first, other)) == pytest.approx([0.3] * 2)
