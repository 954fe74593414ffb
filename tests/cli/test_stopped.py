"""What is stopped from outside, or has too little memory, ends with one sentence and a status that scripts know."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from commands import call, train_arguments
from interrupts import stopping_behind

from loretta.cli.options import Command
from loretta.training.predict import load_run, predict


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_that_is_stopped_goes_on(number, status, bert, reviews, capsys, tmp_path):
    with stopping_behind(3, number):
        found, _, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "run"))
    assert found == status
    last = err.splitlines()[-1]
    assert last.startswith(f"loretta: stopped by {number.name} behind step 3 of 10, which is saved")
    assert last.endswith("go on with the same command and --resume")
    assert call(capsys, "train", "--resume", tmp_path / "run")[0] == 0


def test_a_comparison_that_is_stopped_goes_on_with_the_command_that_it_has(bert, reviews, capsys, tmp_path):
    """It takes no --resume, in which process its runs ever train."""
    columns = ("--text", "review", "--label", "mood", "--methods", "lora,ia3", "--epochs", 1, "--batch-size", 8)
    words = (
        "compare",
        "--model",
        bert,
        "--data",
        reviews,
        *columns,
        "--seeds",
        1,
        "--cpu",
        "--jobs",
        0,
        "-o",
        tmp_path,
    )
    with stopping_behind(3, signal.SIGINT):
        status, _, err = call(capsys, *words)
    assert status == 130
    assert err.splitlines()[-1].endswith("behind step 3 of 10, which is saved: go on with the same command")
    assert call(capsys, *words)[0] == 0


@pytest.mark.parametrize(
    ("verb", "again"), [("train", "with --resume"), ("compare", "the same command"), ("report", "")]
)
def test_an_interrupt_tells_of_what_the_command_has(verb, again, capsys, tmp_path, monkeypatch):
    def interrupt(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "_invoke", interrupt)
    words = {"train": ["--data", "x"], "compare": ["--data", "x"], "report": [tmp_path]}
    status, _, err = call(capsys, verb, *words[verb])
    assert status == 130
    last = err.splitlines()[-1]
    assert again in last if again else last == "loretta: interrupted"


def test_numbers_that_are_not_finite_have_a_status_of_their_own(bert, reviews, capsys, tmp_path):
    status, _, err = call(capsys, *train_arguments(bert, reviews, tmp_path / "run", "--lr", "1e30"))
    assert status == 3
    assert "not finite" in err.splitlines()[-1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), None])
@pytest.mark.parametrize("verb", ["eval", "predict", "chat", "export", "compress", "reproduce"])
def test_too_little_memory_is_one_sentence(error, verb, trained, teller, bert, capsys, tmp_path, monkeypatch):
    arguments, mend = {
        "eval": ([trained, "--cpu"], "give --cpu"),
        "predict": ([teller, "--text", "a film", "--cpu"], "fewer --max-new-tokens"),
        "chat": ([teller, "--cpu"], "lower --max-new-tokens"),
        "export": ([trained, "--to", "merged", "-o", tmp_path / "out"], "--dtype bfloat16"),
        "compress": ([trained, "-o", tmp_path / "out"], "leave --text out"),
        "reproduce": (["table1", "--model", bert, "--dry-run"], "lower --jobs, --population"),
    }[verb]
    places = {
        "export": "transformers.AutoModelForSequenceClassification.from_pretrained",
        "compress": "loretta.convert.compress.compress",
        "reproduce": "loretta.studies.expansion.expand",
    }

    def too_large(*args, **kwargs):
        if error is not None:
            raise error
        torch.empty(2**60)  # what the allocator of a CPU says

    for name in ("runner", "compare"):  # or they would be imported with the function below, and keep it
        import_module(f"loretta.studies.{name}")
    monkeypatch.setattr("sys.stdin", io.StringIO("a film\n"))
    monkeypatch.setattr(places.get(verb, "torch.nn.Linear.forward"), too_large)
    status, _, err = call(capsys, verb, *arguments)
    last = err.splitlines()[-1]
    assert status == 71
    assert last.startswith(f"loretta: the memory is too small for `loretta {verb}`")
    assert mend in last
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("verb", ["predict", "export", "report"])
def test_a_command_that_is_stopped_while_it_writes_leaves_nothing(
    verb, number, trained, reviews, capsys, tmp_path, monkeypatch
):
    place = tmp_path / {"predict": "rows.csv", "report": "page.html"}.get(verb, "out")
    arguments = {
        "predict": [trained, reviews, "--cpu"],
        "export": [trained, "--to", "merged"],
        "report": [trained],
    }[verb]

    def stop(*given, **named):
        assert [*tmp_path.rglob("*")]
        os.kill(os.getpid(), number)

    monkeypatch.setattr("loretta.owned.publish", stop)  # all is written, and not yet in its place
    own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    ours = signal.signal(number, own)  # of a job behind "&" or nohup it is to ignore some
    try:
        status, _, err = call(capsys, verb, *arguments, "-o", place)
        assert signal.getsignal(number) == own
    finally:
        signal.signal(number, ours)
    assert status == 128 + number, err
    said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert err.splitlines()[-1] == f"loretta: {said}"
    assert not [*tmp_path.rglob("*")]
    monkeypatch.undo()
    assert call(capsys, verb, *arguments, "-o", place)[0] == 0


def test_a_worker_of_a_command_ends_by_the_signal(monkeypatch, capsys):
    def in_a_worker(self, ctx):
        worker = os.fork()
        if not worker:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM

    monkeypatch.setattr(Command, "_invoke", in_a_worker)
    assert call(capsys, "report", "x")[0] == 0


def test_a_batch_that_does_not_fit_is_halved(trained, monkeypatch):
    run = load_run(trained, cpu=True)
    run = dataclasses.replace(run, config=run.config.model_copy(update={"eval_batch_size": 8}))
    texts = [["a good film", "bad", "a film", "good", "no"]]
    expected = predict(run, texts)
    forward, sizes = run.model.forward, []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    monkeypatch.setattr(run.model, "forward", small)
    found = predict(run, texts)
    assert sizes == [5, 4, 2, 2, 1]
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in expected])


def test_an_interrupt_before_the_verbs_are_imported_has_no_traceback():
    script = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job behind "&" ignores it
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "loretta.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["loretta", "--version"]
from loretta.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
    whole = script.replace("os.kill(os.getpid(), signal.SIGINT)", "return None")
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
