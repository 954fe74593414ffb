"""What recorded steps read and write, without a GPU: batches, learning rates and gradients stay in the same tensors."""

import gc
import weakref

import torch
from torch import nn

from loretta.training.recordings import Gradients, Rates, Recording
from loretta.tuners.recorded import uncollected


def test_a_recording_reads_each_batch_from_the_same_tensors():
    first = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])}
    recording = Recording.of(first, torch.tensor(2), torch.device("cpu"))
    places = {name: tensor.data_ptr() for name, tensor in recording.inputs.items()}
    assert places.keys() == first.keys()
    for batch, items in ((first, 2), ({name: tensor + 7 for name, tensor in first.items()}, torch.tensor(5))):
        recording.load(batch, items)
        assert all(torch.equal(recording.inputs[name], batch[name]) for name in batch)
        assert recording.num_items.item() == float(items)
    assert {name: tensor.data_ptr() for name, tensor in recording.inputs.items()} == places
    assert Recording.of(first, None, torch.device("cpu")).num_items is None


def test_rates_are_tensors_in_a_recording_and_numbers_outside_of_it():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.AdamW(
        [{"params": weights[:1], "lr": 0.5}, {"params": []}, {"params": weights[1:]}], lr=0.25
    )
    rates = Rates()
    for _ in range(2):
        with rates.as_inputs(optimizer):
            assert [group["lr"] for group in optimizer.param_groups] == rates.tensors
            assert all(group["capturable"] for group in optimizer.param_groups)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.25]
        assert not any(group["capturable"] for group in optimizer.param_groups)
    optimizer.param_groups[2]["lr"] = 0.125
    rates.load(optimizer)
    assert [tensor.item() for tensor in rates.tensors] == [0.5, 0.25, 0.125]


def test_gradients_come_back_as_zeros_in_the_same_tensors():
    model, gradients = nn.Linear(2, 1), Gradients()
    gradients.attach()  # before the first batch there are none
    model(torch.ones(1, 2)).sum().backward()
    gradients.keep(model)
    places = {name: parameter.grad.data_ptr() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    gradients.attach()
    assert {name: parameter.grad.data_ptr() for name, parameter in model.named_parameters()} == places
    assert all(not parameter.grad.any() for parameter in model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    gradients.attach()  # within an update nothing is lost
    assert torch.equal(model.weight.grad, torch.ones(1, 2))


def test_an_old_recording_in_a_cycle_outlives_the_making_of_a_new_one():
    class Old:
        pass

    old, threshold = Old(), gc.get_threshold()
    old.itself, gone = old, weakref.ref(old)
    gc.set_threshold(1)  # whatever is made collects what was made last
    try:
        with uncollected():
            del old
            assert all(each == [] for each in [[] for _ in range(100)])
            assert gone() is not None
        assert gc.isenabled()
        gc.collect()
        assert gone() is None
    finally:
        gc.set_threshold(*threshold)
