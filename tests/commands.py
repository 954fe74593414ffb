"""A command line in this process: what it prints, and what it says when it refuses."""

import sys

from loretta.cli import main as cli


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    capsys.readouterr()
    old, sys.argv = sys.argv, ["loretta", *map(str, arguments)]
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = old
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(status, err, words):
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2, err
    assert lines[-1].startswith("loretta: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1]


def train_arguments(model, data, folder, *more):
    fixed = ["--epochs", 1, "--batch-size", 8, "--cpu", "--output", folder, "--set", "max_length=16"]
    return ["train", "--model", model, "--data", data, "--text", "review", "--label", "mood", *fixed, *more]
