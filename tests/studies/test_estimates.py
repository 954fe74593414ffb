"""What a dry run says of memory and time, beside what a step holds, counts and took."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from draws import seed_torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from loretta.studies.configs import total_steps
from loretta.studies.cost import count_flops
from loretta.studies.lengths import Lengths
from loretta.studies.sizes import LIBRARIES, Size, memory, size_of, step_flops, step_seconds
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.model import load_tokenizer, wrap

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS, TOKENS, SIZES = 4, 96, {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
BERT = BertConfig(num_attention_heads=4, vocab_size=50, **SIZES)
LLAMA = LlamaConfig(num_attention_heads=4, vocab_size=50, **SIZES)


class Held(TorchDispatchMode):
    """The most bytes of tensors that lie there at once, without those that were there before."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        known = [*model.parameters(), *model.buffers()]
        self.bytes, self.now, self.most = {t.untyped_storage()._cdata: 0 for t in known}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.bytes:
                self.bytes[key] = tensor.untyped_storage().nbytes()
                self.now += self.bytes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._forget, key)
        return found

    def _forget(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def planned(config, folder: Path, **options) -> RunConfig:
    """A run on a model of that configuration, whose weights are never loaded."""
    config.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(f"a film of number {k}" for k in range(20)))
    data = "sst2" if config is BERT else str(folder / "text.txt")
    fixed = {"model": str(folder / "model"), "data": data, "method": "lora", "cpu": True}
    return RunConfig(**fixed, batch_size=ROWS, eval_batch_size=1, max_length=TOKENS, **options)


def made(config, run: RunConfig, **options) -> torch.nn.Module:
    kind = "classification" if config is BERT else "language_modeling"
    family = AutoModelForSequenceClassification if config is BERT else AutoModelForCausalLM
    seed_torch(0)
    model = wrap(family.from_config(config, **options), run.method, kind, run.method_args, run.head_policy)
    if run.gradient_checkpointing:
        new = "activation_checkpointing_enable"  # its name from transformers 5.23 on
        getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")()
        model.enable_input_require_grads()
    return model.train()


def batch(config) -> dict[str, torch.Tensor]:
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    if config is not BERT:
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[0, TOKENS // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0]}


def wide(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": vocabulary})


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", [BERT, LLAMA, wide(4096)], ids=["scores", "decoder", "logits"])
def test_the_memory_of_a_step_is_told_within_a_factor_of_two(config, again, tmp_path):
    run = planned(config, tmp_path, gradient_checkpointing=again)
    size = size_of(run, run.model)
    model = made(config, run)
    with Held(model) as held:
        model(**batch(config)).loss.backward()
    told = memory(size, run, Lengths(mean=TOKENS, longest=TOKENS)) - LIBRARIES - 4 * size.model - 16 * size.trained
    assert 0.5 < told / held.most < 2


@pytest.mark.parametrize("config", [BERT, wide(4096)], ids=["encoder", "logits"])
def test_the_memory_of_an_evaluation_counts_where_it_is_larger(config, tmp_path):
    run = planned(config, tmp_path)
    lengths = Lengths(mean=TOKENS, longest=TOKENS)
    size, model = size_of(run, run.model), made(config, run).eval()
    with torch.no_grad(), Held(model) as held:
        model(**batch(config))
    told = memory(size, run.model_copy(update={"batch_size": 1, "eval_batch_size": 64 * ROWS}), lengths) - LIBRARIES
    assert 0.5 < (told - 4 * size.model - 16 * size.trained) / (64 * held.most) < 2


def test_a_base_in_fewer_bits_takes_fewer_bytes(tmp_path):
    run = planned(BERT, tmp_path)
    size, lengths = size_of(run, run.model), Lengths(mean=TOKENS, longest=TOKENS)
    saved = memory(size, run, lengths) - memory(size, run.model_copy(update={"quantize": "nf4"}), lengths)
    assert saved == 3.5 * size.model


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["encoder", "decoder"])
def test_the_flops_of_a_step_are_those_that_torch_counts(config, again, tmp_path):
    run = planned(config, tmp_path, gradient_checkpointing=again)
    # torch counts products of matrices, and of attention in one kernel nothing on a CPU
    counted = count_flops(made(config, run, attn_implementation="eager"), batch(config))
    told = step_flops(size_of(run, run.model), run, Lengths(mean=TOKENS, longest=TOKENS))
    assert told == pytest.approx(counted, rel=0.25)


def launched(row: dict) -> bool:
    return row["method"] == "lora q,v" and row["mode"] == "eager" and (row.get("gpu_ms") or row["ms"]) < row["ms"] / 2


def test_a_step_on_a_gpu_takes_at_least_what_launching_its_kernels_took(monkeypatch):
    rows = [
        row
        for file in RESULTS.glob("speed_*_eager.json")
        for row in json.loads(file.read_text())["rows"]
        if launched(row)
    ]
    assert len(rows) > 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for row in rows:
        size = Size(
            trained=0, saved=0, model=0, products=1, width=1, layers=row["layers"], heads=1, vocabulary=0, drops=False
        )
        run = RunConfig(model="m", data="sst2", batch_size=row["batch"])
        lengths = Lengths(mean=row["tokens"], longest=row["tokens"])
        assert 0.5 < 1e3 * step_seconds(size, run, lengths, 1e14) / row["ms"] < 2, row
        recorded = run.model_copy(update={"cuda_graph": True})
        assert step_seconds(size, recorded, lengths, 1e14) < 1e-6


def test_the_calls_of_a_small_model_count_on_a_cpu_too():
    size = Size(trained=0, saved=0, model=0, products=1, width=1, layers=6, heads=1, vocabulary=0, drops=False)
    run = RunConfig(model="m", data="sst2", cpu=True, accumulate=2)
    assert step_seconds(size, run, Lengths(mean=1, longest=1), 1e12) == pytest.approx(2 * 6 * 3e-3, rel=1e-3)


def test_the_libraries_of_a_process_count_on_a_cpu_alone(tmp_path, monkeypatch):
    run, lengths = planned(LLAMA, tmp_path), Lengths(mean=TOKENS, longest=TOKENS)
    size = size_of(run, run.model)
    told = memory(size, run, lengths)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert told - memory(size, run.model_copy(update={"cpu": False}), lengths) == LIBRARIES


def test_documents_are_limited_before_they_are_cut_into_blocks(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("a film of a plot and a cast " * 5 + "and a film " * k for k in range(60)))
    run = RunConfig(model=llama, data=str(text), limit=10, max_length=16, batch_size=2, epochs=1)
    blocks = len(encode_splits(run, load_config_task(run), load_tokenizer(llama)).splits["train"])
    assert total_steps(run.model_dump()) == math.ceil(blocks / 2) != math.ceil(10 / 2)


def test_what_runs_took_is_not_told_again_as_calls():
    size = Size(trained=0, saved=0, model=0, products=1, width=1, layers=6, heads=1, vocabulary=0, drops=False)
    run, one = RunConfig(model="m", data="sst2", cpu=True), Lengths(mean=1, longest=1)
    assert step_seconds(size, run, one, 1e3, measured=True) == step_flops(size, run, one) / 1e3
