import dataclasses
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from interrupts import stopping_behind
from safetensors.torch import load_file
from training_data import sentences
from transformers import AutoModel, AutoTokenizer

from loretta.errors import InputError, Stopped
from loretta.owned import describe, write_list
from loretta.record import RunRecord
from loretta.tasks import load_task
from loretta.training.config import RunConfig, read_config
from loretta.training.data import load_config_task
from loretta.training.methods import METHODS, find_method, peft_config
from loretta.training.predict import evaluate, load_run, predict
from loretta.training.run import train
from loretta.training.scores import score_logits
from loretta.training.trainer import TwoRateTrainer


def config_for(model, data, folder, **changes) -> RunConfig:
    options = {
        "model": model,
        "data": data,
        "text": "review",
        "label": "mood",
        "output": str(folder),
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 16,
        "logging_steps": 2,
        "cpu": True,
    }
    return RunConfig(**{**options, **changes})


@pytest.mark.parametrize(
    "method",
    [
        "rep",
        "adp",
        "ft",
        "adapters",
        "lora",
        "prefix",
        "prompt",
        "p-tuning",
        "bitfit",
        "ia3",
        "norms",
        "head",
        "peft:vera",
    ],
)
def test_a_method_learns_and_loads_again(method, bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", method=method, test=reviews, head_learning_rate=0.03)
    record = train(config)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".loretta.json", ".loretta.lock", "adapter", "checkpoints", "config.json", "predictions.jsonl", "run.json",
    ]  # fmt: skip
    assert not list((folder / "adapter").glob("*.bin")), "safetensors only"
    assert record == RunRecord.load(folder / "run.json")
    losses = [point.values["loss"] for point in record.history if point.split == "train"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    assert record.adapter_bytes == next((folder / "adapter").glob("*.safetensors")).stat().st_size
    assert {point.split for point in record.history} == {"train", "validation"}
    assert record.train_seconds > 0
    assert record.label_names == ["neg", "pos"]

    run = load_run(folder, cpu=True)
    values = evaluate(run, load_config_task(run.config), "validation")
    assert values["accuracy"] == pytest.approx(record.validation["accuracy"])
    saved = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    task = load_config_task(config)
    again = predict(run, [list(task.test["text"])])
    assert [row["label"] for row in again] == [row["label"] for row in saved]
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in saved], abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_model_in_half_precision_is_trained_in_float32(dtype, bert, reviews, tmp_path):
    # steps of 1e-4, which half-precision weights around one would not show
    options = {"method": "ft", "dtype": dtype, "test": reviews, "learning_rate": 1e-4, "epochs": 1}
    train(config_for(bert, reviews, tmp_path / "run", **options))
    weights = load_file(next((tmp_path / "run" / "adapter").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    norm = weights["bert.encoder.layer.0.output.LayerNorm.weight"]
    assert not torch.equal(norm, norm.to(getattr(torch, dtype)).float())
    run = load_run(tmp_path / "run", cpu=True)
    saved = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    again = predict(run, [list(load_config_task(run.config).test["text"])])
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in saved], abs=0.02)


@pytest.mark.parametrize("method", ["rep", "lora", "bitfit", "head", "peft:vera"])
def test_heads_and_biases_in_half_precision_are_refused(method, bert, reviews, tmp_path):
    with pytest.raises(InputError, match=r"half precision.*leave dtype out, and give bf16=true"):
        train(config_for(bert, reviews, tmp_path / "run", method=method, dtype="bfloat16"))


@pytest.mark.parametrize("method", ["rep", "adp", "shared", "adapters", "lora", "prefix"])
def test_a_language_model_in_half_precision(method, llama, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(text for text, _ in sentences(200)))
    options = {"text": None, "label": None, "method": method, "dtype": "bfloat16", "epochs": 1}
    train(config_for(llama, str(tmp_path / "text.txt"), tmp_path / "run", **options))
    weights = load_file(next((tmp_path / "run" / "adapter").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_parameters_in_the_record_are_those_that_trained(bert, reviews, tmp_path):
    record = train(config_for(bert, reviews, tmp_path / "run", method="adp", epochs=1))
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    frozen_starts = sum(value.numel() for name, value in tensors.items() if ".start." in name)
    assert record.parameters.trainable == sum(value.numel() for value in tensors.values()) - frozen_starts
    counts = record.parameters
    assert counts.norms == 2 * 32 * 5
    assert counts.biases == 4 * (64 + 32)
    assert counts.other == 0


def test_the_same_seed_gives_the_same_adapter(bert, reviews, tmp_path):
    for name in ("a", "b"):
        train(config_for(bert, reviews, tmp_path / name, epochs=1))
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_killed_run_resumes_to_the_same_end(bert, reviews, tmp_path):
    whole = train(config_for(bert, reviews, tmp_path / "whole", epochs=3))
    config = config_for(bert, reviews, tmp_path / "cut", epochs=3)
    # killed by a signal after its first epoch's checkpoint
    script = (
        "import os, signal, sys\n"
        "from transformers import TrainerCallback\n"
        "import loretta.training.run as run\n"
        "from loretta.training.config import RunConfig\n"
        "class Kill(TrainerCallback):\n"
        "    def on_epoch_begin(self, args, state, control, **kwargs):\n"
        "        if state.epoch and state.epoch >= 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "make = run.make_trainer\n"
        "def killing(*args):\n"
        "    trainer = make(*args); trainer.add_callback(Kill()); return trainer\n"
        "run.make_trainer = killing\n"
        "run.train(RunConfig.model_validate_json(sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, config.model_dump_json()], capture_output=True)
    assert killed.returncode == -9
    assert not (tmp_path / "cut" / "run.json").exists()
    (state,) = (tmp_path / "cut").rglob("trainer_state.json")
    saved = json.loads(state.read_text())
    watch = saved["stateful_callbacks"]["Stopwatch"]["attributes"]
    assert 0 < watch["earlier"] < 100
    watch["earlier"] += 1000
    state.write_text(json.dumps(saved))
    write_list(state.parent, describe(state.parent))
    resumed = train(config, resume=True)
    assert 1000 < resumed.train_seconds < 1200, "the seconds before it was killed count"
    assert resumed.history == whole.history
    assert resumed.best_step == whole.best_step
    # a finished run is not repeated
    assert train(config, resume=True).train_seconds == resumed.train_seconds


def test_a_signal_saves_says_how_to_go_on_and_the_run_ends_the_same(bert, reviews, tmp_path):
    options = {"epochs": 3, "logging_steps": 4, "accumulate": 2, "batch_size": 4, "text": "review"}
    whole = train(config_for(bert, reviews, tmp_path / "whole", **options))
    for number, name, steps in ((signal.SIGTERM, "SIGTERM", (1, 7, 10)), (signal.SIGINT, "SIGINT", (13, 20, 29, 30))):
        folder = tmp_path / name
        config = config_for(bert, reviews, folder, **options)
        for step in steps:
            with stopping_behind(step, number), pytest.raises(Stopped) as stopped:
                train(config, resume=True)
            assert stopped.value.exit_status == 128 + number
            assert f"stopped by {name} behind" in str(stopped.value)
            assert "--resume" in str(stopped.value)
            if step not in (30,):
                assert (folder / "checkpoints" / f"checkpoint-{step}").is_dir()
            assert not (folder / "run.json").exists()
        assert signal.getsignal(number) is not None
        resumed = train(config, resume=True)
        assert resumed.history == whole.history
        a, b = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (tmp_path / "whole", folder))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_signal_outside_of_the_steps_ends_the_run_at_once(bert, reviews, tmp_path, monkeypatch):
    whole = train(config_for(bert, reviews, tmp_path / "whole", epochs=1))
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    for place in ("loretta.training.run.encode_splits", "loretta.training.finish.read_history"):
        monkeypatch.setattr(place, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="SIGTERM"):
            train(config, resume=True)
        monkeypatch.undo()
        assert not list(tmp_path.rglob("*.tmp"))
    assert train(config, resume=True).history == whole.history


def test_a_last_step_in_the_middle_of_an_epoch_is_the_last(bert, reviews, tmp_path):
    """The Trainer would take one step more when it goes on from a checkpoint of the last one."""
    config = config_for(bert, reviews, tmp_path / "run", max_steps=13, eval_steps=5)
    whole = train(config)
    (tmp_path / "run" / "run.json").unlink()
    assert train(config, resume=True).history == whole.history


def test_a_run_of_a_version_with_fewer_options_resumes(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(config)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["cuda_graph"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert train(config, resume=True).seed == 0
    with pytest.raises(InputError, match="cuda_graph was False and is True"):
        train(config.model_copy(update={"cuda_graph": True}), resume=True)


def test_what_is_on_disk_is_safe(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run: go on with --resume, replace it with --overwrite"):
        train(config)
    with pytest.raises(InputError, match=r"epochs was 1.0 and is 0.5"):
        train(config.model_copy(update={"epochs": 0.5}), resume=True)
    with pytest.raises(InputError, match="no column 'nope'"):
        train(config.model_copy(update={"label": "nope"}), overwrite=True)
    with pytest.raises(InputError, match="tensor_rank=0"):
        train(config.model_copy(update={"method_args": {"tensor_rank": 0}}), overwrite=True)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="holds other files"):
        train(config.model_copy(update={"output": str(tmp_path / "mine")}))
    with pytest.raises(InputError, match="holds other files"):
        train(config.model_copy(update={"output": str(tmp_path / "mine")}), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not touch"


def test_overwrite_removes_nothing_that_no_run_wrote(bert, reviews, tmp_path, monkeypatch):
    """A model, a project, and the folders around them: all have a config.json, or are given as the output."""
    shutil.copytree(bert, tmp_path / "project" / "model")
    (tmp_path / "project" / "model" / "model.safetensors").rename(tmp_path / "project" / "model" / "weights.bin")
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "project" / "thesis.txt").write_text("mine")
    train(config_for(bert, reviews, tmp_path / "project" / "run", epochs=1))
    monkeypatch.chdir(tmp_path / "project")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (".", "..", "model", str(tmp_path / "project"), "run/adapter"):
        for resume, overwrite in ((False, True), (True, False), (False, False)):
            with pytest.raises(InputError, match="holds other files: give an empty or new one"):
                train(config_for(bert, reviews, output), resume=resume, overwrite=overwrite)
    (tmp_path / "project" / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"did not write, or that have changed since \(notes.txt\)"):
        train(config_for(bert, reviews, "run"), overwrite=True)
    (tmp_path / "project" / "run" / "notes.txt").unlink()
    monkeypatch.chdir(tmp_path / "project" / "run" / "adapter")
    with pytest.raises(InputError, match="the working directory"):
        train(config_for(bert, reviews, tmp_path / "project" / "run"), overwrite=True)
    for given in ({"start_from": str(tmp_path / "project" / "run")}, {"data": str(tmp_path / "project/run/run.json")}):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="is or holds '"):
            train(config_for(bert, reviews, "project/run").model_copy(update=given), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_earlier_run_stays_until_the_new_one_is_whole(bert, reviews, tmp_path, monkeypatch):
    first = config_for(bert, reviews, tmp_path / "run", epochs=1)
    train(first)
    before = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    second = first.model_copy(update={"seed": 1, "epochs": 2.0, "test": reviews})
    # at the worst moment: all is written but for the record
    monkeypatch.setattr("loretta.training.finish.write_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(second, overwrite=True)
    monkeypatch.undo()
    assert load_run(tmp_path / "run", cpu=True).config == first
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert train(first, resume=True).seed == 0
    record = train(second, resume=True)
    assert record.seed == 1
    assert RunRecord.load(tmp_path / "run" / "run.json") == record
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".loretta.json", ".loretta.lock", "adapter", "checkpoints", "config.json", "predictions.jsonl", "run.json",
    ]  # fmt: skip
    train(first, overwrite=True)
    train(first.model_copy(update={"output": str(tmp_path / "beside")}))
    answers = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("run", "beside")]
    assert answers[0] == answers[1], "not those of the earlier run"


def test_language_modelling_lowers_the_perplexity(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("the film was good and the plot was bad " * 4 + words for words, _ in sentences(40)))
    config = RunConfig(
        model=llama,
        data=str(text),
        method="rep",
        output=str(tmp_path / "run"),
        epochs=3,
        batch_size=4,
        learning_rate=2e-2,
        max_length=16,
        cpu=True,
        method_args={"target_modules": "all-linear"},
    )
    record = train(config)
    losses = [point.values["loss"] for point in record.history if point.split == "validation"]
    assert losses[-1] < math.log(32) - 0.2
    assert record.validation["perplexity"] == pytest.approx(math.exp(record.validation["loss"]))
    run = load_run(tmp_path / "run", cpu=True)
    values = evaluate(run, load_config_task(config), "validation")
    assert values["perplexity"] == pytest.approx(record.validation["perplexity"], rel=1e-3)
    assert isinstance(predict(run, [["the film"]])[0]["continuation"], str)


def test_regression_and_pairs(bert, tmp_path):
    rows = [f"the film {'good' if k % 2 else 'bad'} {k},a plot {k % 7},{(k % 2) + k / 1000}" for k in range(60)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["a,b,score", *rows]))
    config = config_for(bert, str(path), tmp_path / "run", text="a", text_pair="b", label="score", epochs=2)
    record = train(config)
    assert record.metric == "spearman"
    run = load_run(tmp_path / "run", cpu=True)
    assert run.kind == "regression"
    assert isinstance(predict(run, [["the film"], ["a plot"]])[0]["score"], float)


def test_the_final_layer_has_its_own_rate(bert, reviews, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", method="rep", head_learning_rate=0.1, epochs=1))
    state = torch.load(next((tmp_path / "run" / "checkpoints").glob("*/optimizer.pt")), weights_only=True)
    assert [group["initial_lr"] for group in state["param_groups"]] == [1e-2, 0.1]
    assert len(state["param_groups"][1]["params"]) == 2  # weight and bias of the classifier


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "run.json"])
def test_a_damaged_adapter_is_one_sentence(damage, bert, reviews, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", epochs=1))
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"not a tensor")
    elif damage == "missing":
        weights.unlink()
    else:
        (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError) as caught:
        load_run(tmp_path / "run", cpu=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


@pytest.mark.parametrize("method", ["rep", "lora"])
def test_an_adapter_for_another_base_is_refused(method, bert, other_bert, llama, reviews, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", epochs=1, method=method))
    # PEFT itself only warns of missing layers
    for other in (other_bert, llama) if method == "rep" else (llama,):
        with pytest.raises(InputError, match="does not fit the base model") as caught:
            load_run(tmp_path / "run", model=other, cpu=True)
        assert "\n" not in str(caught.value)


def test_labels_of_other_data_must_be_the_same(bert, reviews, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", epochs=1))
    other = tmp_path / "other.csv"
    other.write_text("review,mood\n" + "\n".join(f"a film {k},{'up' if k % 2 else 'down'}" for k in range(20)))
    run = load_run(tmp_path / "run", cpu=True)
    task = load_config_task(run.config.model_copy(update={"data": str(other)}))
    with pytest.raises(InputError, match=r"\['neg', 'pos'\].*\['down', 'up'\]"):
        evaluate(run, task, "validation")


def test_options_come_from_file_then_command_line_then_set(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: sst2\nepochs: 5\nseed: 3\nmethod_args: {tensor_rank: 4, r: 16}\n")
    config = read_config(path, {"seed": 4, "model": None}, ["learning_rate=5e-3", "tensor_rank=8", "epochs=7"])
    assert (config.model, config.epochs, config.seed, config.learning_rate) == ("m", 7, 4, 5e-3)
    assert config.method_args == {"tensor_rank": 8, "r": 16}
    assert str(config.folder) == "runs/sst2-compact-s4"


@pytest.mark.parametrize(
    ("options", "sets", "words"),
    [
        ({}, [], ["model is missing: give --model", "data is missing: give --data"]),
        ({"model": "m", "data": "d", "epochs": -1}, ["seed=x"], ["epochs=-1", "seed='x'"]),
        ({"model": "m", "data": "d"}, ["epochs"], ["--set 'epochs' is not of the form key=value"]),
        ({"model": "m", "data": "d"}, ["schedule=zigzag"], ["schedule='zigzag'"]),
    ],
)
def test_every_mistake_in_the_options_is_named_at_once(options, sets, words):
    with pytest.raises(InputError) as caught:
        read_config(None, options, sets)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "word"), [("- a\n", "holds no keys"), ("a: [", "is not YAML")])
def test_a_bad_config_file_is_one_sentence(content, word, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=word) as caught:
        read_config(path, {"model": "m", "data": "d"})
    assert "\n" not in str(caught.value)


def test_unknown_methods_and_options_name_the_nearest():
    with pytest.raises(InputError, match="unknown method 'rpe': did you mean 'rep'"):
        find_method("rpe")
    with pytest.raises(InputError, match=r"unknown option 'tensor_rnak'.*did you mean 'tensor_rank'"):
        peft_config("rep", None, "SEQ_CLS", {"tensor_rnak": 3})
    assert METHODS["rep"].learning_rate > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_model_that_diverged_has_no_score(kind, bad, tmp_path):
    """The largest of two NaN is the first, and half of the labels are the first class."""
    table = tmp_path / "own.csv"
    table.write_text("text,label\n" + "".join(f"{words},{k % 2}\n" for k, (words, _) in enumerate(sentences(20))))
    task = load_task(table, label="label", kind=kind)
    logits = np.zeros((4, 2 if kind == "classification" else 1))
    assert all(math.isfinite(value) for value in score_logits(task, logits, [0, 1, 0, 1]).values())
    logits[2, 0] = bad
    scores = score_logits(task, logits, [0, 1, 0, 1])
    assert set(scores) == set(task.metrics)
    assert all(math.isnan(value) for value in scores.values())


def test_a_run_that_is_nan_from_its_first_step_stops_and_saves_nothing(bert, reviews, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModel.from_pretrained(bert)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(bert).save_pretrained(broken)
    with pytest.raises(Stopped, match=r"not finite at step 1, first in '.*layer\.1\.output\.dense") as stopped:
        train(config_for(str(broken), reviews, tmp_path / "run", method="lora"))
    assert stopped.value.exit_status == 3
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def poisoned(monkeypatch, steps):
    """Make the loss of the given steps NaN, and with it their gradients."""
    original = TwoRateTrainer.compute_loss

    def poison(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        return loss * math.nan if model.training and self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(TwoRateTrainer, "compute_loss", poison)


@pytest.mark.parametrize("logging_steps", [4, 100])
def test_a_loss_that_becomes_nan_is_found_and_named_and_the_best_checkpoint_stays(
    logging_steps, bert, reviews, tmp_path, monkeypatch
):
    config = config_for(bert, reviews, tmp_path / "run", eval_steps=5, logging_steps=logging_steps)
    poisoned(monkeypatch, [7])
    with pytest.raises(Stopped, match=r"at step 7, first in '.*best checkpoint .*checkpoint-5'.*learning rate"):
        train(config)
    left = list((tmp_path / "run").rglob("*.safetensors"))
    assert left
    assert all(tensor.isfinite().all() for file in left for tensor in load_file(file).values())


def test_updates_that_are_not_finite_are_skipped_on_request(bert, reviews, tmp_path, monkeypatch):
    config = config_for(bert, reviews, tmp_path / "run", on_nan="skip", epochs=1)
    poisoned(monkeypatch, [3, 6])
    record = train(config)
    assert record.notes[-1] == "2 updates were skipped (the first at step 3): not finite"
    assert all(math.isfinite(point.values["loss"]) for point in record.history)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    poisoned(monkeypatch, range(100))
    with pytest.raises(Stopped, match=r"at step 1.*all updates since then were skipped"):
        train(config.model_copy(update={"output": str(tmp_path / "all")}))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(bert, reviews, tmp_path):
    whole = train(config_for(bert, reviews, tmp_path / "whole", epochs=2))
    config = config_for(bert, reviews, tmp_path / "run", epochs=2)
    with stopping_behind(10, signal.SIGTERM), pytest.raises(Stopped):
        train(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # less than the state of the optimizer
    try:
        with pytest.raises(Stopped, match=r"cannot write a checkpoint at step 20 .*make room.*--resume") as stopped:
            train(config, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert stopped.value.exit_status == 74
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-10"]

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:  # at the last file of all
        patch.setattr("loretta.training.finish.write_json", full)
        with pytest.raises(Stopped, match=r"cannot write the result .*No space left.*--resume") as stopped:
            train(config, resume=True)
    assert stopped.value.exit_status == 74
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not (tmp_path / "run" / "adapter").exists()
    assert train(config, resume=True).history == whole.history


def test_one_process_works_in_a_folder(bert, reviews, tmp_path):
    config = config_for(bert, reviews, tmp_path / "run", epochs=1)
    code = (
        "import sys, pathlib; from loretta.locks import hold\n"
        "with hold(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    train(config)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(InputError, match="another process works in"):
                train(config, **options)
        with pytest.raises(InputError, match="another process writes to"):
            load_run(tmp_path / "run", cpu=True)
        other.kill()
    load_run(tmp_path / "run", cpu=True)
    assert train(config, resume=True).seed == 0


def test_pairs_are_predicted_as_pairs(bert, reviews, tmp_path):
    train(config_for(bert, reviews, tmp_path / "run", epochs=1))
    loaded = load_run(tmp_path / "run", cpu=True)
    with pytest.raises(InputError, match="has 'review', got 2 texts of each: leave the pair out"):
        predict(loaded, [["good"], ["bad"]])
    pairs = dataclasses.replace(loaded, config=loaded.config.model_copy(update={"data": "mrpc"}))
    with pytest.raises(InputError, match="has 'sentence1' and 'sentence2', got 1 texts of each: give the pair too"):
        predict(pairs, [["good"]])
