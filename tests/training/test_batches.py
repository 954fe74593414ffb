"""Batches padded to a bucket: neither loss nor gradients change, and what cannot be padded stays."""

from itertools import pairwise

import pytest
import torch
from tolerances import assert_gradients_near, assert_near
from training.token_batches import collate, examples, tiny_bert, tiny_llama

from loretta.training.batches import PadToBucket, bucket


def test_buckets():
    buckets = [bucket(length) for length in range(1, 2049)]
    assert all(length <= padded and padded % 8 == 0 for length, padded in enumerate(buckets, 1))
    assert all(padded <= 1.25 * length for length, padded in enumerate(buckets, 1) if length > 32)
    assert all(before <= after for before, after in pairwise(buckets))
    assert len(set(buckets)) == 28
    assert sorted(set(buckets))[:12] == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]


@pytest.mark.parametrize(("model_of", "causal"), [(tiny_bert, False), (tiny_llama, True)])
def test_padding_to_a_bucket_changes_neither_loss_nor_gradients(model_of, causal):
    model = model_of().double()
    results = []
    for collator in (collate, PadToBucket(collate, padding_token=0)):
        model.zero_grad()
        batch = collator(examples([5, 9, 3], causal=causal))
        loss = model(**batch).loss
        loss.backward()
        results.append((batch, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, loss, gradients), (padded, loss_padded, gradients_padded) = results
    assert plain["input_ids"].shape == (3, 9)
    assert padded["input_ids"].shape == (3, 16)
    assert_near("loss", loss_padded.float(), loss)  # LLaMA's norms and softmax are in float32 always
    assert_gradients_near({name: grad.float() for name, grad in gradients_padded.items()}, gradients)


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        (lambda batch: batch.pop("attention_mask"), None),  # nothing would hide the padding
        (lambda batch: batch.update(other=torch.ones(2, 5, dtype=torch.long)), None),
        (lambda batch: batch.update(labels=torch.ones(2, 5)), None),  # of five classes
        (lambda batch: None, 7),  # the model has no eighth position
    ],
)
def test_what_cannot_be_padded_stays(change, longest):
    def collator(rows):
        batch = collate(rows)
        change(batch)
        return batch

    batch = PadToBucket(collator, padding_token=0, longest=longest)(examples([5, 4]))
    assert batch["input_ids"].shape == (2, 5)
