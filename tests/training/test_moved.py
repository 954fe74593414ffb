"""A run goes on, and is scored, where its folder, its model and its data have moved."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import assert_refused, call
from interrupts import stopping_behind
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_data import config_for
from transformers import AutoModel, AutoModelForSequenceClassification

from loretta.errors import InputError, Stopped
from loretta.population.training import train_together
from loretta.training.data import load_config_task
from loretta.training.model import find_start
from loretta.training.predict import load_run
from loretta.training.run import train
from loretta.training.sources import has_moved

OPTIONS = {"epochs": 1, "eval_steps": 5}


@pytest.fixture(scope="module")
def project(bert, reviews, tmp_path_factory):
    """A folder under its new name, of whose two equal runs one was stopped behind a checkpoint, and the old name."""
    old = tmp_path_factory.mktemp("project") / "old"
    shutil.copytree(bert, old / "bert")
    shutil.copy(reviews, old / "mine.csv")
    configs = [config_for(str(old / "bert"), str(old / "mine.csv"), old / name, **OPTIONS) for name in ("whole", "run")]
    train(configs[0])
    with stopping_behind(6, signal.SIGTERM), pytest.raises(Stopped):
        train(configs[1])
    return old.rename(old.with_name("new")), old


@pytest.fixture
def moved(project, tmp_path):
    shutil.copytree(project[0], tmp_path / "moved")
    return tmp_path / "moved"


def test_a_run_whose_model_and_data_moved_with_it_goes_on(moved, project, capsys, caplog):
    """It was refused for its own model and data under any other path, and could not go on at all."""
    status, _, err = call(capsys, "train", "--resume", moved / "run")
    assert_refused(status, err, [f"'{project[1] / 'mine.csv'}' does not exist"])
    given = ["--model", moved / "bert", "--data", moved / "mine.csv"]
    caplog.clear()
    assert call(capsys, "train", "--resume", moved / "run", *given)[0] == 0
    assert "best checkpoint" not in caplog.text
    record, whole = (json.loads((moved / name / "run.json").read_text()) for name in ("run", "whole"))
    assert record["history"] == whole["history"]
    for found in (record["config"], json.loads((moved / "run" / "config.json").read_text())):
        assert (found["model"], found["data"]) == (str(moved / "bert"), str(moved / "mine.csv"))


def test_rows_that_were_held_out_are_scored_where_the_data_moved(moved, project, capsys):
    """All rows were scored, those that it was trained on among them."""
    status, _, err = call(capsys, "eval", moved / "whole", "--cpu")
    assert_refused(status, err, [f"'{project[1] / 'bert'}'", "--model"])
    given = ["--model", moved / "bert", "--data", moved / "mine.csv", "--cpu"]
    status, out, err = call(capsys, "eval", moved / "whole", *given, "--json")
    assert status == 0
    expected = json.loads((moved / "whole" / "run.json").read_text())["validation"]
    assert {name: json.loads(out)[name] for name in ("accuracy", "macro_f1")}.items() <= expected.items()
    assert "of which the validation rows are scored" in err
    lines = (moved / "mine.csv").read_text().splitlines(keepends=True)
    (moved / "mine.csv").write_text("".join([*lines, lines[-1]]))
    assert "of which" not in call(capsys, "eval", moved / "whole", *given)[2], "another file: all of its rows"


def test_a_finished_run_takes_the_new_places_of_its_model_and_data(moved, project, capsys):
    """It was returned as it was, and `eval` looked for both in the old folder."""
    given = ["--model", moved / "bert", "--data", moved / "mine.csv"]
    before = json.loads((moved / "whole" / "run.json").read_text())
    (moved / "mine.csv").write_text((moved / "mine.csv").read_text() + "more,good\n")
    status, _, err = call(capsys, "train", "--resume", moved / "whole", *given)
    assert_refused(status, err, [f"{moved / 'mine.csv'}' is not what the run began with"])
    assert json.loads((moved / "whole" / "run.json").read_text()) == before
    shutil.copy(project[0] / "mine.csv", moved / "mine.csv")
    status, out, err = call(capsys, "train", "--resume", moved / "whole", *given, "--json")
    assert status == 0, err
    new = {"model": str(moved / "bert"), "data": str(moved / "mine.csv")}
    record = json.loads((moved / "whole" / "run.json").read_text())
    expected = {**before, "model": new["model"], "config": {**before["config"], **new}}
    assert json.loads(out) == record == expected
    assert call(capsys, "eval", moved / "whole", "--cpu")[0] == 0
    assert call(capsys, "train", "--resume", moved / "whole", "--epochs", 2)[0] == 0


def test_other_data_under_the_old_name_and_another_name_are_refused(moved):
    config = config_for(str(moved / "bert"), str(moved / "mine.csv"), moved / "run", **OPTIONS)
    (moved / "bert").rename(moved / "other")
    with pytest.raises(InputError, match=r"other options \(model was '.*old/bert' and is '.*/other'\)"):
        train(config.model_copy(update={"model": str(moved / "other")}), resume=True)
    (moved / "other").rename(moved / "bert")
    (moved / "mine.csv").write_text((moved / "mine.csv").read_text().replace("bad", "dull"))
    with pytest.raises(InputError, match=r"mine\.csv' is not what the run began with"):
        train(config, resume=True)


def change(model: Path) -> None:
    """The weights as another training left them, under the same name."""
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] *= 1.02
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_another_model_under_the_same_name_is_refused_by_all_that_use_the_run(moved, capsys, tmp_path):
    """It was taken for the one that the run was trained on, and the scores were wrong without a word."""
    change(moved / "bert")
    model = ["--model", moved / "bert"]
    status, _, err = call(capsys, "train", "--resume", moved / "run", *model, "--data", moved / "mine.csv")
    assert_refused(status, err, [f"'{moved / 'bert'}' is not what the run began with", "--overwrite"])
    others = f"the base model '{moved / 'bert'}' has other weights than the one on which the run in '{moved / 'whole'}'"
    for words in (
        ["eval", moved / "whole", "--cpu", "--data", moved / "mine.csv"],
        ["predict", moved / "whole", "--cpu", "--text", "a good film"],
        ["export", moved / "whole", "--to", "merged", "-o", tmp_path / "merged"],
        ["export", moved / "whole" / "adapter", "--to", "merged", "-o", tmp_path / "merged"],
    ):
        assert_refused(*call(capsys, *words, *model)[::2], [others, "--model"])
    start = config_for(str(moved / "bert"), str(moved / "mine.csv"), tmp_path / "next", start_from=str(moved / "whole"))
    with pytest.raises(InputError, match="has other weights than"):
        train(start)
    (moved / "whole" / "data.json").unlink()
    assert find_start(start, load_config_task(start)), "a run of a version that took no note of its model"


def test_another_model_that_is_asked_for_by_name_is_taken_as_peft_takes_it_and_said(moved, capsys, caplog):
    change(moved / "bert")
    other = (moved / "bert").rename(moved / "continued")
    said = f"'{other}' has other weights than the one on which the run in '{moved / 'whole'}' was trained ('"
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad(), caplog.at_level("WARNING"):
        ours = load_run(moved / "whole", model=str(other), cpu=True).model(input_ids=ids).logits
        assert said in caplog.text
        base = AutoModelForSequenceClassification.from_pretrained(other, num_labels=2)
        theirs = PeftModel.from_pretrained(base, moved / "whole" / "adapter").eval()(input_ids=ids).logits
    assert ours.equal(theirs)
    for words in (
        ["eval", moved / "whole", "--cpu", "--data", moved / "mine.csv"],
        ["export", moved / "whole", "--to", "merged", "-o", moved / "merged"],
    ):
        caplog.clear()
        assert call(capsys, *words, "--model", other)[0] == 0
        assert said in caplog.text
    (moved / "whole" / "data.json").unlink()
    caplog.clear()
    load_run(moved / "whole", model=str(other), cpu=True)
    assert said not in caplog.text, "a run of a version that took no note of its model"


def test_a_model_that_is_updated_in_place_is_not_trained_on(moved, capsys):
    config = config_for(str(moved / "bert"), str(moved / "mine.csv"), moved / "run", **OPTIONS)
    change(moved / "bert")
    for run in (train, lambda config, resume: train_together([config], resume=resume)):
        with pytest.raises(InputError, match="bert' is not what the run began with"):
            run(config, resume=True)


def test_a_run_goes_on_with_its_weights_in_another_dtype_and_other_files(moved, capsys):
    model = AutoModel.from_pretrained(moved / "bert", dtype=torch.float16)
    (moved / "bert" / "model.safetensors").unlink()
    model.save_pretrained(moved / "bert", max_shard_size="10KB")
    assert len(list((moved / "bert").glob("*.safetensors"))) > 1
    given = ["--model", moved / "bert", "--data", moved / "mine.csv"]
    assert call(capsys, "train", "--resume", moved / "run", *given)[0] == 0
    assert call(capsys, "eval", moved / "whole", *given, "--cpu")[0] == 0


def test_a_run_goes_on_only_where_its_start_is_the_same(bert, reviews, tmp_path):
    """Trained anew under its name, the run that it started from has other weights."""
    first = config_for(bert, reviews, tmp_path / "first", method="norms", max_steps=1)
    train(first)
    shutil.copytree(tmp_path / "first", tmp_path / "copy" / "first")
    second = config_for(bert, reviews, tmp_path / "second", method="norms", epochs=2, start_from=str(first.folder))
    with stopping_behind(6, signal.SIGTERM), pytest.raises(Stopped):
        train(second)
    train(first.model_copy(update={"seed": 1}), overwrite=True)
    with pytest.raises(InputError, match="first' is not what the run began with"):
        train(second, resume=True)
    shutil.rmtree(first.folder)
    assert train(second.model_copy(update={"start_from": str(tmp_path / "copy" / "first")}), resume=True)


def test_a_training_starts_from_a_run_whose_model_moved(moved):
    config = config_for(str(moved / "bert"), str(moved / "mine.csv"), moved / "next", start_from=str(moved / "whole"))
    assert find_start(config, load_config_task(config)) == moved / "whole" / "adapter"


@pytest.mark.parametrize(
    ("option", "before", "now", "found"),
    [
        ("data", "gone/a.csv", "here/a.csv", True),
        ("data", "gone/a.csv", "here/b.csv", False),
        ("data", "gone/*.csv", "here/*.csv", True),
        ("data", "gone/*.csv", "here/*.jsonl", False),
        ("data", "here/../here/a.csv", "here/a.csv", True),
        ("data", "there/a.csv", "here/a.csv", False),
        ("data", "gone/a.csv", "nowhere/a.csv", False),
        ("data", "mrpc", "here/mrpc", False),  # a task of that name
        ("data", "org/words", "here/words", False),  # a dataset of the Hub
        ("data", None, "here/a.csv", False),
        ("model", "gone/m", "here/m/", True),
        ("model", "there/m", "here/m", False),
        ("data_dir", "glue", "here/glue", True),
        ("start_from", "first", "here/first", True),
    ],
)
def test_a_path_that_has_moved(option, before, now, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here/m", "here/mrpc", "here/words", "here/glue", "here/first", "there/m"):
        Path(name).mkdir(parents=True)
    for name in ("here/a.csv", "here/b.csv", "there/a.csv"):
        Path(name).write_text(name)
    assert has_moved(option, before, now) is found
