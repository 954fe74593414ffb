"""A memory that is too small: one sentence, or smaller batches with the same updates."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import typer
from draws import seed_torch
from interrupts import stopping_behind
from safetensors.torch import load_file
from tiny_models import tokenizer
from training_data import config_for
from transformers import BartConfig, BartModel

from loretta.errors import Stopped
from loretta.memory import free_memory, is_out_of_memory, peak_memory
from loretta.training.data import load_config_task
from loretta.training.predict import evaluate, load_run
from loretta.training.run import train
from loretta.training.trainer import TwoRateTrainer, next_smaller

OPTIONS = {"epochs": 1, "eval_steps": 5, "batch_size": 8}


def small_memory(monkeypatch, most, from_step=1):
    """Batches of more than ``most`` examples do not fit any more in training, from a step on."""
    original = TwoRateTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if torch.is_grad_enabled() and len(inputs["input_ids"]) > most and self.state.global_step + 1 >= from_step:
            loss.backward()  # it came as far as that, and some gradients are there
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return loss

    monkeypatch.setattr(TwoRateTrainer, "compute_loss", compute_loss)


def assert_same(record, expected, folder, other):
    assert record.history == expected.history
    found, wanted = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (folder, other))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_memory_that_is_too_small_is_one_sentence_with_what_helps(bert, reviews, tmp_path, monkeypatch):
    small_memory(monkeypatch, most=4)
    words = (
        r"too small for 8 examples of up to 16 tokens at once \(CUDA out of memory\): lower --batch-size and raise "
        r"--accumulate as much \(--auto-batch does both\), lower --max-length .*--gradient-checkpointing"
    )
    with pytest.raises(Stopped, match=words) as stopped:
        train(config_for(bert, reviews, tmp_path / "run", **OPTIONS))
    assert stopped.value.exit_status == 71
    small_memory(monkeypatch, most=0)
    with pytest.raises(Stopped, match="too small for 8 examples"):
        train(config_for(bert, reviews, tmp_path / "none", **OPTIONS, auto_batch=True))


@pytest.mark.parametrize(("most", "accumulate"), [(4, 1), (1, 2)])
def test_smaller_batches_are_the_run_with_that_accumulation(most, accumulate, bert, reviews, tmp_path, monkeypatch):
    plain = {**OPTIONS, "batch_size": most, "accumulate": 8 // most * accumulate}
    expected = train(config_for(bert, reviews, tmp_path / "plain", **plain))
    small_memory(monkeypatch, most)
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS, accumulate=accumulate, auto_batch=True)
    record = train(config)
    assert_same(record, expected, tmp_path / "run", tmp_path / "plain")
    assert f"too small for batches of 8: trained on {most} at once, {8 // most * accumulate} " in record.notes[-1]


def test_the_updates_are_those_of_the_whole_batch(bert, reviews, tmp_path, monkeypatch):
    """Without dropout and up to the order of sums, whether the last batch of an epoch is whole or not."""
    steady = tmp_path / "steady"
    shutil.copytree(bert, steady)
    config = json.loads((steady / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (steady / "config.json").write_text(json.dumps(config))
    options = {**OPTIONS, "batch_size": 6, "learning_rate": 1e-3}  # 76 examples: 12 batches of 6, one of 4
    expected = train(config_for(str(steady), reviews, tmp_path / "whole", **options))
    small_memory(monkeypatch, most=3)
    record = train(config_for(str(steady), reviews, tmp_path / "run", **options, auto_batch=True))
    for got, wanted in zip(record.history, expected.history, strict=True):
        assert got.values == pytest.approx(wanted.values, rel=1e-4, abs=1e-5)


def test_a_batch_that_comes_late_goes_back_to_the_checkpoint_and_a_kill_changes_nothing(
    bert, reviews, tmp_path, monkeypatch
):
    """As by hand: stop at the checkpoint, and go on with smaller batches."""
    with stopping_behind(5, signal.SIGTERM), pytest.raises(Stopped):
        train(config_for(bert, reviews, tmp_path / "begun", **OPTIONS))
    halved = config_for(bert, reviews, tmp_path / "by-hand", **OPTIONS | {"batch_size": 4, "accumulate": 2})
    shutil.copytree(tmp_path / "begun" / "checkpoints", halved.folder / "checkpoints")
    (halved.folder / "config.json").write_text(halved.model_dump_json())
    expected = train(halved, resume=True)
    assert [point.step for point in expected.history if point.split == "validation"] == [5, 10]

    small_memory(monkeypatch, most=4, from_step=7)
    config = config_for(bert, reviews, tmp_path / "run", **OPTIONS, auto_batch=True)
    assert_same(train(config), expected, config.folder, halved.folder)
    config = config.model_copy(update={"output": str(tmp_path / "killed")})
    with stopping_behind(9, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    assert_same(train(config, resume=True), expected, config.folder, halved.folder)


def test_a_batch_is_some_whole_ones_of_the_next_smaller():
    assert [next_smaller(size) for size in (1, 2, 3, 6, 7, 8, 9, 12)] == [None, 1, 1, 3, 1, 4, 3, 6]


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(), False),
        (typer.Exit(1), False),
    ],
)
def test_what_says_that_memory_is_used_up(error, is_so):
    assert is_out_of_memory(error) is is_so


def test_a_run_on_the_cpu_takes_nothing_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("empty_cache", "reset_peak_memory_stats"):  # the latter makes a context
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("the GPU was asked for"))
    assert free_memory() == 0


def test_what_cublas_keeps_for_each_stream_is_released_before_the_bytes_are_counted(monkeypatch):
    """Else a process that recorded three populations would seem to have failed to release them."""
    kept = [2**25] * 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", kept.clear, raising=False)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: sum(kept))
    assert free_memory() == 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot begin a new peak")
def test_a_process_begins_a_new_peak_for_its_next_run():
    free_memory()  # what tests before this one held at most may be more than this one holds
    before = peak_memory()
    used = torch.ones(2**26)
    assert peak_memory() >= before + used.nbytes / 2
    at_most = peak_memory() - used.nbytes / 2
    del used
    assert free_memory() == 0
    assert peak_memory() < at_most


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot begin a new peak")
def test_what_a_run_has_freed_does_not_hide_what_the_next_one_takes():
    """Small pieces, which the C library keeps for later, below one that is still in use."""
    free_memory()
    before = peak_memory()
    pieces = [bytes(2000) for _ in range(2**16)]
    last = bytes(2000)
    del pieces
    free_memory()
    assert peak_memory() < before + 2**26, len(last)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot begin a new peak")
def test_the_memory_of_a_run_begins_with_the_run(bert, reviews, tmp_path):
    """What the process held before, here half a gigabyte, is no part of it, and hides nothing."""
    before = torch.ones(1 << 27)
    del before
    record = train(config_for(bert, reviews, tmp_path / "run", max_steps=1))
    assert 0 < record.peak_memory_bytes < 1 << 28


def test_an_evaluation_keeps_logits_alone_of_an_encoder_decoder_model(reviews, tmp_path, monkeypatch):
    """Hidden states of all tokens of all rows are gigabytes for a real model."""
    sizes = {"vocab_size": 32, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    more = {f"{part}_{name}": 32 if name == "ffn_dim" else 2
            for part in ("encoder", "decoder") for name in ("ffn_dim", "attention_heads")}  # fmt: skip
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    seed_torch(0)
    BartModel(BartConfig(**sizes, **more, **ends)).save_pretrained(tmp_path / "bart")
    tokenizer().save_pretrained(tmp_path / "bart")
    original, kept = TwoRateTrainer.evaluation_loop, []

    def loop(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        kept.append(output.predictions)
        return output

    monkeypatch.setattr(TwoRateTrainer, "evaluation_loop", loop)
    folder = tmp_path / "run"
    record = train(config_for(str(tmp_path / "bart"), reviews, folder, epochs=1))
    assert {type(predictions) for predictions in kept} == {np.ndarray}
    assert {predictions.shape[1:] for predictions in kept} == {(2,)}
    loaded = load_run(folder, cpu=True)
    scores = evaluate(loaded, load_config_task(loaded.config), "validation")  # by the model's own outputs
    assert scores["accuracy"] == record.validation["accuracy"]
