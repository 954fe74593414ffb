"""Sizes and estimates from a model's configuration alone, and one measured step."""

import csv
import json
import math
import shlex
import sys

import pytest
import torch
from torch import nn
from training_data import config_for, sentences
from transformers import BertConfig

from loretta.plan import find_preset, meta_model
from loretta.studies.configs import Options
from loretta.studies.cost import count_flops, measure
from loretta.studies.expansion import expand
from loretta.studies.lengths import Lengths, lengths_of
from loretta.studies.sizes import count, estimate, memory, size_of, step_flops
from loretta.studies.study import load_study
from loretta.training.arguments import make_trainer
from loretta.training.config import RunConfig
from loretta.training.data import encode_splits, load_config_task
from loretta.training.model import load_tokenizer, prepare_model
from loretta.training.run import train


def sizes(name, root, **options):
    """Trained parameters by (model, row), the largest over the tasks."""
    estimates, basis = estimate(root, expand(load_study(name), Options(**options), root).runs)
    found: dict = {}
    for item in estimates:
        key = (item.run.model, item.run.row)
        found[key] = max(found.get(key, 0), item.size.trained if item.size else 0)
    return found, estimates, basis


@pytest.mark.parametrize("name", ["table2", "table6", "table7", "table11"])
def test_every_row_trains_what_its_preset_counts(name, tmp_path):
    found, _, _ = sizes(name, tmp_path, seeds=1)
    rows = [row for row in load_study(name).rows if row.preset]
    assert {(row.model, row.name): find_preset(row.preset).count for row in rows} == {
        (row.model, row.name): found[row.model, row.name] for row in rows
    }


def test_all_rows_are_counted_on_one_bare_model(monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(
        "loretta.studies.sizes.meta_model", lambda *args, **kwargs: built.append(args) or meta_model(*args, **kwargs)
    )
    BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    # between two methods of ours one of PEFT, whose layers would be counted as the model's
    rows = ("loretta_adp", "lora-r8", "ft", "loretta_rep")
    options = {"models": (str(tmp_path / "bert"),), "tasks": ("sst2",), "methods": rows, "seeds": 1}
    _, estimates, _ = sizes("table1", tmp_path, **options)
    assert {item.run.row for item in estimates} == {*rows}
    assert len({item.size.model for item in estimates}) == 1
    assert len(built) == 1


# of table 1, rows without a preset: what the paper prints in millions
@pytest.mark.parametrize(
    ("row", "printed"),
    [("ft", 139.19), ("adapters-b8", 0.94), ("lora-r8", 0.30), ("lora-r4", 0.15), ("p-tuning", 0.23), ("prompt", 0.01)],
)
def test_baselines_train_what_the_paper_prints(row, printed, tmp_path):
    found, _, _ = sizes("table1", tmp_path, models=("deberta-base",), tasks=("sst2",), methods=(row,), seeds=1)
    assert round(found["deberta-base", row] / 1e6, 2) == printed


@pytest.mark.parametrize("method", ["lora", "loretta_adp", "loretta_rep", "bitfit", "adapters", "ft", "ia3"])
def test_the_estimate_is_what_a_run_trains(method, bert, data_dir, tmp_path):
    config = RunConfig(
        model=bert, data="rte", data_dir=data_dir, method=method, max_steps=1, output=str(tmp_path / "run"), cpu=True
    )
    assert size_of(config, bert).trained == train(config).parameters.trainable


def test_flops_and_memory_grow_as_they_should(bert):
    config, ten = (
        RunConfig(model=bert, data="rte", method="lora", batch_size=2, eval_batch_size=1),
        Lengths(mean=10, longest=10),
    )
    size = size_of(config, bert)
    # 2 layers of 4 x 32 x 32 and 2 x 32 x 64, the pooler 32 x 32, the classifier 2 x 32
    assert size.products == 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32 + 2 * 32
    # attention: 12 for each pair of tokens of 2 rows, in 2 layers of width 32
    assert step_flops(size, config, ten) == 4 * size.products * 20 + 12 * 2 * 10 * 10 * 2 * 32
    full = config.model_copy(update={"method": "ft"})
    more = step_flops(size_of(full, bert), full, ten) - step_flops(size, config, ten)
    assert more == 2 * size.products * 20
    assert memory(size_of(full, bert), full, ten) > memory(size, config, ten)
    assert memory(size, config.model_copy(update={"batch_size": 4}), ten) > memory(size, config, ten)


def test_steps_cost_what_the_batches_of_the_trainer_hold(bert, reviews, tmp_path):
    """Short texts with a few long ones: the mean is that of the padded batches, not the longest that may be."""
    with (tmp_path / "long.csv").open("w", newline="") as file:
        rows = [(f"{text} {'a ' * (60 * (k % 8 == 0))}", label) for k, (text, label) in enumerate(sentences(64))]
        csv.writer(file).writerows([("review", "mood"), *rows])
    config = config_for(bert, str(tmp_path / "long.csv"), tmp_path / "run", max_length=128, epochs=1, method="lora")
    data = encode_splits(config, load_config_task(config), load_tokenizer(bert))
    trainer = make_trainer(data, prepare_model(config, data.task, data.tokenizer)[0], tmp_path / "work")
    sizes = [batch["input_ids"].shape for batch in trainer.get_train_dataloader()]
    found = lengths_of(config)
    assert found.mean == pytest.approx(sum(map(math.prod, sizes)) / sum(rows for rows, _ in sizes))
    assert found.longest == max(length for _, length in sizes) < 128
    assert found.known
    assert lengths_of(RunConfig(model=bert, data="rte")) == Lengths(mean=128, longest=128, known=False)


def test_an_estimate_says_what_it_rests_on(bert, data_dir, tmp_path):
    options = {"models": (bert,), "tasks": ("rte",), "methods": ("loretta_rep",), "seeds": 2, "data_dir": data_dir,
               "sets": {"epochs": 1}, "cpu": True}  # fmt: skip
    _, before, basis = sizes("table1", tmp_path, **options)
    assert any("one large product" in words for words in basis)
    assert [item.steps for item in before] == [2, 2]
    train(RunConfig(**before[0].run.config))
    record = json.loads((tmp_path / before[0].run.folder / "run.json").read_text())
    _, after, basis = sizes("table1", tmp_path, **options)
    assert any("its 1 finished runs" in words for words in basis)
    assert after[1].seconds == pytest.approx(record["train_seconds"])


def test_what_cannot_run_is_told_in_the_estimate(tmp_path):
    _, estimates, _ = sizes("table1", tmp_path, models=("deberta-base",), tasks=("sst2",), methods=("prefix",), seeds=1)
    assert estimates[0].size is None
    assert "does not fit this model" in estimates[0].reason


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b", "llama-2-70b"])
def test_no_weight_is_needed_to_count(model, tmp_path):
    config = RunConfig(model="not/there", data="sst2", method="lora")
    count(config, tmp_path, model)
    counted = json.loads((tmp_path / "count.json").read_text())
    preset = find_preset(f"paper/{model.replace('llama-2', 'llama2')}-lora")
    assert (counted["parameters"], counted["bytes"]) == (preset.count, 4 * preset.count)


def test_flops_of_a_linear_layer_by_hand():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return type("Output", (), {"loss": self.linear(x).sum()})

    # forward and the weight's gradient: 2 x 3 x 8 x 4 each; the input needs none
    assert count_flops(Model(), {"x": torch.ones(3, 8)}) == 2 * 2 * 3 * 8 * 4


def test_a_measured_step(bert, llama, tmp_path, monkeypatch):
    words = ["tables", "--runs", "a folder"]
    monkeypatch.setattr(sys, "argv", ["loretta", *words])
    # adapters, dense and as trains, are measured as rows of table 5 (tests/cli/test_studies.py)
    config = RunConfig(model=llama, data="sst2", method="lora", batch_size=2, max_length=8, cpu=True)
    measure(config, tmp_path / "lora", llama)
    cost = json.loads((tmp_path / "lora" / "cost.json").read_text())
    assert cost["flops"] > 0
    assert cost["memcpy_us"] > 0
    assert cost["copies"] > 0
    assert cost["device"] == "cpu"
    assert any("aten::copy_" in note for note in cost["notes"])
    assert shlex.split(cost["command"]) == ["loretta", *words]
    encoder = RunConfig(model=bert, data="rte", method="lora", batch_size=2, max_length=8, cpu=True)
    measure(encoder, tmp_path / "encoder", bert)
    assert json.loads((tmp_path / "encoder" / "cost.json").read_text())["flops"] > 0


def test_flops_without_weights(tmp_path, llama):
    """A model whose weights cannot be had still has FLOPs, and the record says why there is no time."""
    config = RunConfig(model="not/there", data="sst2", method="lora", batch_size=1, max_length=8, cpu=True)
    measure(config, tmp_path / "without", llama)
    measure(config.model_copy(update={"model": llama}), tmp_path / "with", llama)
    without, with_weights = (json.loads((tmp_path / name / "cost.json").read_text()) for name in ("without", "with"))
    assert without["flops"] == with_weights["flops"]
    assert without["memcpy_us"] is None
    assert without["notes"][0].startswith("no time of copies: cannot load a model from 'not/there'")
