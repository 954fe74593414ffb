"""`loretta train`, `eval`, `predict`, `runs` and `compare` from the words to files, output and status."""

import csv
import errno
import json
import os
import shutil
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from commands import assert_refused, call, train_arguments
from interrupts import held_by_another
from peft import LoraConfig, get_peft_model
from training_data import sentences
from transformers import AutoModel

from loretta.cli import main as cli
from loretta.cli import runs
from loretta.cli.options import PATHS


def test_train_writes_what_it_says(trained):
    run = json.loads((trained / "run.json").read_text())
    assert run["config"]["method_args"] == {"tensor_rank": 3}
    assert run["command"].startswith("loretta train --model")
    assert "accuracy" in (trained / "report.html").read_text()
    assert json.loads((trained / "adapter" / "adapter_config.json").read_text())["tensor_rank"] == 3


def test_train_answers_with_one_json_document(bert, reviews, capsys, tmp_path):
    given = ["--json", "--lr", 1e-3, "--set", "target_modules=query,value", "--logging-steps", 1, "--no-cuda-graph"]
    status, out, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *given))
    assert status == 0
    run = json.loads(out)
    assert run == json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["learning_rate"] == 1e-3
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["query", "value"]
    assert "step 10: validation loss" in err, "what a run says as it goes is no part of the answer"


@pytest.mark.parametrize("given", [[], ["--method", "loretta_rep"], ["--budget", "30k"], ["--set", "tensor_rank=2"]])
def test_a_plan_is_that_of_the_run_with_the_same_words(given, bert, reviews, capsys, tmp_path):
    status, out, err = call(capsys, *train_arguments(bert, reviews, tmp_path, "--max-steps", 1, "--json", *given))
    assert status == 0, err
    trained = json.loads(out)["parameters"]
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    status, out, err = call(capsys, "plan", "--model", bert, "--task-type", "SEQ_CLS", "--json", *given)
    assert status == 0, err
    plan = json.loads(out)
    assert plan["trainable"] == sum(count for kind, count in trained.items() if kind != "total")
    planned = {key: plan["options"][key] for key in ("r", "tensor_rank", "lora_alpha", "modes_per_side", "even_rates")}
    assert planned == {key: saved[key] for key in planned}


def test_resume_needs_nothing_but_the_folder(trained, capsys):
    status, out, _ = call(capsys, "train", "--resume", "-o", trained, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((trained / "run.json").read_text())
    status, _, err = call(capsys, "train", "--resume", "-o", trained, "--epochs", 0.5)
    assert_refused(status, err, ["cannot resume", "epochs was 1.0 and is 0.5"])


def test_a_finished_run_whose_list_is_gone_is_of_use(trained, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / ".loretta.json").unlink()
    (run / "report.html").write_text("somebody's")
    record = json.loads((run / "run.json").read_text())
    status, out, err = call(capsys, "train", "--resume", "-o", run, "--json")
    assert (status, json.loads(out)) == (0, record)
    assert "report.html' is not as loretta wrote it, and stays" in err
    assert (run / "report.html").read_text() == "somebody's"
    for verb in (
        ["eval", run, "--cpu"],
        ["predict", run, "--text", "a good film", "--cpu"],
        ["export", run, "--to", "merged", "-o", tmp_path / "merged"],
        ["runs", "ls", tmp_path],
        ["report", run, "-o", tmp_path / "report.html"],
    ):
        assert call(capsys, *verb)[0] == 0, verb
    status, _, err = call(capsys, "train", "--config", run / "config.json", "--overwrite", "-o", run)
    assert_refused(status, err, ["did not write, or that have changed since", "run.json"])


def test_a_config_file_may_hold_options_of_the_method(bert, reviews, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("epoch: 1\ntext: review\nlabel: mood\ntensor_rank: 3\nbatch_sise: 8\n")
    arguments = ["train", "--config", tmp_path / "run.yaml", "--model", bert, "--data", reviews, "-o", tmp_path / "run"]
    status, _, err = call(capsys, *arguments)
    assert_refused(status, err, ["unknown option 'batch_sise'", "did you mean 'batch_size'"])
    assert not (tmp_path / "run").exists()


def test_eval_scores_the_loaded_adapter(trained, capsys):
    status, out, _ = call(capsys, "eval", trained, "--cpu", "--json")
    run = json.loads((trained / "run.json").read_text())
    assert status == 0
    assert json.loads(out)["accuracy"] == pytest.approx(run["validation"]["accuracy"])


def test_eval_scores_all_rows_of_another_file(trained, capsys, tmp_path):
    other = tmp_path / "other.csv"
    rows = [*((f"{text} again", label) for text, label in sentences(40)), ("a plot and a good film", "neg")]
    with other.open("w", newline="") as file:
        csv.writer(file).writerows([("review", "mood"), *rows])
    status, out, _ = call(capsys, "eval", trained, "--data", other, "--cpu", "--json")
    assert status == 0
    accuracy = json.loads(out)["accuracy"]
    status, out, _ = call(capsys, "predict", trained, other, "--cpu", "--json")
    labels = [row["label"] for row in json.loads(out)]
    assert accuracy == pytest.approx(sum(a == b for a, (_, b) in zip(labels, rows, strict=True)) / 41)


def test_predict_names_an_empty_cell(trained, capsys, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"review": "a good film"}\n{"review": null}\n')
    (tmp_path / "new.csv").write_text('id,review\n1,a good film\n2,\n3,"  "\n')
    pyarrow.parquet.write_table(pyarrow.table({"review": ["a good film", None]}), tmp_path / "new.parquet")
    for name, count in (("new.jsonl", "1 of 2"), ("new.csv", "2 of 3"), ("new.parquet", "1 of 2")):
        status, _, err = call(capsys, "predict", trained, tmp_path / name, "--cpu", "-o", tmp_path / "answers.csv")
        assert_refused(status, err, ["'review'", name, f"empty in {count} rows, first in row 2"])
    assert not (tmp_path / "answers.csv").exists()


def test_a_run_reads_new_rows_with_the_separator_of_its_own(trained, bert, reviews, capsys, tmp_path):
    rows = Path(reviews).read_text().replace(",", ";")
    (tmp_path / "rows.csv").write_text(rows)
    arguments = train_arguments(bert, tmp_path / "rows.csv", tmp_path / "run", "--separator", ";", "--max-steps", 1)
    assert call(capsys, *arguments)[0] == 0
    for verb in (
        ["eval", tmp_path / "run", "--data", tmp_path / "rows.csv"],
        ["predict", tmp_path / "run", tmp_path / "rows.csv"],
    ):
        assert call(capsys, *verb, "--cpu")[0] == 0


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_predict_writes_a_row_for_each_text(ending, trained, reviews, capsys, tmp_path):
    path = tmp_path / f"out{ending}"
    status, out, _ = call(capsys, "predict", trained, reviews, "--cpu", "-o", path, "--json")
    assert status == 0
    assert len(json.loads(out)) == 96
    for wrong, words in ((path, "exists: replace it with --overwrite"), (tmp_path / "no" / path.name, "no folder")):
        status, _, err = call(capsys, "predict", trained, reviews, "--cpu", "-o", wrong)
        assert_refused(status, err, [str(wrong), words])
    lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines)) if ending == ".csv" else [json.loads(line) for line in lines]
    assert len(rows) == 96
    assert {row["label"] for row in rows} <= {"neg", "pos"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_the_second_of_two_calls_into_one_output_is_refused(trained, capsys, tmp_path):
    calls = {
        "merged": ["export", trained, "--to", "merged"],
        "adapter.gguf": ["export", trained, "--to", "gguf-lora"],
        "compressed": ["compress", trained, "--rank", 2],
        "rows.csv": ["predict", trained, "--text", "a good film", "--cpu"],
    }
    with held_by_another(*(tmp_path / name for name in calls)) as other:
        for name, arguments in calls.items():
            status, _, err = call(capsys, *arguments, "-o", tmp_path / name)
            assert_refused(status, err, ["another process", name, "wait until it ends"])
        other.kill()
    assert call(capsys, *calls["merged"], "-o", tmp_path / "merged")[0] == 0
    assert call(capsys, *calls["rows.csv"], "-o", tmp_path / "rows.csv")[0] == 0
    assert not (tmp_path / ".rows.csv.loretta.lock").exists()
    with held_by_another(trained) as other:
        status, _, err = call(capsys, *calls["merged"], "-o", tmp_path / "again")
        assert_refused(status, err, ["another process writes to", str(trained)])
        other.kill()


@pytest.mark.parametrize(
    ("number", "verb"),
    [(errno.EFBIG, "train"), *product([errno.ENOSPC, errno.EROFS], ["train", "export", "predict", "report"])],
)
def test_a_disk_that_takes_nothing_is_one_sentence_and_leaves_nothing(
    number, verb, trained, bert, reviews, capsys, tmp_path, monkeypatch
):
    calls = {
        "train": train_arguments(bert, reviews, tmp_path / "out"),
        "export": ["export", trained, "--to", "merged", "-o", tmp_path / "out"],
        "predict": ["predict", trained, "--text", "a good film", "--cpu", "-o", tmp_path / "out.csv"],
        "report": ["report", trained, "-o", tmp_path / "out.html"],
    }

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:  # a disk may take what is written, and say at the end that it did not
        patch.setattr(os, "fsync", full)
        status, _, err = call(capsys, *calls[verb])
    assert status in (2, 74)
    assert os.strerror(number) in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("loretta: ")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert call(capsys, *calls[verb])[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to any folder")
def test_a_folder_that_may_not_be_written_to_is_one_sentence(trained, bert, reviews, capsys, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for arguments in (
        train_arguments(bert, reviews, tmp_path / "locked" / "run"),
        ["export", trained, "--to", "merged", "-o", tmp_path / "locked" / "merged"],
        ["predict", trained, "--text", "a good film", "--cpu", "-o", tmp_path / "locked" / "rows.csv"],
        ["report", trained, "-o", tmp_path / "locked" / "report.html"],
    ):
        status, _, err = call(capsys, *arguments)
        assert_refused(status, err, ["cannot", "ermission denied"])


def test_predict_takes_texts_from_the_command_line(trained, capsys):
    status, out, _ = call(
        capsys, "predict", trained, "--text", "a good film", "--text", "a bad film", "--cpu", "--json"
    )
    assert status == 0
    assert [row["text"] for row in json.loads(out)] == ["a good film", "a bad film"]


BAD_RUNS = {
    "unknown target": (["--set", "target_modules=[quarry]"], ["'quarry'", "did you mean 'query'"]),
    "wrong product": (
        ["--method", "adp", "--set", "shapes={32x64: [8, 8, 8]}"], ["[8, 8, 8]", "32 x 64", "512", "2,048"],
    ),
    "rank of 0": (["--set", "tensor_rank=0"], ["tensor_rank=0", "at least 1"]),
    "unknown method": (["--method", "lorra"], ["'lorra'", "did you mean 'lora'"]),
    "unknown option": (["--set", "tensor_rnk=3"], ["'tensor_rnk'", "'tensor_rank'"]),
    "not a number": (["--set", "epochs=many"], ["epochs='many'"]),
    "missing column": (["--label", "moood"], ["'moood'", "mood"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_bad_option_is_one_line_and_status_2(case, bert, reviews, capsys, tmp_path):
    more, words = BAD_RUNS[case]
    status, out, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *more))
    assert_refused(status, err, words)
    assert out == ""
    assert not (tmp_path / "run").exists()


BAD_FILES = {
    "empty.csv": (b"", ["empty.csv"]),
    "header.csv": (b"review,mood\n", ["header.csv"]),
    "picture.csv": (
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        ["picture.csv", "is not a table", "these are read: .csv"],
    ),
    "table.parquet": (b"review,mood\na,b\n", ["table.parquet"]),
    "rows.jsonl": (b'{"review": "a", "mood": "b"}\nnot json\n', ["rows.jsonl", "2"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_status_2(name, bert, capsys, tmp_path):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    status, _, err = call(capsys, *train_arguments(bert, tmp_path / name, tmp_path / "run"))
    assert_refused(status, err, words)


def test_a_label_unseen_in_training_is_named(bert, reviews, capsys, tmp_path):
    (tmp_path / "more.csv").write_text("review,mood\na film,meh\na plot,pos\n")
    more = ["--validation", tmp_path / "more.csv"]
    status, _, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "run", *more))
    assert_refused(status, err, ["'meh'", "more.csv"])


def test_a_missing_model_is_named(reviews, capsys, tmp_path):
    status, _, err = call(capsys, *train_arguments(tmp_path / "nowhere", reviews, tmp_path / "run"))
    assert_refused(status, err, ["nowhere"])


def test_another_base_and_a_damaged_file_are_refused_and_left_alone(trained, other_bert, llama, capsys, tmp_path):
    for other in (other_bert, llama):
        status, _, err = call(capsys, "eval", trained, "--model", other, "--cpu")
        assert_refused(status, err, ["base model", other])
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    status, _, err = call(capsys, "predict", copy, "--text", "a film", "--cpu")
    assert_refused(status, err, ["adapter_model.safetensors", "damaged or truncated"])
    assert len(weights.read_bytes()) == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe"])
def test_a_run_whose_adapter_has_a_damaged_config_is_named(content, trained, capsys, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "adapter" / "adapter_config.json").write_bytes(content)
    for words in (
        ["eval", copy, "--cpu"],
        ["predict", copy, "--text", "a film", "--cpu"],
        ["export", copy, "--to", "merged", "-o", tmp_path / "out"],
    ):
        status, _, err = call(capsys, *words)
        assert_refused(status, err, ["adapter_config.json", "damaged"])


def test_a_folder_that_is_no_run_is_named(capsys, tmp_path):
    status, _, err = call(capsys, "eval", tmp_path, "--cpu")
    assert_refused(status, err, [str(tmp_path), "run.json"])


def test_usage_errors_have_status_2(capsys):
    assert call(capsys, "train", "--no-such-option")[0] == 2
    assert call(capsys, "fly")[0] == 2


def test_a_tilde_that_no_shell_has_read_is_the_home_folder(trained, bert, capsys, tmp_path, monkeypatch):
    """As in ``--output=~/whole``, which made a folder called ~ where the command was called."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(trained, home / "run")
    (home / "bert").symlink_to(bert)
    (home / "texts.txt").write_text("a long day\n")
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(bert), lora).save_pretrained(home / "lora")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for arguments in (
        ["runs", "ls", "~"],
        ["runs", "show", "~/run"],
        ["eval", "~/run", "--model=~/bert"],
        ["predict", "~/run", "--text", "~", "--output=~/answers.csv"],
        ["export", "~/run", "--to", "merged", "--output=~/whole", "--model=~/bert"],
        ["compress", "~/lora", "--rank", 2, "--text=~/texts.txt", "--output=~/small", "--model=~/bert"],
        ["report", "~/run", "--output=~/page.html"],
        ["plan", "--model=~/bert"],
    ):
        status, _, err = call(capsys, *arguments)
        assert status == 0, (arguments, err)
    assert {"answers.csv", "whole", "small", "page.html"} <= {path.name for path in home.iterdir()}
    assert (home / "answers.csv").read_text().splitlines()[1].startswith("~,")  # a text is no path
    assert not [*here.iterdir()]


def test_the_home_of_a_user_that_there_is_not_becomes_no_folder_here(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("train", "-o", "~nobody-here/run"), ("export", trained, "--to", "merged", "-o", "~nobody-here/run")):
        status, _, err = call(capsys, *words)
        assert_refused(status, err, ["'~nobody-here/run' begins with the home of no user here"])
    assert not list(tmp_path.iterdir())


def test_every_option_that_takes_a_path_reads_a_tilde():
    verbs = [command.callback for group in (cli.app, runs.app) for command in group.registered_commands]
    hints = {name: hint for verb in verbs if verb for name, hint in verb.__annotations__.items()}
    paths = {name for name, hint in hints.items() if "pathlib.Path" in str(hint)}
    assert {"adapter", "config", "output", "run"} < paths <= PATHS
