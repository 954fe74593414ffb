"""A study and options -> runs: what is narrowed, what is fitted, what a sweep chooses."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from study_data import finish
from transformers import BertConfig

from loretta.errors import InputError
from loretta.studies.configs import Options, shapes, total_steps
from loretta.studies.expansion import choose, differences, expand
from loretta.studies.study import load_study
from loretta.training.config import RunConfig


def runs(name, root, **options):
    return expand(load_study(name), Options(**options), root).runs


def test_the_whole_table(tmp_path):
    found = runs("table1", tmp_path)
    assert len(found) == (10 + 4) * 8 * 3
    assert len({run.folder for run in found}) == len(found)
    one = next(run for run in found if run.folder == "deberta-base/rte/loretta_adp/s2")
    assert one.config["model"] == "microsoft/deberta-base"
    assert (one.config["epochs"], one.config["warmup_steps"], one.config["eval_steps"]) == (10, 500, 200)
    full = next(run for run in found if run.row == "ft")
    assert full.config["learning_rate"] == 1e-6


def test_each_size_of_llama_has_its_own_tasks(tmp_path):
    by_model = {"llama-2-13b": set(), "llama-2-70b": set()}
    for run in runs("table3", tmp_path):
        by_model[run.model].add(run.task)
    assert by_model == {"llama-2-13b": {"copa", "record", "squad", "drop"}, "llama-2-70b": {"squad", "drop"}}


def test_another_model_and_fewer_of_everything(bert, data_dir, tmp_path):
    options = {"models": (bert,), "tasks": ("mrpc", "rte"), "methods": ("adp", "lora", "peft:vera"), "seeds": 2}
    expansion = expand(load_study("table1"), Options(**options, data_dir=data_dir, limit=10), tmp_path)
    found = {run.folder for run in expansion.runs}
    rows = ["loretta_adp", "lora-r8", "lora-r4", "peft-vera"]
    assert found == {
        f"tiny-bert/{task}/{row}/s{k}" for task, row, k in itertools.product(("mrpc", "rte"), rows, (0, 1))
    }
    config = expansion.runs[0].config
    # 10 rows in batches of 16, 10 epochs: neither the warm-up nor the evaluations of the paper fit into that
    assert (config["warmup_steps"], config["eval_steps"], config["limit"]) == (None, None, 10)
    assert len(expansion.notes) == 2


def test_what_is_set_is_left_alone(bert, data_dir, tmp_path):
    sets = {"warmup_steps": 7, "epochs": 1, "lora.r": 3, "head_policy": "full", "learning_rate": 1e-3}
    found = runs("table1", tmp_path, models=(bert,), tasks=("rte",), methods=("lora-r8", "rep"), seeds=1,
                 data_dir=data_dir, sets=sets)  # fmt: skip
    lora, rep = (run.config for run in found)
    assert (lora["warmup_steps"], lora["epochs"], lora["method_args"]) == (7, 1, {"r": 3})
    # the command's head policy stands for all rows
    assert rep["method_args"] == {}
    assert [run.folder.rpartition("/")[2] for run in found] == ["s0-lr0.001"] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ("rtt",)}, r"--tasks 'rtt' \(did you mean 'rte'"),
        ({"methods": ("lorra",)}, r"--methods lorra: unknown method 'lorra' \(did you mean 'lora'"),
        ({"models": ("no/such-model",)}, "--model 'no/such-model'"),
        ({"sets": {"colour": 1}}, "colour=1"),
        ({"seeds": 10**25}, "--seeds 1000.*: give 1000 at most"),
    ],
)
def test_what_there_is_not_is_one_sentence(options, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        runs("table1", tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_sequence_starts_each_step_from_the_one_before(tmp_path):
    found = [run for run in runs("table4", tmp_path, methods=("lora",)) if run.seed == 1]
    assert [run.folder for run in found] == [
        "deberta-base/sst2/lora-r8/s1",
        "deberta-base/sst2-mrpc/lora-r8/s1",
        "deberta-base/sst2-mrpc-qnli/lora-r8/s1",
    ]
    assert [run.config["data"] for run in found] == ["sst2", "mrpc", "qnli"]
    assert found[2].after == (found[1].folder,)
    assert found[2].config["start_from"] == str(tmp_path / found[1].folder)
    assert all(run.evaluate == ("sst2", "mrpc", "qnli") for run in found)


def test_all_orders_of_a_sequence(tmp_path):
    found = runs("table4", tmp_path, methods=("lora",), seeds=1, orders=True)
    assert {run.order for run in found} == set(itertools.permutations(("sst2", "mrpc", "qnli")))
    # three first steps, six second ones and six third ones
    assert len({run.folder for run in found}) == 15


def test_shapes_of_table_7_on_any_width(bert, tmp_path):
    assert shapes(768, 64, 3) == {"768x64": [32, 24, 64], "64x768": [64, 24, 32]}
    found = runs("table7", tmp_path, models=(bert,), tasks=("sst2",), seeds=1)
    for run, count in zip(found[1:], (3, 7), strict=True):
        assert {size: len(modes) for size, modes in run.config["method_args"]["shapes"].items()} == {
            "32x64": count, "64x32": count,
        }  # fmt: skip
    paper = runs("table7", tmp_path, tasks=("sst2",), seeds=1)
    assert paper[1].config["method_args"]["shapes"]["768x64"] == [64, 12, 64]


def test_steps_are_counted_from_the_file_the_official_size_or_the_sample(data_dir):
    base = {"data": "rte", "batch_size": 16, "epochs": 10}
    assert total_steps(base) == 156 * 10
    assert total_steps({**base, "data_dir": data_dir}) == 2 * 10
    assert total_steps({**base, "limit": 100, "epochs": 0.5}) == 4
    assert total_steps({"data": "boolq", "sample": {"train": 1000}, "batch_size": 1, "epochs": 3}) == 3000
    assert total_steps({**base, "accumulate": 4}) == 39 * 10
    assert total_steps({**base, "max_steps": 5}) == 5
    # 250 rows, of which 100 validate; 554, of which half
    assert total_steps({"data": "cb", "batch_size": 1, "epochs": 3}) == 450
    assert total_steps({"data": "wsc", "batch_size": 1, "epochs": 1}) == 277
    assert total_steps({"data": "stdlib"}) is None


def test_a_sweep_chooses_on_validation_and_never_on_test(tmp_path):
    """The candidate that is worse on validation is made far better on test."""
    options = {"tasks": ("rte",), "methods": ("lora-r8",), "seeds": 3, "sweep": True}
    before = runs("table1", tmp_path, models=("deberta-base",), **options)
    tried = [run for run in before if run.candidate]
    assert [run.learning_rate for run in tried] == [1e-4, 5e-4]
    assert [run.config for run in before if not run.candidate] == [None] * 3
    finish(tmp_path, tried[0], validation={"accuracy": 0.7, "loss": 0.9}, test={"accuracy": 0.1})
    assert choose(tmp_path, tried) is None, "a candidate is still to come"
    finish(tmp_path, tried[1], validation={"accuracy": 0.6, "loss": 0.1}, test={"accuracy": 0.99})
    after = runs("table1", tmp_path, models=("deberta-base",), **options)
    assert [(run.seed, run.learning_rate) for run in after if not run.candidate] == [(0, 1e-4), (1, 1e-4), (2, 1e-4)]
    assert [run.learning_rate for run in after if run.candidate] == [5e-4]


@pytest.mark.parametrize(
    ("validations", "higher", "best"),
    [
        ([{"mse": 0.4}, {"mse": 0.2}], False, 1),
        ([{"accuracy": 0.5, "loss": 0.4}, {"accuracy": 0.5, "loss": 0.3}], True, 1),
        ([{"accuracy": 0.5, "loss": 0.4}, {"accuracy": 0.5, "loss": 0.4}], True, 0),
        ([{"accuracy": float("nan"), "loss": 0.1}, {"accuracy": 0.1, "loss": 0.4}], True, 1),
        ([{"loss": 0.4}, {"loss": 0.3}], True, 1),
    ],
)
def test_merit_of_candidates(validations, higher, best, tmp_path):
    options = {"models": ("deberta-base",), "tasks": ("rte",), "methods": ("lora-r8",), "sweep": True}
    tried = [run for run in runs("table1", tmp_path, **options) if run.candidate]
    for run, validation in zip(tried, validations, strict=True):
        metric = "mse" if not higher else "accuracy"
        finish(tmp_path, run, validation=validation, metric=metric, higher_is_better=higher)
    assert choose(tmp_path, tried) == best


def test_a_failed_candidate_does_not_hold_the_sweep_up(tmp_path):
    options = {"models": ("deberta-base",), "tasks": ("rte",), "methods": ("lora-r8",), "sweep": True}
    tried = [run for run in runs("table1", tmp_path, **options) if run.candidate]
    finish(tmp_path, tried[1], validation={"accuracy": 0.6})
    (tmp_path / tried[0].folder).mkdir(parents=True)
    (tmp_path / tried[0].folder / "error.json").write_text('{"error": "out of memory"}')
    assert choose(tmp_path, tried) == 1


def test_rates_and_batches_make_folders_of_their_own(tmp_path):
    options = {"models": ("deberta-base",), "tasks": ("rte",), "methods": ("lora-r8",), "seeds": 1}
    tried = runs("table1", tmp_path, rates=(1e-3, 5e-4), batches=True, **options)
    names = [run.folder.rpartition("/")[2] for run in tried if run.candidate]
    # the study's own rate and batch size are the run without a sweep
    assert names == ["s0-lr0.001", "s0-lr0.001-b32", "s0", "s0-b32"]


def test_differences_name_what_changed(tmp_path):
    (run,) = runs("table1", tmp_path, models=("deberta-base",), tasks=("rte",), methods=("lora-r8",), seeds=1)
    assert differences(tmp_path, run) == []
    folder = tmp_path / run.folder
    folder.mkdir(parents=True)
    # a run of an earlier version, which did not know every option
    before = {key: value for key, value in run.config.items() if key != "max_steps"}
    (folder / "config.json").write_text(json.dumps({**before, "epochs": 3}))
    assert differences(tmp_path, run) == ["epochs was 3.0 and is 10.0"]
    assert RunConfig(**run.config).folder == folder


def test_what_is_named_twice_runs_once(bert, data_dir, tmp_path):
    """A seed that counts twice would make the interval too narrow."""
    once = {"models": (bert,), "data_dir": data_dir, "tasks": ("rte",), "methods": ("lora-r8",), "seeds": 2}
    found = runs("table1", tmp_path, **{**once, "models": (bert, bert), "tasks": ("rte", "rte")})
    assert found == runs("table1", tmp_path, **once)
    swept = runs("table1", tmp_path, **once, rates=(1e-3, 1e-3))
    assert [(run.candidate, run.learning_rate) for run in swept] == [(False, 1e-3)] * 2


def test_models_of_one_name_do_not_share_a_folder(bert, tmp_path):
    other = tmp_path / "other" / Path(bert).name
    shutil.copytree(bert, other)
    with pytest.raises(InputError, match="would share the folder 'tiny-bert'"):
        runs("table1", tmp_path, models=(bert, str(other)))


def test_a_trained_prompt_has_room_in_the_positions_of_the_model(bert, tmp_path):
    known = BertConfig.from_pretrained(bert).max_position_embeddings
    sets = {"max_length": 10_000}
    prompt, lora = runs(
        "table1", tmp_path, models=(bert,), tasks=("rte",), methods=("prompt", "lora-r8"), seeds=1, sets=sets
    )
    assert (prompt.config["max_length"], lora.config["max_length"]) == (known - 10, known)
